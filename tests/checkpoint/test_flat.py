"""Flat slices, as ZeRO's partitions are: consecutive elements, which begin and end within rows."""

import json
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaresnorm.checkpoint import reader
from megaresnorm.checkpoint.format import MANIFEST, TensorSlices
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.writer import save_checkpoint, write_tensors
from megaresnorm.errors import DamagedError
from megaresnorm.parallel.sharding import Box, flat_boxes

SHAPE = (7, 3, 4)
WHOLE = torch.arange(prod(SHAPE), dtype=torch.float32).view(SHAPE)
# What two tensor-parallel ranks have of two logical parts.
HELD: list[Box] = [((1, 4), (0, 3), (0, 4)), ((5, 7), (0, 3), (0, 4))]
OTHERS: list[Box] = [((0, 1), (0, 3), (0, 4)), ((4, 5), (0, 3), (0, 4))]


def at(box: Box) -> Tensor:
    return WHOLE[tuple(slice(*bounds) for bounds in box)]


def flat(held: list[Box], first: int, last: int) -> TensorSlices:
    elements = torch.cat([at(box).flatten() for box in held])[first:last].clone()
    boxes = tuple(flat_boxes(held, first, last - first))
    return TensorSlices(SHAPE, torch.float32, elements, boxes, owned=True)


def test_flat_boxes_have_every_element_in_its_order():
    numbers = torch.cat([at(box).flatten() for box in HELD])
    for first in range(0, 60, 5):
        for last in range(first, 61, 3):
            found = [at(box).flatten() for box in flat_boxes(HELD, first, last - first)]
            assert torch.equal(torch.cat([numbers[:0], *found]), numbers[first:last]), (first, last)


def write(folder: Path, pieces: list[TensorSlices]) -> Path:
    """A checkpoint of one tensor, of which each rank has written one piece."""
    path = save_checkpoint(folder, 1, {"weights": {"t": pieces[0]}}, {})
    manifest = json.loads((path / MANIFEST).read_text())
    for rank, piece in enumerate(pieces[1:], start=1):
        name = f"weights-{rank:05d}-00001.safetensors"
        manifest["files"][name] = write_tensors(path / name, [("t", piece)])
    (path / MANIFEST).write_bytes(encode_manifest(manifest))
    return path


def test_a_tensor_in_flat_pieces_is_read_like_any_other(tmp_path, monkeypatch):
    """Whole, in boxes, in chunks, and into place, by rows and flat; pieces end within rows and parts."""
    pieces = [flat(HELD, a, b) for a, b in pairwise([0, 1, 18, 43, 60])]
    checkpoint = Checkpoint(write(tmp_path, [*pieces, flat(OTHERS, 0, 5), flat(OTHERS, 5, 24)]))
    assert torch.equal(checkpoint.read("weights", "t"), WHOLE)
    for box in (((2, 5), (1, 3), (0, 2)), ((0, 1), (0, 1), (3, 4)), ((6, 7), (0, 3), (0, 4))):
        assert torch.equal(checkpoint.read_box("weights", "t", box), at(box))
    rows = TensorSlices(SHAPE, torch.float32, torch.zeros(3, 3, 4), (((2, 5), (0, 3), (0, 4)),))
    part = flat(HELD, 7, 44)
    wanted = part.local.clone()
    part.local.zero_()
    checkpoint.load("weights", {"t": rows})
    checkpoint.load("weights", {"t": part})
    assert torch.equal(rows.local, WHOLE[2:5]) and torch.equal(part.local, wanted)
    monkeypatch.setattr(reader, "CHUNK_ELEMENTS", 10)
    chunks = [chunk.flatten() for chunk in checkpoint.chunks("weights", "t")]
    assert sorted(torch.cat(chunks).tolist()) == WHOLE.flatten().tolist() and max(map(len, chunks)) <= 10


@pytest.mark.parametrize(
    ("last", "says"),
    [(flat(OTHERS, 4, 24), "overlaps"), (flat(OTHERS, 6, 24), "not complete")],
    ids=["an element twice", "an element that is nowhere"],
)
def test_flat_pieces_that_do_not_make_a_whole_are_refused(tmp_path, last, says):
    with pytest.raises(DamagedError, match=says):
        Checkpoint(write(tmp_path, [flat(HELD, 0, 60), flat(OTHERS, 0, 5), last]))


def test_a_flat_tensor_of_fewer_elements_than_its_slices_is_refused(tmp_path):
    short = flat(OTHERS, 0, 24)
    short = TensorSlices(SHAPE, torch.float32, short.local[:-1].clone(), short.boxes, owned=True)
    with pytest.raises(DamagedError, match=r"has slices of 24 elements"):
        Checkpoint(write(tmp_path, [flat(HELD, 0, 60), short]))
