"""What folding a constant into weights has rounded away, kept beside the model so that the way back is bit for bit.

A folded weight y is our w times a factor, rounded. y divided by the factor is w again but for a unit or two in the last place;
this difference, one byte an element, is in a file of its own that Transformers does not look at.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import Entry
from megaresnorm.checkpoint.writer import encoded
from megaresnorm.convert.links import Source, links, row_chunks, scaled
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.plan import Plan

REMAINDER = "megaresnorm-remainder.safetensors"
_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}


def remainder_entries(native: NativeModel, chosen: Plan, chunk_bytes: int) -> Iterator[Entry]:
    """By our names, of every parameter that was folded."""
    assert chosen.fold is not None
    for link in links(chosen.family, chosen.recipe, native.table, chosen.fold.factor):
        if link.factor != 1.0:
            shape = native.table[link.ours].shape
            chunks = functools.partial(_remainders, native, link.ours, shape, link.factor, chunk_bytes)
            yield Entry(link.ours, torch.int8, shape, chunks)


def _remainders(native: Source, name: str, shape: tuple[int, ...], factor: float, chunk_bytes: int) -> Iterator[Tensor]:
    for start, stop in row_chunks(shape, 8, chunk_bytes):
        w = native.read(name, ((start, stop), *((0, size) for size in shape[1:])))
        whole = _WHOLE[w.dtype]
        difference = w.contiguous().view(whole) - scaled(scaled(w, factor), 1 / factor).contiguous().view(whole)
        assert difference.abs().max() < 128, f"{name} is further than rounding from what its folded form gives"
        yield difference.to(torch.int8)


def write_remainder(folder: Path, entries: Iterator[Entry]) -> None:
    with (folder / REMAINDER).open("xb") as file:
        for piece in encoded(list(entries), {}):
            file.write(piece)


def restored(value: Tensor, remainder: Tensor) -> Tensor:
    """w again, of what the folded weight divided by the factor is."""
    whole = _WHOLE[value.dtype]
    return (value.contiguous().view(whole) + remainder.to(whole)).view(value.dtype)
