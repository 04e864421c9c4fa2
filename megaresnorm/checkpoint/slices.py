"""The slices of whole tensors that lie in files, and how they lie to each other."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megaresnorm.errors import DamagedError
from megaresnorm.parallel.sharding import Box

MAX_BESIDE = 1024  # slices of the same rows: of tensor-parallel ranks, and of ranks of dp whose flat slices share one


class FileSlice(NamedTuple):
    """Rows of a tensor in a file, from ``row`` on, that are the slice ``box`` of the whole tensor.

    If the tensor in the file is flat while the whole one is not, ``row`` is the first of the slice's elements.
    """

    file: str
    row: int
    box: Box
    flat: bool = False


def beside_each_other(slices: Sequence[FileSlice]) -> Iterator[tuple[FileSlice, FileSlice]]:
    """Pairs of slices with rows in common.

    Args:
        slices: in the order of their boxes.

    Raises:
        DamagedError: they are more than ranks could have made.
    """
    for i, one in enumerate(slices):
        for beside, other in enumerate(slices[i + 1 :]):
            if other.box[0][0] >= one.box[0][1]:
                break
            if beside == MAX_BESIDE:
                raise DamagedError(f"{one.file}: over {MAX_BESIDE} slices of the same rows")
            yield one, other


def overlap(one: Box, other: Box) -> Box | None:
    """What two boxes have in common; None where that is nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(a < b for a, b in common) else None
