"""Collectives over an axis. On an axis of one rank each returns its input; gradients do not pass (see branch_input.py).

A function ``start_...`` begins one and returns what waits for its result; on an axis one is under way at a time.
Messages are counted as the tensors that each rank gives; transport.py has how they are sent.

T tokens   D columns   p ranks of the axis
"""

from torch import Tensor

from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.transport import Pending


def all_reduce(x: Tensor, axis: Axis, *, overwrite: bool = True) -> Tensor:
    """The sum over the axis, the same bits on every rank. Collective.

    Args:
        overwrite: whether x may be used for the sum. Use the result in either case.

    Communication:
        One all-reduce of x.
    """
    return start_all_reduce(x, axis, overwrite=overwrite)()


def start_all_reduce(x: Tensor, axis: Axis, *, overwrite: bool = True) -> Pending:
    """Begin an ``all_reduce``.

    Communication:
        One all-reduce of x.
    """
    return (lambda: x) if axis.transport is None else axis.transport.start_all_reduce(x, overwrite=overwrite)


def all_gather_blocks(x: Tensor, axis: Axis) -> Tensor:
    """Every rank's x, as [p, *x.shape]. Collective.

    Communication:
        One all-gather of x.
    """
    return start_all_gather(x, axis)()


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    """Begin an ``all_gather_blocks``.

    Communication:
        One all-gather of x.
    """
    return (lambda: x.unsqueeze(0)) if axis.transport is None else axis.transport.start_all_gather(x)


def largest(x: Tensor, axis: Axis) -> Tensor:
    """The largest over the axis of every element of x; NaN where a rank has NaN. Collective.

    Communication:
        One all-gather of x, which is small.
    """
    return x if axis.size == 1 else all_gather_blocks(x, axis).amax(0)


def reduce_scatter_blocks(x_p: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis of this rank's block of x [p, ...]. Collective.

    Communication:
        One reduce-scatter of all p blocks.
    """
    return start_reduce_scatter(x_p, axis)()


def start_reduce_scatter(x_p: Tensor, axis: Axis) -> Pending:
    """Begin a ``reduce_scatter_blocks``.

    Communication:
        One reduce-scatter of all p blocks.
    """
    return (lambda: x_p.squeeze(0)) if axis.transport is None else axis.transport.start_reduce_scatter(x_p)


def columns_to_blocks(x_TD: Tensor, p: int) -> Tensor:
    """[T, D] -> [p, T, D/p], contiguous."""
    return x_TD.view(x_TD.shape[0], p, -1).transpose(0, 1).contiguous()


def blocks_to_columns(x_pTd: Tensor) -> Tensor:
    """[p, T, D/p] -> [T, D], contiguous."""
    return x_pTd.transpose(0, 1).flatten(1)
