"""The prepare command: text in, a whole data set or nothing out."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from megaresnorm.cli import main
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.data.tokenizer import SentencePieceTokenizer
from megaresnorm.errors import DataError

TEXTS = ["def f(x):\n\treturn x  # two  spaces\n", "naïve café 日本語 🚀\r\n", "x" * 50, "a\n\n\n b\n"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n\n" for t in (*TEXTS[1:3], "")))
    (folder / "inner" / "c.txt").write_text(TEXTS[3])
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_come_back_in_the_order_of_the_sources(corpus, tmp_path, workers):
    result = prepare(PrepareJob(out=tmp_path / "out", paths=(str(corpus),), workers=workers))
    data = open_dataset(str(result.folder))
    bounds = data.files.boundaries
    documents = [data.files.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert [data.tokenizer.decode(d[:-1]) for d in documents] == [TEXTS[0], TEXTS[1], TEXTS[2], TEXTS[3]]
    assert all(d[-1] == 256 for d in documents) and result.documents == 4
    assert data.files.dtype == np.uint16


def test_worker_count_does_not_change_a_byte(tmp_path):
    import asyncio

    source = str(tmp_path / "text.txt")
    Path(source).write_text("".join(p.read_text() for p in sorted(Path(asyncio.__file__).parent.glob("*.py"))) * 2)
    for workers in (1, 2):
        prepare(
            PrepareJob(
                out=tmp_path / str(workers), paths=(source,), tokenizer="sentencepiece", vocab_size=400, workers=workers
            )
        )
    for name in ("tokens.bin", "tokens.idx", "tokenizer.model", "dataset.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_finished_folder_is_reused_and_another_one_never_replaced_unasked(corpus, tmp_path, capsys):
    arguments = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0 and "prepared" in capsys.readouterr().out
    before = (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns
    assert main(arguments) == 0 and "reused" in capsys.readouterr().out
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == before
    (corpus / "a.txt").write_text("something else")
    assert main(arguments) == 3
    assert "was made from other files or settings" in capsys.readouterr().err
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == before
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    assert main(["prepare", str(corpus), "--out", str(tmp_path / "precious"), "--overwrite"]) == 3
    assert (tmp_path / "precious" / "thesis.txt").exists()


BAD_SOURCES = [
    ({"x.txt": b"abc\xff"}, ["x.txt", "not UTF-8", "byte 3"]),
    ({"x.jsonl": b'{"text": "a"}\n{"text": \n'}, ["x.jsonl:2", "not JSON"]),
    ({"x.jsonl": b'{"text": "a"}\n[1]\n'}, ["x.jsonl:2", "JSON object"]),
    ({"x.jsonl": b'{"body": "a", "id": 1}\n'}, ["x.jsonl:1", "body, id", "--text-key"]),
    ({"x.jsonl": b'{"text": 3}\n'}, ["x.jsonl:1", "its 'text' is a number, not a text"]),
    ({"x.jsonl": b'{"text": "\xff"}\n'}, ["x.jsonl:1", "UTF-8"]),
    ({"x.txt": b""}, ["x.txt", "1 empty"]),
    ({"x.csv": b"a,b"}, ["no text in the folder", "1 of kind .csv: x.csv"]),
]


@pytest.mark.parametrize(("files", "parts"), BAD_SOURCES, ids=lambda v: str(v)[:40])
def test_bad_source_costs_one_line_and_leaves_nothing(files, parts, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for name, content in files.items():
        (tmp_path / "corpus" / name).write_bytes(content)
    assert main(["prepare", str(tmp_path / "corpus"), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts), error
    assert os.listdir(tmp_path) == ["corpus"]


def test_bad_requests_cost_one_line(corpus, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    (corpus / "not.model").write_bytes(b"hello")
    for arguments, code, part in [
        ([str(corpus / "none.txt")], 3, "no such file"),
        ([str(corpus / "ignored.bin")], 3, "cannot read .bin"),
        ([], 2, "either --corpus stdlib or --corpus english, or at least one PATH"),
        ([str(corpus), "--corpus", "stdlib"], 2, "either --corpus stdlib or --corpus english, or at least one PATH"),
        (
            [str(corpus), "--tokenizer", "sentencepiece", "--vocab-size", "60000"],
            3,
            "cannot train a SentencePiece model of 60000",
        ),
        ([str(corpus), "--tokenizer", str(corpus / "not.model")], 3, "not a SentencePiece model"),
        ([str(corpus), "--vocab-size", "300"], 2, "--vocab-size=300 has no effect with --tokenizer bytes"),
        ([str(corpus), "--tokenizer", "nowhere.model"], 3, "nowhere.model: cannot be read"),
    ]:
        assert main(["prepare", *arguments, *out]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and part in error, error
    assert not (tmp_path / "out").exists()


def test_stdlib_corpus_is_text_of_this_python_without_its_tests():
    from megaresnorm.data.sources import find_sources

    paths = [f.name for f in find_sources("stdlib", ())]
    assert len(paths) > 300 and any(p.endswith("/argparse.py") for p in paths)
    assert not any("/site-packages/" in p or "/test/" in p or "/tests/" in p for p in paths)


def test_sentencepiece_keeps_every_character_and_equals_its_hugging_face_form(tmp_path):
    """Round trips of code, tabs, spaces, emoji and CJK, and the same ids from the LlamaTokenizer of the same model."""
    transformers = pytest.importorskip("transformers")
    import asyncio

    sources = [p.read_text() for p in sorted(Path(asyncio.__file__).parent.glob("*.py"))]
    tokenizer = SentencePieceTokenizer.train(sources, 700)
    strings = [line for text in sources[:6] for line in text.splitlines(keepends=True)][:500]
    strings += [
        *TEXTS,
        " lead",
        "trail ",
        "  two",
        "\t\ttabs",
        "\n\n",
        "a\u00a0b",
        "👩‍👩‍👧",
        "中文 字",
        "1  2   3",
        "",
        " ",
        "\r\n",
    ]
    for text in strings:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_prefix_space": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in strings:
        assert tokenizer.encode(text).tolist() == theirs.encode(text, add_special_tokens=False), repr(text)


def test_a_swapped_tokenizer_is_noticed(tmp_path):
    import asyncio

    text = tmp_path / "t.txt"
    text.write_text("".join(p.read_text() for p in sorted(Path(asyncio.__file__).parent.glob("*.py"))))
    for size in (400, 410):
        prepare(PrepareJob(out=tmp_path / str(size), paths=(str(text),), tokenizer="sentencepiece", vocab_size=size))
    (tmp_path / "400" / "tokenizer.model").write_bytes((tmp_path / "410" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match=r"tokenizer\.model: not the tokenizer this data was made with"):
        open_dataset(str(tmp_path / "400"))


def test_a_data_set_that_lost_a_file_is_not_reused(corpus, tmp_path, capsys):
    arguments = ["prepare", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 0
    (tmp_path / "out" / "tokens.bin").unlink()
    assert main(arguments) == 3 and "not a whole data set; use --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    (tmp_path / "out" / "tokens.bin").write_bytes(b"xx")
    assert main(arguments) == 3 and "not those that were prepared; use --overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0 and open_dataset(str(tmp_path / "out")).files.num_documents == 4


def test_another_tokenizer_under_the_same_name_is_another_job(tmp_path, capsys):
    import asyncio

    text = tmp_path / "t.txt"
    text.write_text("".join(p.read_text() for p in sorted(Path(asyncio.__file__).parent.glob("*.py"))))
    model = tmp_path / "m.model"
    arguments = ["prepare", str(text), "--tokenizer", str(model), "--out", str(tmp_path / "out"), "--workers", "1"]
    model.write_bytes(SentencePieceTokenizer.train([text.read_text()], 400).model)
    assert main(arguments) == 0 and main(arguments) == 0 and "reused" in capsys.readouterr().out
    model.write_bytes(SentencePieceTokenizer.train([text.read_text()], 420).model)
    assert main(arguments) == 3 and "other files or settings" in capsys.readouterr().err


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_half_a_surrogate_pair_is_refused_with_its_line(tokenizer, workers, tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    size = ["--vocab-size", "300"] if tokenizer == "sentencepiece" else []
    arguments = ["prepare", str(path), "--tokenizer", tokenizer, *size, "--workers", workers]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "x.jsonl:2" in error and "surrogate" in error


def test_a_tokenizer_is_trained_on_the_same_share_of_every_file(tmp_path, monkeypatch):
    from megaresnorm.data import prepare as module
    from megaresnorm.data.sources import find_sources

    monkeypatch.setattr(module, "TRAINING_CHARACTERS", 20_000)
    monkeypatch.setattr(module, "WORK_CHARACTERS", 100)
    (tmp_path / "a-small.txt").write_text("tiny")
    for name, letter in (("b.jsonl", "b"), ("c.jsonl", "c")):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{i:06}{letter * 194}"}) + "\n" for i in range(1000)))
    texts = list(module._training_text(find_sources(None, [str(tmp_path)]), "text"))
    joined = "".join(texts)
    assert len(joined) == pytest.approx(20_000, rel=0.15)
    assert joined.count("b") == pytest.approx(joined.count("c"), rel=0.1)
    numbers = [int(t[:6]) for t in texts if t.endswith("b")]
    assert min(numbers) < 100 and max(numbers) > 900  # from all over the file


def test_names_too_long_for_a_file_cost_one_line(tmp_path, capsys):
    long = "x" * 300
    assert main(["prepare", long, "--out", str(tmp_path / "out")]) == 3
    assert main(["prepare", __file__.replace(".py", ".txt"), "--out", long]) == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert "File name too long" in first and "is too long for a path" in last
    with pytest.raises(DataError, match="File name too long"):
        open_dataset(long)
