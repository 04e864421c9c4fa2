"""Which part of a whole tensor a rank has, and how parts make up the whole again.

A tensor-parallel rank has its share of every part of a fused matrix (of q, of k and of v), or of the columns. Of that
share a rank of dp_shard has consecutive rows, as FSDP2 shards them, or under ZeRO a rank of dp consecutive elements.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.mesh import Axis

Box = tuple[tuple[int, int], ...]  # a slice of a whole tensor: (start, stop) in every dim


def shard(whole: Tensor, split: int | None, part_sizes: Sequence[int], axis: Axis) -> Tensor:
    """This rank's share, a copy where the tensor is sharded.

    Args:
        split: the dim in which it is sharded; None: each rank has all of it.
        part_sizes: rows of the parts along dim 0, of each of which a rank has its share.
    """
    if split is None or axis.size == 1:
        return whole
    if split > 0:
        return whole.chunk(axis.size, dim=split)[axis.rank].clone(memory_format=torch.contiguous_format)
    return torch.cat([part.chunk(axis.size)[axis.rank] for part in whole.split(list(part_sizes))])


def unshard(share: Tensor, split: int | None, part_sizes: Sequence[int], axis: Axis) -> Tensor:
    """The whole tensor from every rank's ``shard``, whose arguments these are. Collective.

    Communication:
        One all-gather of the share; none where the tensor is not sharded.
    """
    if split is None or axis.size == 1:
        return share
    shares = all_gather_blocks(share, axis)
    if split > 0:
        return torch.cat(tuple(shares), dim=split)
    sizes = [size // axis.size for size in part_sizes]
    parts = zip(*(one.split(sizes) for one in shares), strict=True)
    return torch.cat([piece for part in parts for piece in part])


def row_chunk(tensor: Tensor, axis: Axis) -> Tensor:
    """This rank's rows of a tensor that FSDP2 shards over ``axis``.

    They are split as by torch.chunk, so that the last ranks may have none.
    """
    chunks = tensor.chunk(axis.size)
    return chunks[axis.rank] if axis.rank < len(chunks) else tensor[:0]


def boxes(shape: Sequence[int], split: int | None, part_sizes: Sequence[int], tp: Axis, dp_shard: Axis) -> list[Box]:
    """Bounds in the whole tensor of the rows that a rank has after ``shard`` and ``row_chunk``, in their order.

    >>> rank_1_of_2 = Axis("tp", 2, 1)
    >>> boxes((8, 4), 0, [4, 2, 2], rank_1_of_2, Axis("dp_shard"))
    [((2, 4), (0, 4)), ((5, 6), (0, 4)), ((7, 8), (0, 4))]
    """
    runs, rest = [(0, shape[0])], [(0, size) for size in shape[1:]]
    if split == 0:
        ends = list(accumulate(part_sizes))
        shares = [size // tp.size for size in part_sizes]
        starts = [end - size + tp.rank * share for end, size, share in zip(ends, part_sizes, shares, strict=True)]
        runs = [(start, start + share) for start, share in zip(starts, shares, strict=True)]
    elif split is not None:
        width = shape[split] // tp.size
        rest[split - 1] = (tp.rank * width, (tp.rank + 1) * width)
    chunk = -(-sum(stop - start for start, stop in runs) // dp_shard.size)
    first = dp_shard.rank * chunk
    found, position = list[Box](), 0  # position: of a run's first row among the rows of tp
    for start, stop in runs:
        low, high = max(first - position, 0), min(first + chunk - position, stop - start)
        if low < high:
            found.append(((start + low, start + high), *rest))
        position += stop - start
    return found


def flat_boxes(held: Sequence[Box], first: int, count: int) -> list[Box]:
    """Bounds in the whole tensor of ``count`` elements from ``first`` on of the slices ``held``, row by row.

    >>> flat_boxes([((4, 7), (0, 4))], 2, 7)
    [((4, 5), (2, 4)), ((5, 6), (0, 4)), ((6, 7), (0, 1))]
    """
    found, start = list[Box](), 0
    for box in held:
        size = prod(stop - begin for begin, stop in box)
        found += _part_of_box(box, max(first - start, 0), min(first + count - start, size))
        start += size
    return found


def _part_of_box(box: Box, low: int, high: int) -> list[Box]:
    """Boxes that together have the elements ``low`` to ``high`` of one, in their order."""
    if low >= high:
        return []
    (start, _), *rest = box
    width = prod(stop - begin for begin, stop in rest)
    first, last = -(-low // width), high // width  # whole rows
    if first > last:  # within one row
        return _part_of_row(box, last, low - last * width, high - last * width)
    found = _part_of_row(box, first - 1, low - (first - 1) * width, width) if low < first * width else []
    if first < last:
        found.append(((start + first, start + last), *rest))
    return found + _part_of_row(box, last, 0, high - last * width)


def _part_of_row(box: Box, row: int, low: int, high: int) -> list[Box]:
    (start, _), *rest = box
    return [((start + row, start + row + 1), *inner) for inner in _part_of_box(tuple(rest), low, high)]


def from_row_chunks(chunk: Tensor, shape: Sequence[int], axis: Axis) -> Tensor:
    """The whole tensor from every rank's ``row_chunk``. Collective.

    Args:
        shape: of the whole tensor.

    Communication:
        One all-gather of the rows of a rank, padded to those of the first.
    """
    if axis.size == 1:
        return chunk
    rows = -(-shape[0] // axis.size)
    padded = chunk.new_zeros((rows, *shape[1:]))
    padded[: chunk.shape[0]] = chunk
    return all_gather_blocks(padded, axis).flatten(0, 1)[: shape[0]]


def broadcast(tensor: Tensor, source: int, axis: Axis) -> Tensor:
    """Write the tensor of the rank ``source`` of the axis into ``tensor``, and return it. Collective.

    Communication:
        One broadcast of the tensor.
    """
    if axis.group is not None:
        dist.broadcast(tensor, group=axis.group, group_src=source)
    return tensor
