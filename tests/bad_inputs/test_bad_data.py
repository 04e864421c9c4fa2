"""Data sets and tokenizers that would hang, fill the memory or end in a traceback."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import tokenizers
from refused import NOT_FILES, put, refused
from tokenizers import models

from megaresnorm.cli import main
from megaresnorm.data.tokenizer import SentencePieceTokenizer

FILES = ("dataset.json", "tokens.idx", "tokens.bin")


def described(**changes):
    def edit(folder: Path) -> None:
        path = folder / "dataset.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def of_file(name: str, **changes):
    def edit(folder: Path) -> None:
        path = folder / "dataset.json"
        description = json.loads(path.read_text())
        description["files"][name].update(changes)
        path.write_text(json.dumps(description))

    return edit


def written(name: str, content):
    return lambda folder: put(content)(folder / name)


def bare(index: bytes, size: int):
    """Megatron's files alone, of this index and so many bytes of tokens."""

    def make(folder: Path) -> None:
        (folder / "dataset.json").unlink()
        put(index)(folder / "tokens.idx")
        put(size)(folder / "tokens.bin")

    return make


def header(sequences: int, boundaries: int, code: int = 8) -> bytes:
    return b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, sequences, boundaries)


DATA = {
    "a tokenizer of a list": (described(tokenizer={"kind": []}), "see its tokenizer.kind"),
    "a tokenizer of a table": (described(tokenizer={"kind": {}}), "see its tokenizer.kind"),
    "a tokenizer that is a list": (described(tokenizer=["bytes"]), "see its tokenizer"),
    "no tokenizer": (described(tokenizer=None), "see its tokenizer"),
    "a tokenizer of another kind": (described(tokenizer={"kind": "words"}), "unknown tokenizer"),
    "a tokenizer of 100,000 letters": (described(tokenizer={"kind": "x" * 100_000}), "unknown tokenizer"),
    "a digest that is a number": (described(tokenizer={"kind": "sentencepiece", "sha256": 1}),
                                  "see its tokenizer.sha256"),
    "a tokenizer that is not there": (described(tokenizer={"kind": "huggingface", "sha256": "0"}), "cannot be read"),
    "a vocabulary below 0": (described(vocab_size=-1), "see its vocab_size"),
    "a vocabulary of 10^30": (described(vocab_size=10**30), "see its vocab_size"),
    "a vocabulary of true": (described(vocab_size=True), "see its vocab_size"),
    "a vocabulary of 1.0": (described(vocab_size=257.0), "see its vocab_size"),
    "a vocabulary of another": (described(vocab_size=256), "is not the tokenizer's 257"),
    "format true": (described(format=True), "see its format"),
    "format 2": (described(format=2), "see its format"),
    "files of a list": (described(files=[]), "see its files"),
    "a file of a number": (described(files={"tokens.bin": 1, "tokens.idx": 2}), "see its files.tokens.bin"),
    "digests of numbers": (of_file("tokens.idx", sha256=[1]), "see its files.tokens.idx.sha256.0"),
    "digests of lists": (of_file("tokens.bin", sha256=[[]]), "see its files.tokens.bin.sha256.0"),
    "100,000 digests": (of_file("tokens.bin", sha256=["0"] * 10**5), "digests for the"),
    "a million digests": (of_file("tokens.bin", sha256=["0"] * (1 << 20)), "values; not such a file"),
    "a size of 10^30": (of_file("tokens.bin", size=10**30), "see its files.tokens.bin.size"),
    "a size below 0": (of_file("tokens.bin", size=-1), "see its files.tokens.bin.size"),
    "documents of words": (described(documents="many"), "see its documents"),
    "tokens of 10^400": (described(tokens=10**400), "see its tokens"),
    "nested lists": (written("dataset.json", b"[" * 100_000), "nested too deeply"),
    "nested tables": (written("dataset.json", b'{"a":' * 100_000), "nested too deeply"),
    "a number of 100,000 digits": (written("dataset.json", b'{"format": ' + b"1" * 100_000 + b"}"), "not JSON"),
    "no UTF-8": (written("dataset.json", b'{"a": "\xff"}'), "not JSON"),
    "a NUL": (written("dataset.json", b"\0"), "not JSON"),
    "nothing": (written("dataset.json", b""), "not JSON"),
    "null": (written("dataset.json", b"null"), "not a JSON object but a NoneType"),
    "an index of 2^60 sequences": (bare(header(1 << 60, 2), 2), "announced at byte 18"),
    "an index of terabytes": (bare(header(1, 2) + bytes(100), 0), "need 62"),
    "a sparse index": (lambda f: (bare(b"", 2)(f), put(1 << 43)(f / "tokens.idx")),
                       "not the start of a Megatron index"),
    "a sparse index of little": (lambda f: (bare(b"", 2)(f), put(1 << 20)(f / "tokens.idx")),
                                 "not the start of a Megatron"),
    "tokens that are a folder": (
        lambda f: (bare(header(1, 2) + struct.pack("<iqqq", 1, 0, 0, 1), 2)(f), put(b"")(f / "tokens.bin"),
                   (f / "tokens.bin").unlink(), (f / "tokens.bin").mkdir()),
        "cannot be read",
    ),
    "lengths that sum up beyond 64 bits": (
        bare(header(3, 2) + struct.pack("<3i3q2q", *[2**31 - 1] * 3, 0, 2**32 - 2, 2**33 - 4, 0, 3), 100),
        "do not belong together",
    ),
    "tokens of NaN": (
        lambda f: (bare(header(1, 2, code=7) + struct.pack("<iqqq", 1, 0, 0, 1), 0)(f),
                   put(b"\0\0\xc0\x7f")(f / "tokens.bin")),
        "outside the vocabulary",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_a_data_set_that_is_none_costs_one_line(case, byte_data, tmp_path, capfd):
    edit, wanted = DATA[case]
    folder = tmp_path / "data"
    shutil.copytree(byte_data, folder)
    edit(folder)
    path = folder if (folder / "dataset.json").exists() else folder / "tokens"
    refused(["data", "verify", path], wanted, tmp_path, capfd)
    refused(["data", "show", path], wanted, tmp_path, capfd)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("case", NOT_FILES)
def test_a_data_set_whose_files_are_none_costs_one_line(case, name, byte_data, tmp_path, capfd):
    shutil.copytree(byte_data, tmp_path / "data")
    (tmp_path / "data" / name).unlink()
    NOT_FILES[case](tmp_path / "data" / name)
    refused(["data", "verify", tmp_path / "data"], name, tmp_path, capfd)


def test_what_is_no_data_set_is_never_taken_for_one_that_was_prepared(byte_data, tmp_path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    argv = ["prepare", str(text), "--out", str(tmp_path / "data"), "--workers", "1"]
    assert main(argv) == 0
    for case in ("documents of words", "tokens of 10^400", "files of a list", "nested lists"):
        edit, _ = DATA[case]
        edit(tmp_path / "data")
        refused(argv, "is not a whole data set", tmp_path, capfd)


def hf(model=None, **parts) -> bytes:
    return json.dumps({"model": model or {"type": "BPE", "vocab": {"a": 0, "</s>": 1}, "merges": []}, **parts}).encode()


def unfinished_wordpiece() -> bytes:
    made = json.loads(tokenizers.Tokenizer(models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]")).to_str())
    return json.dumps(made).encode()


TOKENIZERS = {
    "a charsmap that is none": (
        "t.json", lambda: hf(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "t.json"
    ),
    "a charsmap of nothing": (
        "t.json", lambda: hf(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}), "t.json"
    ),
    "a charsmap of noise": (
        "t.json", lambda: hf(normalizer={"type": "Precompiled", "precompiled_charsmap": "/" * 400}), "t.json"
    ),
    "pieces without the unknown one": ("t.json", unfinished_wordpiece, "cannot encode a text"),
    "a token of 2^31": ("t.json", lambda: hf({"type": "BPE", "vocab": {"</s>": 2**31}, "merges": []}),
                        "tokens are read"),
    "a token of 2^40": ("t.json", lambda: hf({"type": "BPE", "vocab": {"</s>": 2**40}, "merges": []}),
                        "not a tokenizer.json"),
    "a token below 0": ("t.json", lambda: hf({"type": "BPE", "vocab": {"</s>": -1}, "merges": []}),
                        "not a tokenizer.json"),
    "no end": ("t.json", lambda: hf({"type": "BPE", "vocab": {"a": 0}, "merges": []}), "has no token one of"),
    "no tokens": ("t.json", lambda: hf({"type": "BPE", "vocab": {}, "merges": []}), "has no token one of"),
    "merges of nothing": ("t.json", lambda: hf({"type": "BPE", "vocab": {"</s>": 0}, "merges": ["x y"]}),
                          "not a tokenizer.json"),
    "no model": ("t.json", lambda: b"{}", "not a tokenizer.json"),
    "another model": ("t.json", lambda: hf({"type": "Pickle"}), "not a tokenizer.json"),
    "a unigram without scores": ("t.json", lambda: hf({"type": "Unigram", "vocab": [], "unk_id": 5}),
                                 "not a tokenizer.json"),
    "nested": ("t.json", lambda: b'{"model":' * 10_000, "not a tokenizer.json"),
    "a list": ("t.json", lambda: b"[]", "not a tokenizer.json"),
    "no UTF-8": ("t.json", lambda: b"\xff", "not a tokenizer.json"),
    "an expression that is none": (
        "t.json",
        lambda: hf(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        "not a tokenizer.json",
    ),
    "no JSON": ("t.json", lambda: b"\x80\x04.", "not a tokenizer.json"),
    "no SentencePiece": ("t.model", lambda: b"\x80\x04.", "not a SentencePiece model"),
    "nothing": ("t.model", lambda: b"", "not a SentencePiece model"),
    "zeros": ("t.model", lambda: bytes(1000), "not a SentencePiece model"),
    "a piece without end": ("t.model", lambda: b"\x0a\xff\xff\xff\xff\x0f", "not a SentencePiece model"),
    "no pieces": ("t.model", lambda: b"\x12\x00", "t.model"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_is_none_costs_one_line(case, tmp_path, capfd):
    name, content, wanted = TOKENIZERS[case]
    (tmp_path / name).write_bytes(content())
    (tmp_path / "text.txt").write_text("some text")
    argv = [
        "prepare",
        tmp_path / "text.txt",
        "--tokenizer",
        tmp_path / name,
        "--out",
        tmp_path / "out",
        "--workers",
        "1",
    ]
    refused(argv, wanted, tmp_path, capfd)


@pytest.mark.parametrize("suffix", [".json", ".model"])
@pytest.mark.parametrize("case", NOT_FILES)
def test_a_tokenizer_that_is_not_a_file_is_not_read(case, suffix, tmp_path, capfd):
    NOT_FILES[case](tmp_path / f"t{suffix}")
    (tmp_path / "text.txt").write_text("some text")
    argv = ["prepare", tmp_path / "text.txt", "--tokenizer", tmp_path / f"t{suffix}", "--out", tmp_path / "out"]
    refused(argv, "cannot be read", tmp_path, capfd)


def test_a_model_with_flipped_bytes_is_refused_or_works(tmp_path, capfd):
    """Every byte counts somewhere: forty of them, one at a time, and never a crash."""
    text = [f"line {i} of some text with words\n" * 3 for i in range(200)]
    good = SentencePieceTokenizer.train(text, 300).model
    (tmp_path / "text.txt").write_text("some text")
    argv = ["prepare", tmp_path / "text.txt", "--tokenizer", tmp_path / "t.model", "--workers", 1, "--out"]
    refusals = 0
    for at in range(0, len(good), len(good) // 40):
        (tmp_path / "t.model").write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
        code = main([*map(str, argv), str(tmp_path / f"out{at}")])
        error = capfd.readouterr().err
        assert code in (0, 3) and error.count("\n") == (code == 3), (at, error)
        refusals += code == 3
    assert refusals > 2


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize("kind", [kind for kind in NOT_FILES if kind != "8 TB"])  # which is a long text
def test_sources_that_are_no_files_are_refused(kind, suffix, tmp_path, capfd):
    source = tmp_path / f"source{suffix}"
    NOT_FILES[kind](source)
    refused(["prepare", source, "--out", tmp_path / "out"], f"source{suffix}", tmp_path, capfd)


def test_a_sparse_index_is_not_read(tmp_path, capfd):
    """Its size is a stranger's to choose, and so is that of the tokens, which allows for it."""
    for suffix in ("bin", "idx"):
        with (tmp_path / f"x.{suffix}").open("wb") as file:
            file.truncate(1 << 40)
    refused(["data", "verify", tmp_path / "x"], "not the start of a Megatron index", tmp_path, capfd)
