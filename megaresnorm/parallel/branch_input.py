"""The input of a branch, and the collectives that gradients pass through.

A branch reads whole rows, which a collective makes of this rank's part of the stream. Each collective has its transpose
named. The functions at the end are autograd nodes that hold no parameters; only the linear that reads a ``BranchInput``
(parallel/linear.py) starts collectives within its own node: the gather in forward, and in backward the gather once
more, behind the gradient of its input, and the transpose, behind the gradient of its weight.

T tokens   D columns   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.fp8.formats import Fp8, Rows, dequantize, rows_of, tensors_of
from megaresnorm.parallel.collectives import (
    all_gather_blocks,
    all_reduce,
    blocks_to_columns,
    columns_to_blocks,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.transport import Pending

PendingRows = Callable[[], Rows]  # waits for whole rows


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _summed(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x, axis, overwrite=False)


def _rows_gathered(x: Tensor, axis: Axis) -> Tensor:
    return all_gather_blocks(x, axis).flatten(0, 1)


def _columns_gathered(x: Tensor, axis: Axis) -> Tensor:
    return blocks_to_columns(all_gather_blocks(x, axis))


def _start_gathering_rows(sources: tuple[Tensor, ...], axis: Axis) -> Pending:
    arriving = start_all_gather(sources[0], axis)
    return lambda: arriving().flatten(0, 1)


def _start_gathering_columns(sources: tuple[Tensor, ...], axis: Axis) -> Pending:
    arriving = start_all_gather(sources[0], axis)
    return lambda: blocks_to_columns(arriving())


def _start_scattering_rows(x: Tensor, axis: Axis) -> Pending:
    return start_reduce_scatter(x.view(axis.size, -1, *x.shape[1:]), axis)


def _start_scattering_columns(x: Tensor, axis: Axis) -> Pending:
    return start_reduce_scatter(columns_to_blocks(x, axis.size), axis)


class Collective(NamedTuple):
    """How whole rows come about, and where their gradient goes.

    Attributes:
        start: (sources, axis) -> what waits for the whole rows; it may be called again in backward.
        start_transpose: (gradient of whole rows, axis) -> what waits for that of this rank's part. It may overwrite
            what it is given. None: the gradient of whole rows is passed on as it is.
    """

    start: Callable[[tuple[Tensor, ...], Axis], PendingRows]
    start_transpose: Callable[[Tensor, Axis], Pending] | None


# [T, D] as it is, for a computation whose gradients are partial sums. Transpose: an all-reduce.
COPY = Collective(lambda sources, axis: lambda: sources[0], start_all_reduce)
# [T/p, D] -> [T, D], an all-gather. Transpose: a reduce-scatter by rows.
GATHER_ROWS = Collective(_start_gathering_rows, _start_scattering_rows)
# [T, D/p] -> [T, D], an all-gather. Transpose: a reduce-scatter by columns.
GATHER_COLUMNS = Collective(_start_gathering_columns, _start_scattering_columns)


class BranchInput(NamedTuple):
    """What a branch reads: whole rows [T, D], which a collective makes of this rank's part when they are read.

    One linear reads them. It keeps the sources for its backward pass, 1/p of the rows, and starts the collective again
    there; with ``keeps`` it keeps the rows. A reader before it, such as a token gate, hands on what it has read
    (``gathered``). With ``remake`` the sources are what this rank's part is made of, and it is made again as well.

    Attributes:
        local: what autograd sees: this rank's part, or whole rows that a node of its own has made. Where ``part`` is
            there it may have no values.
        collective: None where ``local`` is whole rows and their gradient is whole, too: on one rank.
        axis: the axis of the collective; None without one.
        sources: what the collective makes whole rows of, without gradients.
        keeps: whether a linear keeps whole rows (recompute.gathered: keep).
        rows: whole rows that have been made already, without a gradient.
        remake: sources -> this rank's part, the bits of ``part`` or ``local``; None: it is the source itself.
        part: this rank's part in FP8; None: it is ``local``.
    """

    local: Tensor
    collective: Collective | None = None
    axis: Axis | None = None
    sources: tuple[Tensor, ...] = ()
    keeps: bool = False
    rows: Rows | None = None
    remake: Callable[[tuple[Tensor, ...]], Rows] | None = None
    part: Fp8 | None = None

    def whole(self) -> Rows:
        """Whole rows [T, D] without a gradient, for a node that sends their gradient itself. Collective.

        Communication:
            One all-gather of the sources; none where the rows have been made, and for ``COPY``.
        """
        if self.rows is not None:
            return self.rows
        if self.collective is None or self.axis is None:
            return self.part or (self.local if self.remake is None else self.local.detach())
        part = tensors_of(self.part or self.local.detach())
        return self.collective.start(self.sources if self.remake is None else part, self.axis)()

    @property
    def is_local(self) -> bool:
        """Whether it is a tensor of this rank that a reader keeps as it is."""
        return self.collective is None and self.remake is None and self.part is None

    def restart(self) -> Callable[[tuple[Tensor, ...]], PendingRows]:
        """What begins to make whole rows of the sources alone, in backward. It keeps nothing of this input.

        Communication:
            Of what is returned, one all-gather; none for ``COPY`` and without a collective.
        """
        collective, axis, remake = self.collective, self.axis, self.remake
        form = None if self.part is None else self.part.form

        def start(sources: tuple[Tensor, ...]) -> PendingRows:
            part = sources if remake is None else tensors_of(remake(sources))
            if collective is None or axis is None:
                return lambda: rows_of(part, form)
            return collective.start(part, axis)

        return start

    def gathered(self) -> "BranchInput":
        """The same with its rows made, for several readers.

        Communication:
            As ``whole``.
        """
        return self if self.collective is None else self._replace(rows=self.whole())


def whole_rows(u: BranchInput) -> Tensor:
    """A branch's input as values [T, D], whose gradient is sent back when it is known.

    Communication:
        In forward that of ``BranchInput.whole``; in backward, where the gradient is sent, one reduce-scatter or
        all-reduce of [T, D].
    """
    start = None if u.collective is None else u.collective.start_transpose
    if start is None and u.part is None:
        return u.local
    whole = u.whole()
    if isinstance(whole, Fp8):
        whole = dequantize(whole, u.local.dtype)
    if start is None:
        return _Transposed.apply(u.local, u.axis, lambda x, axis: whole, lambda dx, axis: dx)
    return _Transposed.apply(
        u.local, u.axis, lambda x, axis: whole.view_as(whole), lambda dx, axis: start(dx.clone(), axis)()
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
