"""Collectives, and those that gradients pass through, each with its transpose named.

Every one is an autograd node without parameters in it. On an axis of one rank each returns its input.

T tokens   D columns   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.parallel.context import Axis

# Newer names of the same functions; torch 2.11 has the old ones alone.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, axis: Axis, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Sum over the axis, in place where x is contiguous."""
    if axis.group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, op, group=axis.group)
    return x


def all_gather_blocks(x: Tensor, axis: Axis) -> Tensor:
    """[p, *x.shape]: every rank's x."""
    if axis.group is None:
        return x.unsqueeze(0)
    out = x.new_empty((axis.size, *x.shape))
    all_gather_single(out.flatten(0, 1) if x.dim() else out, x.contiguous(), group=axis.group)
    return out


def reduce_scatter_blocks(x_p: Tensor, axis: Axis) -> Tensor:
    """Of blocks [p, ...], the sum over the axis of this rank's."""
    if axis.group is None:
        return x_p.squeeze(0)
    out = torch.empty_like(x_p[0])
    reduce_scatter_single(out, x_p.contiguous().flatten(0, 1), group=axis.group)
    return out


def columns_to_blocks(x_TD: Tensor, p: int) -> Tensor:
    """[T, D] -> [p, T, D/p], contiguous."""
    return x_TD.view(x_TD.shape[0], p, -1).transpose(0, 1).contiguous()


def blocks_to_columns(x_pTd: Tensor) -> Tensor:
    """[p, T, D/p] -> [T, D], contiguous."""
    return x_pTd.transpose(0, 1).flatten(1)


def _gather_rows(x: Tensor, axis: Axis) -> Tensor:
    return all_gather_blocks(x, axis).flatten(0, 1)


def _scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    return reduce_scatter_blocks(x.view(axis.size, -1, *x.shape[1:]), axis)


def _gather_columns(x: Tensor, axis: Axis) -> Tensor:
    return blocks_to_columns(all_gather_blocks(x, axis))


def _scatter_columns(x: Tensor, axis: Axis) -> Tensor:
    return reduce_scatter_blocks(columns_to_blocks(x, axis.size), axis)


class _Transposed(torch.autograd.Function):
    """A collective that is linear in its input, and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, apply: Callable, transpose: Callable) -> Tensor:
        ctx.axis, ctx.transpose = axis, transpose
        return apply(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grads[0], ctx.axis), None, None, None


def _same(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _summed(x: Tensor, axis: Axis) -> Tensor:
    return all_reduce(x.clone(), axis)


def copy(x: Tensor, axis: Axis) -> Tensor:
    """x as it is, for a computation whose gradients are partial sums. Transpose: all-reduce."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _same, _summed)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all ranks' x. Transpose: the gradient as it is."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _summed, _same)


def gather_rows(x: Tensor, axis: Axis) -> Tensor:
    """[T/p, D] -> [T, D]. Transpose: scatter_rows."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _gather_rows, _scatter_rows)


def scatter_rows(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's rows of their sum, [T/p, D]. Transpose: gather_rows."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _scatter_rows, _gather_rows)


def gather_columns(x: Tensor, axis: Axis) -> Tensor:
    """[T, D/p] -> [T, D]. Transpose: scatter_columns."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _gather_columns, _scatter_columns)


def scatter_columns(x: Tensor, axis: Axis) -> Tensor:
    """Partial sums [T, D] -> this rank's columns of their sum, [T, D/p]. Transpose: gather_columns."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _scatter_columns, _gather_columns)


def _share(x: Tensor, axis: Axis) -> Tensor:
    return x / axis.size


def share(x: Tensor, axis: Axis) -> Tensor:
    """x as it is, where every rank will have the same gradient: its p-th part goes back. Transpose: division by p."""
    return x if axis.size == 1 else _Transposed.apply(x, axis, _same, _share)
