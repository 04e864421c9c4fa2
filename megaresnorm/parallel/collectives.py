"""Collectives, and those that gradients pass through, each with its transpose named.

Those with gradients are autograd nodes without parameters in them; only a column-parallel linear (parallel/linear.py) starts one
within its own. On an axis of one rank each returns its input.

``start_`` begins one and returns what waits for its result; on an axis one is under way at a time. On CPUs a reduce-scatter is an
exchange: every rank sends every other its block and adds what it has received, in the order of the ranks and rounded once. It takes
a third of the time of gloo's own.

T tokens   D columns   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.parallel.mesh import Axis

# Newer names of the same functions; torch 2.11 has the old ones alone.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Pending = Callable[[], Tensor]


_SMALL = 2**17  # bytes received; up to there gloo gathers and adds faster than it reduces


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, the same bits on every rank. x is overwritten, or not: use what is returned."""
    return start_all_reduce(x, axis)()


def start_all_reduce(x: Tensor, axis: Axis) -> Pending:
    if axis.group is None:
        return lambda: x
    if axis.memory is not None and axis.memory.holds(x):
        everyone = axis.memory.start(x)
        return lambda: _added(everyone())
    if x.device.type == "cpu" and x.nbytes * axis.size <= _SMALL:
        gathered = start_all_gather(x, axis)
        return lambda: _added(gathered())
    x = x.contiguous()
    work = dist.all_reduce(x, group=axis.group, async_op=_returns_early())
    return lambda: _waited(work, x)


def all_gather_blocks(x: Tensor, axis: Axis) -> Tensor:
    """[p, *x.shape]: every rank's x."""
    return start_all_gather(x, axis)()


def start_all_gather(x: Tensor, axis: Axis) -> Pending:
    if axis.group is None:
        return lambda: x.unsqueeze(0)
    if axis.memory is not None and axis.memory.holds(x):
        everyone = axis.memory.start(x)
        return lambda: everyone().clone()
    out = x.new_empty((axis.size, *x.shape))
    work = all_gather_single(
        out.flatten(0, 1) if x.dim() else out, x.contiguous(), group=axis.group, async_op=_returns_early()
    )
    return lambda: _waited(work, out)


def reduce_scatter_blocks(x_p: Tensor, axis: Axis) -> Tensor:
    """Of blocks [p, ...], the sum over the axis of this rank's."""
    return start_reduce_scatter(x_p, axis)()


def start_reduce_scatter(x_p: Tensor, axis: Axis) -> Pending:
    if axis.group is None:
        return lambda: x_p.squeeze(0)
    if axis.memory is not None and axis.memory.holds(x_p):
        everyone = axis.memory.start(x_p)
        return lambda: _added(everyone()[:, axis.rank])
    flat = x_p.reshape(axis.size, x_p[0].numel())
    if x_p.device.type == "cpu":
        received = torch.empty_like(x_p, memory_format=torch.contiguous_format)
        exchange = dist.all_to_all_single(received.view_as(flat), flat, group=axis.group, async_op=_returns_early())
        return lambda: _added(_waited(exchange, received))
    out = torch.empty_like(x_p[0], memory_format=torch.contiguous_format)
    work = reduce_scatter_single(out.view(1, out.numel()), flat, group=axis.group, async_op=_returns_early())
    return lambda: _waited(work, out)


def _returns_early() -> bool:
    """Not while torch.compile traces: it gives no handles (None, or in 2.11 a tensor), and separates start and wait by itself."""
    return not torch.compiler.is_compiling()


def _waited(work: Any, out: Tensor) -> Tensor:
    if _returns_early():
        work.wait()
    return out


def _added(x_p: Tensor) -> Tensor:
    return x_p[0] + x_p[1] if len(x_p) == 2 else x_p.sum(0, dtype=x_p.dtype)


def columns_to_blocks(x_TD: Tensor, p: int) -> Tensor:
    """[T, D] -> [p, T, D/p], contiguous."""
    return x_TD.view(x_TD.shape[0], p, -1).transpose(0, 1).contiguous()


def blocks_to_columns(x_pTd: Tensor) -> Tensor:
    """[p, T, D/p] -> [T, D], contiguous."""
    return x_pTd.transpose(0, 1).flatten(1)
