"""What a branch reads: whole rows that a collective has made of this rank's part, and the collectives that gradients pass through.

Each collective has its transpose named, and is an autograd node without parameters in it; only a column-parallel linear
(parallel/linear.py) starts one within its own. On an axis of one rank each returns its input.

T tokens   D columns   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.parallel.collectives import (
    all_gather_blocks,
    all_reduce,
    blocks_to_columns,
    columns_to_blocks,
    start_all_reduce,
    start_reduce_scatter,
)
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.transport import Pending


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _summed(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x, axis, overwrite=False)


def _rows_gathered(x: Tensor, axis: Axis) -> Tensor:
    return all_gather_blocks(x, axis).flatten(0, 1)


def _columns_gathered(x: Tensor, axis: Axis) -> Tensor:
    return blocks_to_columns(all_gather_blocks(x, axis))


def _start_scattering_rows(x: Tensor, axis: Axis) -> Pending:
    return start_reduce_scatter(x.view(axis.size, -1, *x.shape[1:]), axis)


def _start_scattering_columns(x: Tensor, axis: Axis) -> Pending:
    return start_reduce_scatter(columns_to_blocks(x, axis.size), axis)


class Collective(NamedTuple):
    """A collective that is linear in its input, and the start of its transpose, which may overwrite what it is given."""

    apply: Callable[[Tensor, Axis], Tensor]
    start_transpose: Callable[[Tensor, Axis], Pending]


# x as it is, for a computation whose gradients are partial sums. Transpose: all-reduce.
COPY = Collective(_same, start_all_reduce)
# [T/p, D] -> [T, D]. Transpose: reduce-scatter by rows.
GATHER_ROWS = Collective(_rows_gathered, _start_scattering_rows)
# [T, D/p] -> [T, D]. Transpose: reduce-scatter by columns.
GATHER_COLUMNS = Collective(_columns_gathered, _start_scattering_columns)


class Gathered(NamedTuple):
    """What a collective has made of ``mine``. The two are kept apart, so that a linear can start the transpose on its input's
    gradient and compute its weight's meanwhile (parallel/linear.py); anything else reads ``whole_rows``.

    whole: without a gradient.   mine: what the gradient goes to.
    """

    whole: Tensor
    mine: Tensor
    collective: Collective
    axis: Axis

    @classmethod
    def of(cls, mine: Tensor, collective: Collective, axis: Axis) -> "Gathered":
        return cls(collective.apply(mine.detach(), axis), mine, collective, axis)


BranchInput = Tensor | Gathered


def whole_rows(u: BranchInput) -> Tensor:
    """A branch's input as one tensor, whose gradient is sent back when it is known."""
    if isinstance(u, Tensor):
        return u
    whole, start = u.whole, u.collective.start_transpose
    return _Transposed.apply(
        u.mine, u.axis, lambda x, axis: whole.view_as(whole), lambda dx, axis: start(dx.clone(), axis)()
    )


class _Transposed(torch.autograd.Function):
    """A collective that is linear in its input, and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, apply: Callable, transpose: Callable) -> Tensor:
        ctx.axis, ctx.transpose = axis, transpose
        return apply(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grads[0], ctx.axis), None, None, None


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' x. Transpose: the gradient as it is."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _summed, _same)


def scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's rows of their sum, [T/p, D]. Transpose: an all-gather of rows."""
    if axis.size == 1:
        return x
    return _Transposed.apply(x, axis, lambda x, axis: _start_scattering_rows(x, axis)(), _rows_gathered)


def scatter_columns(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's columns of their sum, [T, D/p]. Transpose: an all-gather of columns."""
    if axis.size == 1:
        return x
    return _Transposed.apply(x, axis, lambda x, axis: _start_scattering_columns(x, axis)(), _columns_gathered)


def share(x: Tensor, axis: Axis) -> Tensor:
    """x as it is, where every rank will have the same gradient: its p-th part goes back. Transpose: division by p."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _same, lambda dx, axis: dx / axis.size)
