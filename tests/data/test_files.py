"""Token files: written as Megatron writes them, and refused with file and place when they are damaged."""

import json
import shutil
import struct

import numpy as np
import pytest

from megaresnorm.cli import main
from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.indexed import HEADER, TokenFiles, TokenWriter, spread_chunks
from megaresnorm.data.training_data import open_data, resolve_vocab
from megaresnorm.errors import DataError
from megaresnorm.recipe import DataRecipe

HEAD = HEADER.size  # 34


def test_layout_is_megatrons_byte_for_byte(tmp_path):
    writer = TokenWriter(tmp_path / "t", np.uint16)
    writer.add(np.array([5, 6, 7, 8, 9]), [3, 2])
    writer.close()
    assert (tmp_path / "t.bin").read_bytes() == struct.pack("<5H", 5, 6, 7, 8, 9)
    expected = (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i", 3, 2) + struct.pack("<2q", 0, 6)
    )
    assert (tmp_path / "t.idx").read_bytes() == expected + struct.pack("<3q", 0, 1, 2)


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
@pytest.mark.parametrize("modes", [b"", b"\x00\x01\x00"])
def test_reads_every_integer_type_and_documents_of_several_sequences(code, dtype, modes, tmp_path):
    tokens = np.arange(1, 8).astype(dtype)
    (tmp_path / "t.bin").write_bytes(tokens.tobytes())
    lengths, size = np.array([2, 4, 1], "<i4"), tokens.itemsize
    index = HEADER.pack(b"MMIDIDX\x00\x00", 1, code, 3, 3) + lengths.tobytes()
    index += np.array([0, 2 * size, 6 * size], "<i8").tobytes() + np.array([0, 2, 3], "<i8").tobytes() + modes
    (tmp_path / "t.idx").write_bytes(index)
    files = TokenFiles(tmp_path / "t")
    assert files.tokens.tolist() == list(range(1, 8)) and files.boundaries.tolist() == [0, 6, 7]


def test_spread_chunks_cover_or_sample():
    assert spread_chunks(25, 100, 10) == [(0, 10), (10, 20), (20, 25)]
    sampled = spread_chunks(1000, 40, 10)
    assert len(sampled) == 4 and sampled[0] == (0, 10) and sampled[-1] == (990, 1000)


# The data set of the fixture: 40 documents. Offsets in tokens.idx: lengths at 34, pointers at 194, boundaries at 514.
LENGTHS, POINTERS, BOUNDARIES = HEAD, HEAD + 4 * 40, HEAD + 12 * 40


def patch(name, offset, data):
    def damage(folder):
        raw = bytearray((folder / name).read_bytes())
        at = offset if offset >= 0 else len(raw) + offset
        raw[at : at + len(data)] = data
        (folder / name).write_bytes(raw)

    return damage


def cut(name, size):
    def damage(folder):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[:size] if size >= 0 else raw[:size] or b"")

    return damage


def extend(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\x00")


def describe(**changes):
    def damage(folder):
        description = json.loads((folder / "dataset.json").read_text())
        for key, value in changes.items():
            if value is None:
                del description[key]
            else:
                description[key] = value
        (folder / "dataset.json").write_text(json.dumps(description))

    return damage


def redigest(folder):
    """What an attacker or a careless script would do: digests that fit the damaged files."""
    from megaresnorm.data.dataset import digests_of

    describe(files={n: digests_of(folder / n) for n in ("tokens.bin", "tokens.idx")})(folder)


def remove(name):
    return lambda folder: (folder / name).unlink()


def swap(folder):
    """The .bin of another data set."""
    raw = (folder / "tokens.bin").read_bytes()
    (folder / "tokens.bin").write_bytes(raw + raw[:10])


i4, i8 = (lambda v: struct.pack("<i", v)), (lambda v: struct.pack("<q", v))

# (damage, is the digest made to fit, what the line must contain)
DAMAGED = [
    (cut("tokens.idx", 0), True, ["tokens.idx", "ends at byte 0", "header of 34"]),
    (cut("tokens.idx", 20), True, ["tokens.idx", "ends at byte 20"]),
    (cut("tokens.idx", 33), True, ["tokens.idx", "ends at byte 33"]),
    (cut("tokens.idx", 34), True, ["tokens.idx", "has 34 bytes", "need 842"]),
    (cut("tokens.idx", -1), True, ["tokens.idx", "has 841 bytes", "need 842"]),
    (extend("tokens.idx"), True, ["tokens.idx", "has 843 bytes"]),
    (patch("tokens.idx", 0, b"X"), True, ["tokens.idx", "byte 0", "Megatron index"]),
    (patch("tokens.idx", 9, i8(2)), True, ["tokens.idx", "version 2 at byte 9"]),
    (patch("tokens.idx", 17, b"\x09"), True, ["tokens.idx", "type code 9 at byte 17"]),
    (patch("tokens.idx", 17, b"\x07"), True, ["tokens.idx", "sequence 1 is said to start at byte"]),
    (patch("tokens.idx", 17, b"\x04"), True, ["tokens.idx", f"byte {POINTERS + 8}", "sequence 1"]),
    (patch("tokens.idx", 18, i8(39)), True, ["tokens.idx", "39 sequences", "byte 18"]),
    (patch("tokens.idx", 18, i8(2**60)), True, ["tokens.idx", "announced at byte 18"]),
    (patch("tokens.idx", 26, i8(7)), True, ["tokens.idx", "7 boundaries"]),
    (patch("tokens.idx", LENGTHS + 12, i4(-1)), True,
     ["tokens.idx", f"byte {LENGTHS + 12}", "sequence 3 has length -1"]),
    (patch("tokens.idx", LENGTHS + 12, i4(5)), True, ["tokens.idx", f"byte {POINTERS + 32}", "sequence 4"]),
    (patch("tokens.idx", POINTERS, i8(2)), True, ["tokens.idx", f"byte {POINTERS}", "sequence 0"]),
    (patch("tokens.idx", POINTERS + 80, i8(-8)), True, ["tokens.idx", f"byte {POINTERS + 80}", "sequence 10"]),
    (patch("tokens.idx", BOUNDARIES, i8(1)), True, ["tokens.idx", f"byte {BOUNDARIES}", "must start with 0"]),
    (patch("tokens.idx", BOUNDARIES + 16, i8(0)), True,
     ["tokens.idx", f"byte {BOUNDARIES + 16}", "below the one before"]),
    (patch("tokens.idx", -8, i8(41)), True,
     ["tokens.idx", f"byte {BOUNDARIES + 320}", "ends at sequence 41, not at 40"]),
    (patch("tokens.idx", LENGTHS, b"\x01"), False, ["tokens.idx", "damaged between byte 0 and 842"]),
    (cut("tokens.bin", -1), False, ["tokens.bin", "was cut or replaced"]),
    (cut("tokens.bin", -2), True, ["tokens.bin", "do not belong together"]),
    (cut("tokens.bin", 0), True, ["tokens.bin", "has 0 bytes"]),
    (extend("tokens.bin"), True, ["tokens.bin", "do not belong together"]),
    (swap, False, ["tokens.bin", "was cut or replaced"]),
    (patch("tokens.bin", 1000, b"\x7f"), False, ["tokens.bin", "damaged between byte 0 and", "SHA-256"]),
    (remove("tokens.bin"), False, ["tokens.bin", "No such file"]),
    (remove("tokens.idx"), False, ["tokens.idx", "No such file"]),
    (remove("dataset.json"), False, ["dataset.json", "megaresnorm prepare"]),
    (lambda folder: (folder / "dataset.json").write_text("{"), False, ["dataset.json", "not JSON"]),
    (lambda folder: (folder / "dataset.json").write_text("[1]"), False, ["dataset.json", "not the description"]),
    (describe(format=2), False, ["dataset.json", "format 1"]),
    (describe(vocab_size=300), False, ["dataset.json", "vocab_size 300", "257"]),
    (describe(tokenizer={"kind": "words"}), False, ["dataset.json", "unknown tokenizer"]),
    (describe(tokenizer={"kind": "sentencepiece", "sha256": "0"}), False, ["tokenizer.model", "cannot be read"]),
    (describe(files=None), False, ["dataset.json", "not the description"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "fitting", "parts"), DAMAGED, ids=lambda v: str(v)[:50] if isinstance(v, list) else ""
)
def test_damaged_data_is_refused_before_step_0(damage, fitting, parts, byte_data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(byte_data, folder)
    damage(folder)
    if fitting:
        redigest(folder)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{dim: 16, num_blocks: 1, num_heads: 2, seq_len: 16}}\ndata: {{path: {folder}}}\n"
        f"train: {{output: {tmp_path / 'run'}, steps: 1}}\n"
    )
    assert main(["train", str(recipe)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(folder) in error
    for part in parts:
        assert part in error
    assert not (tmp_path / "run").exists()


def test_there_are_at_least_thirty_damaged_files():
    assert len(DAMAGED) >= 30


def test_bare_megatron_files_need_a_vocabulary_that_holds_their_tokens(tiny, byte_data):
    prefix = {"data": {"path": str(byte_data / "tokens")}}
    data = open_data(DataRecipe(path=str(byte_data / "tokens")))
    assert data.tokenizer is None
    with pytest.raises(Exception, match=r"model\.vocab_size is missing"):
        resolve_vocab(tiny(**prefix), data)
    assert resolve_vocab(tiny(**prefix, model={"vocab_size": 257}), data).model.vocab_size == 257
    with pytest.raises(DataError, match=r"tokens.bin: token 256 at byte \d+ is outside the vocabulary of 256"):
        resolve_vocab(tiny(**prefix, model={"vocab_size": 256}), data)


def test_missing_data_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match="megaresnorm prepare --out"):
        open_dataset(str(tmp_path / "nothing"))


def test_a_document_longer_than_a_sequence_can_be_is_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.data.indexed.MAX_SEQUENCE", 10)
    with TokenWriter(tmp_path / "t", np.uint16) as writer:
        writer.add(np.arange(8), [8], ends=False)
        writer.add(np.arange(8, 16), [8], ends=False)
        writer.add(np.arange(16, 20), [2, 2])
    files = TokenFiles(tmp_path / "t")
    assert files.boundaries.tolist() == [0, 18, 20] and np.diff(files.sequences).tolist() == [8, 10, 2]
    assert files.tokens.tolist() == list(range(20))


@pytest.mark.parametrize(("dtype", "token"), [(np.int32, -5), (np.int32, 2_000_000_000), (np.float32, 1.5)])
def test_damage_in_bare_files_is_seen_by_show_and_verify(dtype, token, tmp_path, capsys):
    with TokenWriter(tmp_path / "t", dtype) as writer:
        writer.add(np.array([1, 2, token, 3]), [4])
    for action in ("show", "verify"):
        assert main(["data", action, str(tmp_path / "t")]) == 3
        error = capsys.readouterr().err
        assert "is outside the vocabulary" in error and error.count("\n") == 1
