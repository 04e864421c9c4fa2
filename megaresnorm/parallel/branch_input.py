"""The input of a branch, and the collectives that gradients pass through.

A branch reads whole rows, which a collective makes from this rank's part of the stream. Each collective has its
transpose named and is an autograd node that holds no parameters; only a column-parallel linear (parallel/linear.py)
starts a transpose within its own node. On an axis of one rank each returns its input.

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
    """A collective that is linear in its input.

    Attributes:
        apply: this rank's part -> whole rows.
        start_transpose: gradient of whole rows -> that of this rank's part. It may overwrite what it is given.
    """

    apply: Callable[[Tensor, Axis], Tensor]
    start_transpose: Callable[[Tensor, Axis], Pending]


# [T, D] as it is, for a computation whose gradients are partial sums. Transpose: an all-reduce.
COPY = Collective(_same, start_all_reduce)
# [T/p, D] -> [T, D], an all-gather. Transpose: a reduce-scatter by rows.
GATHER_ROWS = Collective(_rows_gathered, _start_scattering_rows)
# [T, D/p] -> [T, D], an all-gather. Transpose: a reduce-scatter by columns.
GATHER_COLUMNS = Collective(_columns_gathered, _start_scattering_columns)


class Gathered(NamedTuple):
    """Whole rows that a collective has made from this rank's part.

    The two are kept apart so that a linear can start the transpose on its input's gradient and compute its weight's
    gradient meanwhile (parallel/linear.py). Anything else reads ``whole_rows``.

    Attributes:
        whole: [T, D], without a gradient.
        mine: this rank's part, to which the gradient goes.
    """

    whole: Tensor
    mine: Tensor
    collective: Collective
    axis: Axis

    @classmethod
    def of(cls, mine: Tensor, collective: Collective, axis: Axis) -> "Gathered":
        """Apply the collective to this rank's part.

        Communication:
            One all-gather of ``mine``; none for ``COPY``. In backward the reader of the rows starts the transpose: one
            reduce-scatter of [T, D], or for ``COPY`` one all-reduce of it.
        """
        return cls(collective.apply(mine.detach(), axis), mine, collective, axis)


BranchInput = Tensor | Gathered


def whole_rows(u: BranchInput) -> Tensor:
    """A branch's input as one tensor [T, D], whose gradient is sent back when it is known.

    Communication:
        Nothing in forward; in backward, for a ``Gathered``, one reduce-scatter or all-reduce of [T, D].
    """
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
    """The sum of all ranks' x. The transpose leaves the gradient as it is.

    Communication:
        One all-reduce of x; nothing in backward.
    """
    return x if axis.size == 1 else _Transposed.apply(x, axis, _summed, _same)


def scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's rows of their sum, [T/p, D].

    Communication:
        One reduce-scatter of [T, D]; in backward one all-gather of [T/p, D].
    """
    if axis.size == 1:
        return x
    return _Transposed.apply(x, axis, lambda x, axis: _start_scattering_rows(x, axis)(), _rows_gathered)


def scatter_columns(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's columns of their sum, [T, D/p].

    Communication:
        One reduce-scatter of [T, D]; in backward one all-gather of [T, D/p].
    """
    if axis.size == 1:
        return x
    return _Transposed.apply(x, axis, lambda x, axis: _start_scattering_columns(x, axis)(), _columns_gathered)


def split_gradient(x: Tensor, axis: Axis) -> Tensor:
    """x as it is, where every rank will have the same gradient. The transpose divides it by p; nothing is sent."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _same, lambda dx, axis: dx / axis.size)
