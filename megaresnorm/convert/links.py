"""Correspondence of a family's tensors and our parameters by rows, which are read in chunks in either direction."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megaresnorm.convert.family import Family
from megaresnorm.convert.rows import Selection
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.parallel.sharding import Box
from megaresnorm.recipe import ModelRecipe

BAND_BYTES = 1 << 26  # of the rows that are read together where some of their columns are wanted


class TensorSource(Protocol):
    """Tensors that are read in parts."""

    def read(self, name: str, box: Box) -> Tensor:
        """One slice of a tensor."""
        ...


@dataclass(frozen=True)
class Link:
    """Correspondence of one of their tensors and one of our parameters.

    Row i of theirs (column i, if it is transposed) is row ``rows[i]`` of ours times ``factor``, or zeros for -1.

    Attributes:
        shape: of theirs.
    """

    theirs: str
    ours: str
    rows: Selection
    shape: tuple[int, ...]
    transposed: bool
    factor: float = 1.0

    def their_rows(self, source: TensorSource, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of their tensor, computed from our parameters."""
        if self.transposed:
            assert isinstance(self.rows, range)
            return rescaled(columns(source, self.ours, self.rows, start, stop, self.shape[0]).t(), self.factor)
        return rescaled(gather(source, self.ours, self.rows[start:stop], self.shape[1:]), self.factor)

    def our_rows(self, source: TensorSource, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Numbers, and values in ``dtype``, of the rows ``start`` to ``stop`` of ours that their tensor has."""
        rows = torch.arange(self.rows.start, self.rows.stop) if isinstance(self.rows, range) else self.rows
        theirs = ((rows >= start) & (rows < stop)).nonzero().flatten()
        if len(theirs) == 0:
            return rows[:0], torch.empty(0, *((self.shape[0],) if self.transposed else self.shape[1:]), dtype=dtype)
        if self.transposed:
            first, last = int(theirs[0]), int(theirs[-1]) + 1
            value = columns(source, self.theirs, range(self.shape[0]), first, last, self.shape[1]).t()
        else:
            value = gather(source, self.theirs, theirs, self.shape[1:])
        return rows[theirs], rescaled(value.to(dtype), 1 / self.factor)


def columns(source: TensorSource, name: str, rows: range, start: int, stop: int, width: int) -> Tensor:
    """Columns ``start`` to ``stop`` of some rows of a tensor of ``width`` columns.

    A file's rows are mapped whole even where a part of each is read, so only a band of rows is read at a time.
    """
    step = max(1, BAND_BYTES // (8 * width))
    bands = [(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step)]
    return torch.cat([source.read(name, (band, (start, stop))) for band in bands])


def rescaled(value: Tensor, factor: float) -> Tensor:
    """``value`` times ``factor``, rounded once."""
    return value if factor == 1.0 else (value.double() * factor).to(value.dtype)


def gather(source: TensorSource, name: str, rows: Selection, rest: tuple[int, ...]) -> Tensor:
    """Rows of a tensor in the order of ``rows``, zeros for -1. Consecutive ones are read together."""
    whole = tuple((0, size) for size in rest)
    if isinstance(rows, range):
        return source.read(name, ((rows.start, rows.stop), *whole))
    wanted = torch.unique(rows[rows >= 0])
    if len(wanted) == 0:
        return torch.zeros(len(rows), *rest)
    ends = (wanted[1:] != wanted[:-1] + 1).nonzero().flatten() + 1
    runs = wanted.tensor_split(ends)
    read = torch.cat([source.read(name, ((int(run[0]), int(run[-1]) + 1), *whole)) for run in runs])
    found = read[torch.searchsorted(wanted, rows.clamp(min=0))]
    found[rows < 0] = 0
    return found


def links(
    family: Family,
    recipe: ModelRecipe,
    table: Mapping[str, ParameterSpec],
    factor: Callable[[str], float] = lambda name: 1.0,
) -> Iterator[Link]:
    """The links of all tensors of the family that have a counterpart in our model.

    Args:
        factor: of a parameter of ours by its name, as ``Match.factor``.

    Raises:
        AssertionError: a parameter of ours has no counterpart.
    """
    done, others = set(), renamed(family, recipe)
    for block in (None, *range(recipe.num_blocks)):
        for theirs, of in family.modules.items():
            if ("{" in theirs) == (block is None):
                continue
            their_module = theirs_of(theirs, block)
            their_module = others.get(their_module, their_module)
            for suffix in (".weight", ".bias", ""):  # a gate is a parameter by itself
                stem, _, names = of.name.format(block).rpartition(".")
                there = [f"{stem}.{name}{suffix}".lstrip(".") for name in names.split("|")]
                ours = next((name for name in there if name in table), "")
                if not ours:
                    continue
                spec = table[ours]
                rows = of.rows(recipe, spec)
                transposed = of.transposed and len(spec.shape) == 2
                shape = (len(rows), *spec.shape[1:])
                shape = shape[::-1] if transposed else shape
                done.add(ours)
                yield Link(f"{their_module}{suffix}".replace("_.", "_"), ours, rows, shape, transposed, factor(ours))
    missing = sorted(table.keys() - done)
    assert not missing, f"{family.name} has no place for {missing[0]}"


def constants(family: Family, recipe: ModelRecipe) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and ``must_be_zero`` of every tensor that our model has no place for."""
    for name, constant in family.constants.items():
        if constant.untied and recipe.tied_embeddings:
            continue
        shape = tuple(int(size) if size.isdigit() else getattr(recipe, size) for size in constant.shape)
        for block in range(recipe.num_blocks) if "{" in name else (None,):
            yield theirs_of(name, block), shape, constant.must_be_zero


def renamed(family: Family, recipe: ModelRecipe) -> dict[str, str]:
    """Exceptions to the name pattern of the modules: name by the pattern -> actual name."""
    return {before.format(num_blocks=recipe.num_blocks): after for before, after in family.renamed.items()}


def theirs_of(name: str, block: int | None) -> str:
    """A name of a family's table, with the number of the block filled in."""
    return name if block is None else name.format(block, next=block + 1)


def bands_of_rows(shape: tuple[int, ...], itemsize: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    """First row and end of consecutive chunks of about ``chunk_bytes`` each."""
    row = torch.Size(shape[1:]).numel() * itemsize
    step = max(1, chunk_bytes // row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
