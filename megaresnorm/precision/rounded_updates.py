"""Weights that are stored in BF16 alone: each update is made in FP32, some elements at a time, and rounded at random.

Rounding to nearest would lose every update of less than half of a weight's last place, which is most of them at usual
learning rates. Stochastic rounding makes each with the probability that is its size, so that none is lost on average.
Its random bits are a hash of (seed, weight, update, row, column): a resumed run repeats them, and every parallel layout
rounds an element alike.

K weights   R rows   C columns
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.hashing import hash_elements, hash_number, numbered
from megaresnorm.kernels.rounding import rounded_at_random
from megaresnorm.parallel.sharding import Box

# Elements in FP32 at a time, each with about five other numbers of 4 bytes while its bits are made. On a CPU those stay
# in its caches (four times as many take a third longer); on a GPU, where they take some 200 MB, the kernels of a piece
# should run for longer than it takes to launch them.
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 23


class Place(NamedTuple):
    """Where a rank's share of a weight is in the whole one.

    Attributes:
        rows: runs of global row numbers, in the order of the share's rows.
        columns: the global column numbers.
    """

    rows: tuple[range, ...]
    columns: range

    @classmethod
    def of(cls, boxes: Sequence[Box]) -> "Place":
        """The place of the slices that ``parallel.sharding.boxes`` has found, which are of the same columns."""
        (columns,) = {box[1] for box in boxes}
        return cls(tuple(range(*box[0]) for box in boxes), range(*columns))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the share."""
        return sum(map(len, self.rows)), len(self.columns)


class Rounded(NamedTuple):
    """How a weight is rounded.

    Attributes:
        key: 64 random bits for the run and the weight.
    """

    key: int
    place: Place

    @classmethod
    def of(cls, seed: int, name: str, boxes: Sequence[Box]) -> "Rounded":
        """The rounding of a rank's share of a weight.

        Args:
            seed: of the run.
            name: global name of the weight.
            boxes: the slices of the whole weight that the rank has.
        """
        digest = blake2b(f"{seed}/{name}/rounding".encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little", signed=True), Place.of(boxes))


class Piece(NamedTuple):
    """Consecutive elements of a tensor that is updated: rows of a weight, or packed weights of one place.

    Attributes:
        at: which of the tensor's first dim.
        keys: [K] int64.
        rows_R: ``hash_number`` of the global numbers of the rows.
        columns_C: global numbers, int32.
    """

    at: slice
    keys: Tensor
    rows_R: Tensor
    columns_C: Tensor

    def store(self, x: Tensor, weights: Tensor, number: Tensor) -> None:
        """Round updated weights into their place.

        Args:
            x: FP32, of the shape of ``weights[at]``.
            weights: the tensor in BF16.
            number: ``hash_number`` of that of the update.
        """
        bits = hash_elements(self.rows_R, self.columns_C, numbered(self.keys, number))
        self._matrices(weights[self.at]).copy_(rounded_at_random(self._matrices(x), bits))

    def _matrices(self, tensor: Tensor) -> Tensor:
        """A view [K, R, C] without the padding between packed weights."""
        shape = len(self.keys), len(self.rows_R), len(self.columns_C)
        return tensor.view(shape[0], -1)[:, : shape[1] * shape[2]].view(shape)


def pieces_of_weight(rounded: Rounded, device: torch.device) -> list[Piece]:
    """Pieces of a weight that is updated by itself: some of its rows each."""
    rows, columns = _numbers(rounded.place, device)
    keys = torch.tensor([rounded.key], device=device)
    step = max(1, _piece(device) // len(columns))
    return [Piece(slice(i, i + step), keys, rows[i : i + step], columns) for i in range(0, len(rows), step)]


def pieces_of_packed(members: Sequence[Rounded], aligned: int, device: torch.device) -> Iterator[Piece]:
    """Pieces of a tensor [n] into which weights are packed: consecutive ones of the same place together.

    Args:
        members: in their order.
        aligned: each begins at a multiple of so many elements.
    """
    start = 0
    for place, same in groupby(members, key=lambda member: member.place):
        keys = torch.tensor([member.key for member in same], device=device)
        (num_rows, num_columns), (rows, columns) = place.shape, _numbers(place, device)
        size = -(-num_rows * num_columns // aligned) * aligned
        for some in keys.split(max(1, _piece(device) // size)):
            yield Piece(slice(start, start + len(some) * size), some, rows, columns)
            start += len(some) * size


def _numbers(place: Place, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.cat([torch.arange(run.start, run.stop, device=device) for run in place.rows])
    columns = torch.arange(place.columns.start, place.columns.stop, dtype=torch.int32, device=device)
    return hash_number(rows), columns


def _piece(device: torch.device) -> int:
    return CPU_PIECE if device.type == "cpu" else GPU_PIECE
