"""Nothing in a folder is passed over in silence: what is printed and what was read are all that is there."""

import gzip
import json
import os
import re

import pytest

from megaresnorm.cli import main
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.sources import NAMES_TOLD, find_sources, kind_of


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# name -> content, and the documents that it has, or the reason why it is passed over
FILES: dict[str, tuple[bytes, list[str] | str]] = {
    "a.txt": (b"small letters", ["small letters"]),
    "B.TXT": (b"capitals", ["capitals"]),
    "bom.txt": (b"\xef\xbb\xbfafter a mark", ["after a mark"]),
    "c.jsonl": (lines("one", "two"), ["one", "two"]),
    "d.JsonL": (lines("mixed"), ["mixed"]),
    "e.ndjson": (lines("newline"), ["newline"]),
    "f.jsonlines": (lines("long suffix"), ["long suffix"]),
    "g.json": (lines("lines in json"), ["lines in json"]),
    "h.json.gz": (gzip.compress(lines("packed")), ["packed"]),
    "i.jsonl.GZ": (gzip.compress(lines("packed in capitals")), ["packed in capitals"]),
    "j.txt.gz": (gzip.compress(b"packed text"), ["packed text"]),
    "blank.jsonl": (b"\n\n", []),
    "packed-nothing.jsonl.gz": (gzip.compress(b""), []),
    "sub/deep/k.txt": (b"below", ["below"]),
    "settings.json": (b'{\n "a": 1\n}\n', "of kind .json without a document a line"),
    "list.json": (b"[1, 2]\n", "of kind .json without a document a line"),
    "l.md": (b"# a title", "of kind .md"),
    "m.csv": (b"a,b\n", "of kind .csv"),
    "n.tar.gz": (b"\x1f\x8b", "of kind .gz"),
    "o.txt.bz2": (b"BZh", "of kind .bz2"),
    "README": (b"text", "without a suffix"),
    "p.bin": (bytes(range(256)), "of kind .bin"),
    "empty.txt": (b"", "empty"),
    "empty.jsonl": (b"", "empty"),
    "._a.txt": (b"\x00\x05\x16\x07", "hidden"),
    ".git/config.txt": (b"x", "hidden"),
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    for name, (content, _) in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "linked.txt").write_text("linked file")
    (root / "q.txt").symlink_to(tmp_path / "elsewhere" / "linked.txt")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    (root / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(root / "pipe.txt")
    return root


def test_the_account_of_a_folder_is_what_was_read(folder, tmp_path, capsys):
    assert main(["prepare", str(folder), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    passed = {m[2]: m[3].split(", ") for m in re.finditer(r"passed over ([\d,]+) (.*?): (.*)\n", said)}
    assert all(int(m[1]) == len(m[3].split(", ")) for m in re.finditer(r"passed over (\d+) (.*?): (.*)\n", said))
    wanted: dict[str, list[str]] = {}
    for name, (_, what) in FILES.items():
        if isinstance(what, str):
            wanted.setdefault(what, []).append(".git/" if name.startswith(".git/") else name)
    wanted["linked (a folder; give it by itself)"] = ["linked/"]
    wanted["linked (to nothing)"] = ["broken.txt", "loop.txt"]
    wanted["not plain files"] = ["pipe.txt"]
    assert {why: sorted(names) for why, names in passed.items()} == {why: sorted(n) for why, n in wanted.items()}
    read = {name: what for name, (_, what) in FILES.items() if isinstance(what, list)} | {"q.txt": ["linked file"]}
    assert f"from {len(read)} files" in said
    barren = [str(folder / name) for name, texts in read.items() if not texts]
    assert sorted(re.search(r"without a document: (.*)\n", said)[1].split(", ")) == sorted(barren)
    data = open_dataset(str(tmp_path / "out"))
    files = data.files
    documents = [
        data.tokenizer.decode(files.tokens[a : b - 1])
        for a, b in zip(files.boundaries[:-1], files.boundaries[1:], strict=True)
    ]
    assert sorted(documents) == sorted(text for texts in read.values() for text in texts)
    # All that is there is in one of the two.
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}
    told = {name.rstrip("/") for names in passed.values() for name in names}
    assert there - {n for n in there if n.startswith(".git/")} == (told | read.keys()) - {".git"}


def test_many_names_are_cut_and_counted(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.pdf").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    told = []
    assert len(find_sources(None, [str(tmp_path)], told.append)) == 1
    assert told == [
        f"{tmp_path}: passed over 30 of kind .pdf: {', '.join(f'{i:02}.pdf' for i in range(NAMES_TOLD))} and 22 more"
    ]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz", ".jsonl.zst", ".json.gz"])
def test_an_empty_compressed_file_is_a_cut_one(suffix, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"a{suffix}").write_bytes(b"")
    (tmp_path / "c" / "b.txt").write_text("text")
    for source in (tmp_path / "c", tmp_path / "c" / f"a{suffix}"):
        assert main(["prepare", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == 3
        assert "it is empty, which no compressed file is; was it cut off?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_names_in_any_case_have_one_kind():
    for name in ("a.txt", "A.TXT", "a.Txt.gz", "x.jsonl.zst", "x.NDJSON", "p.PARQUET"):
        assert kind_of(name) == kind_of(name.lower()) is not None
    assert kind_of("a.parquet.gz") is kind_of("gz") is kind_of("a.gz") is kind_of("txt") is None


def test_text_of_one_document_of_any_length_is_read_in_parts_and_its_mark_is_left_out(tmp_path):
    from megaresnorm.data.corpus import PIECE_CHARACTERS, read_documents

    text = "äöü line of text\n" * (PIECE_CHARACTERS // 8)
    for name, content in (("a.txt", b"\xef\xbb\xbf" + text.encode()), ("b.txt.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(content)
        (source,) = find_sources(None, [str(tmp_path / name)])
        assert list(read_documents(source, "text")) == [text]
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    (source,) = find_sources(None, [str(tmp_path / "c.txt")])
    assert list(read_documents(source, "text")) == []


def test_a_source_that_was_rewritten_at_the_same_size_and_time_is_another_one(tmp_path, capsys):
    path = tmp_path / "t.txt"
    path.write_text("first text")
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    command = ["prepare", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 0 and main(command) == 0 and "reused" in capsys.readouterr().out
    os.utime(path)  # touched, and the same text
    assert main(command) == 0 and "reused" in capsys.readouterr().out
    path.write_text("other text")
    os.utime(path, ns=times)
    assert main(command) == 3 and "made from other files or settings" in capsys.readouterr().err


def test_a_file_is_read_once_and_that_is_told(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.txt").write_text("text")
    (tmp_path / "c" / "b.txt").symlink_to("a.txt")
    sources = [str(tmp_path / "c"), str(tmp_path / "c" / "a.txt")]
    told = []
    assert [one.name for one in find_sources(None, sources, told.append)] == [str(tmp_path / "c" / "a.txt")]
    assert [line.split(": ", 1)[1] for line in told] == [
        f"passed over 1 that were read already: {tmp_path / 'c' / 'b.txt'}",
        f"passed over 1 that were read already: {tmp_path / 'c' / 'a.txt'}",
    ]


def test_what_is_not_part_of_a_data_set_is_never_removed(tmp_path, capsys):
    (tmp_path / "t.txt").write_text("text")
    out = tmp_path / "out"
    command = ["prepare", str(tmp_path / "t.txt"), "--out", str(out), "--workers", "1"]
    assert main(command) == 0
    (out / "mine.txt").write_text("notes")
    assert main([*command, "--overwrite"]) == 3
    assert "mine.txt is not part of a data set, and would be lost; move it first" in capsys.readouterr().err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("notes")
    command[command.index(str(out))] = str(tmp_path / "notes")
    for more in ([], ["--overwrite"]):  # one piece of advice for both
        assert main([*command, *more]) == 3
        assert "exists and is not a data set, which nothing replaces; use another --out" in capsys.readouterr().err
    assert (out / "mine.txt").exists() and (tmp_path / "notes" / "mine.txt").exists()
