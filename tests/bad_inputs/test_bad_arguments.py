"""Arguments of every command that would hang, fill the memory or end in a traceback."""

import io
import sys

import pytest
from refused import PIPE, ZEROS, refused
from test_bad_checkpoints import good  # noqa: F401 - a fixture

BIG, DIGITS = str(10**30), "9" * 5000
NUMBERS = {  # an option that takes a whole number -> the command without it
    "--tokens": ["generate", "RUN"],
    "--top-k": ["generate", "RUN"],
    "--samples": ["generate", "RUN"],
    "--seed": ["generate", "RUN"],
    "--ranks": ["train", "recipe.yaml", "--dry-run"],
    "--vocab-size": ["prepare", "x.txt", "--out", "OUT", "--tokenizer", "sentencepiece"],
    "--workers": ["prepare", "x.txt", "--out", "OUT"],
    "--rows": ["checkpoint", "diff", "RUN", "RUN"],
    "--keep": ["checkpoint", "prune", "RUN", "--dry-run"],
    "--keep-every": ["checkpoint", "prune", "RUN", "--dry-run"],
    "--seq-len": ["convert", "from-hf", "RUN", "OUT"],
    "--max-shard-size": ["convert", "to-hf", "RUN", "OUT"],
    "--max-memory": ["convert", "to-hf", "RUN", "OUT"],
    "--tolerance": ["convert", "compare", "RUN", "RUN"],
    "--depths": ["depth", "--probe"],
    "--seeds": ["depth", "--probe"],
    "--dim": ["depth", "--probe"],
    "--shapes": ["doctor", "--kernels"],
}
FLOATS = {
    "--temperature": ["generate", "RUN"],
    "--top-p": ["generate", "RUN"],
    "--tolerance": ["convert", "compare", "RUN", "RUN"],
}
ARGUMENTS = [
    (["generate", "RUN", "--temperature", "1e-320"], "is not 0, or a number from 1.18e-38"),
    (["generate", "RUN", "--temperature", "1e300"], "is not 0, or a number from 1.18e-38"),
    (["generate", "RUN", "--prompt", "\udcff"], "--prompt: not UTF-8 text (byte 0)"),
    (["generate", "RUN", "--prompt", "abc\udce9"], "--prompt: not UTF-8 text (byte 3)"),
    (["generate", "RUN", "--end-token", "</s>", "--tokenizer", "bytes"], "has its own tokenizer"),
    (["doctor", "--shapes", "1000000000x1000000000"], "is no shape"),
    (["doctor", "--kernels", "--shapes", "100000000x100000000"], "of memory"),
    (["doctor", "--shapes", "1x1x1"], "is no shape"),
    (["doctor", "--shapes", "0x1"], "is no shape"),
    (["doctor", "--shapes", ""], "is no shape"),
    (["doctor", "--shapes", "1x" + "9" * 5000], "is no shape"),
    (["depth", "--probe", "--dim", "4194304"], "of memory"),
    (["depth", "--probe", "--dim", "1000000", "--depths", "10000"], "of memory"),
    (["depth", "--probe", "--dim", "7"], "must be a multiple of"),
    (["depth", "--probe", "--depths", "1,,2"], "is not a whole number from 1 to 10000"),
    (["depth", "--probe", "--topologies", ""], "''"),
    (["depth", "--probe", "--topologies", "x" * 5000], "xxx"),
    (["depth", "--probe", "--json", "FOLDER"], "cannot be written"),
    (["depth", "--probe", "--json", "a\0b"], "NUL"),
    (["depth", "--probe", "--json", "/dev/null/x"], "cannot be written"),
    (["quantize"], "Missing argument 'RUN...'; see megaresnorm quantize --help"),
    (["quantize", "RUN"], "x: no such data set"),
    (["quantize", "FOLDER"], "has no checkpoint"),
    (["quantize", "/dev/zero"], "has no checkpoint"),
    (["quantize", "a\0b"], "NUL"),
    (["quantize", "x" * 5000], "too long"),
    (["quantize", "RUN", "--formats", "fp9-tensor"], "did you mean fp8-tensor?"),
    (["quantize", "RUN", "--formats", ""], "--formats '': wanted some of int8-tensor"),
    (["quantize", "RUN", "--formats", "x" * 5000], "wanted some of int8-tensor"),
    (["quantize", "RUN", "--samples", "0"], "is not a whole number from 1 to"),
    (["quantize", "RUN", "--samples", BIG], "is not a whole number from 1 to"),
    (["quantize", "RUN", "--output", "OUT"], "--output takes one run in one format, not 1 in 4"),
    (["quantize", "RUN", "RUN", "--formats", "int8-tensor", "--output", "OUT"], "not 2 in 1"),
    (["quantize", "RUN", "--formats", "int8-tensor", "--output", "RUN"], "exists already"),
    (["quantize", "RUN", "--formats", "int8-tensor", "--output", "ZEROS"], "exists already"),
    (["data", "show", "DATA", "--json", "FOLDER"], "cannot be written"),
    (["data", "show", "DATA", "--json", "a\0b"], "NUL"),
    (["data", "show", "a\0b"], "no such data set"),
    (["data", "show", "\ud800"], ""),
    (["data", "show", "x" * 5000], "cannot be read"),
    (["data", "show", ""], "cannot be read"),
    (["data", "verify", "/dev/zero"], "no such data set"),
    (["data", "verify", "/"], "cannot be read"),
    (["prepare", "--out", "a\0b", "x.txt"], "NUL"),
    (["prepare", "--out", "x" * 300, "x.txt"], "too long"),
    (["prepare", "--out", "OUT", "a\0b"], "no such file"),
    (["prepare", "--out", "OUT", "\ud800.txt"], ""),
    (["prepare", "--out", "OUT", "x" * 5000], "cannot be read"),
    (["prepare", "--out", "/dev/null/x", "TEXT", "--workers", "1"], "cannot be written"),
    (["prepare", "--out", "/dev/null", "TEXT", "--workers", "1"], "/dev/null"),
    (["prepare", "--out", "RUN", "TEXT", "--workers", "1"], "exists and is not a data set"),
    (["prepare", "--out", "OUT", "TEXT", "--tokenizer", "a\0b"], "cannot be read"),
    (["prepare", "--out", "OUT", "TEXT", "--tokenizer", "x" * 5000], "cannot be read"),
    (["prepare", "--out", "OUT", "TEXT", "--tokenizer", "/dev/zero"], "cannot be read"),
    (["prepare", "--out", "OUT", "TEXT", "--tokenizer", ""], "cannot be read"),
    (["prepare", "TEXT", "--out", "OUT", "--tokenizer=sentencepiece", "--workers=1", "--vocab-size=16777216"],
     "SentencePiece"),
    (["convert", "to-hf", "RUN", "a\0b"], "NUL"),
    (["convert", "to-hf", "RUN", "/dev/null/x"], "cannot be written"),
    (["convert", "to-hf", "RUN", "OUT", "--arch", "x" * 5000], "xxx"),
    (["convert", "to-hf", "/dev/zero", "OUT"], "has no checkpoint"),
    (["convert", "from-hf", "/dev/zero", "OUT"], "not a folder"),
    (["convert", "from-hf", "FOLDER", "OUT"], "config.json"),
    (["convert", "from-megatron", "FOLDER", "OUT"], "config.json"),
    (["convert", "compare", "FOLDER", "FOLDER"], "has no checkpoint"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "/dev/zero"], "cannot be read"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "FOLDER"], "cannot be read"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "BYTES"], "not UTF-8 text (byte 0)"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "EMPTY"], "has no line of text"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "PIPE"], "cannot be read"),
    (["convert", "compare", "RUN", "RUN", "--prompts", "ZEROS"], "cannot be read"),
    (["checkpoint", "show", "a\0b"], "NUL"),
    (["checkpoint", "diff", "RUN", "x" * 300], "too long"),
    (["schema", "x" * 5000], "xxx"),
    (["x" * 5000], "xxx"),
    (["train"], "Missing argument 'RECIPE'; see megaresnorm train --help"),
]  # fmt: skip


@pytest.fixture
def given(good, byte_data, tmp_path):  # noqa: F811 - a fixture
    """A function that puts real paths in the place of words in capital letters."""
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    PIPE(tmp_path / "pipe")
    ZEROS(tmp_path / "zeros")
    paths = {"RUN": good, "DATA": byte_data} | {
        word: tmp_path / name
        for word, name in (("TEXT", "text.txt"), ("BYTES", "bytes.txt"), ("EMPTY", "empty.txt"), ("FOLDER", "folder"),
                           ("PIPE", "pipe"), ("ZEROS", "zeros"), ("OUT", "out"))
    }  # fmt: skip
    return lambda argv: [paths.get(word, word) for word in argv]


ROWS = [
    (option, value)
    for option in NUMBERS
    for value in (BIG, DIGITS, "0", "-1", "1.5", "", "nan")
    if (option, value) not in {("--seed", "0"), ("--tolerance", "0"), ("--max-shard-size", "1.5")}  # which are values
]


@pytest.mark.parametrize(("option", "value"), ROWS, ids=lambda v: v[:16])
def test_a_number_that_is_none_or_too_large_costs_one_line(option, value, given, tmp_path, capfd):
    """Python itself refuses to read one of 5,000 digits."""
    refused(given([*NUMBERS[option], f"{option}={value}"]), option, tmp_path, capfd)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e400", "", "1e", "9" * 5000], ids=lambda v: v[:8])
@pytest.mark.parametrize("option", FLOATS)
def test_a_number_that_is_not_finite_costs_one_line(option, value, given, tmp_path, capfd):
    refused(given([*FLOATS[option], f"{option}={value}"]), option, tmp_path, capfd)


@pytest.mark.parametrize(("argv", "wanted"), ARGUMENTS, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_an_argument_that_cannot_be_costs_one_line(argv, wanted, given, tmp_path, capfd):
    refused(given(argv), wanted, tmp_path, capfd)


@pytest.mark.parametrize(("content", "wanted"), [
    (b"caf\xe9", "not UTF-8 text (byte 3)"), (b"\xff" * 100, "not UTF-8 text (byte 0)"),
    (b"\xed\xa0\x80", "not UTF-8 text"), (b"x" * ((1 << 24) + 1), "over 16,777,216 bytes"),
])  # fmt: skip
def test_a_prompt_on_standard_input_that_is_no_text_costs_one_line(
    content, wanted, given, tmp_path, capfd, monkeypatch
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
    refused(given(["generate", "RUN", "--prompt", "-"]), wanted, tmp_path, capfd)


def test_endless_standard_input_is_not_read_to_its_end(given, tmp_path, capfd, monkeypatch):
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        refused(given(["generate", "RUN", "--prompt", "-"]), "over 16,777,216 bytes", tmp_path, capfd)
