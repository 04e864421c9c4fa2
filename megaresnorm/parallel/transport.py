"""How a group of ranks sends: nccl between GPUs, gloo between CPUs, the memory of one host where CPUs share it.

Every ``start_`` begins a collective and returns what waits for its result; on an axis one is under way at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.parallel.shared_memory import SharedMemory

# Newer names of the same functions; torch 2.11 has the old ones alone.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
Pending = Callable[[], Tensor]
_SMALL = 2**17  # bytes received; up to there gloo gathers and adds faster than it reduces


class Transport(Protocol):
    """What collectives.py asks of a group of p ranks."""

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """The sum over the ranks, the same bits on each. ``overwrite``: x may be used for it."""

    def start_all_gather(self, x: Tensor) -> Pending:
        """[p, *x.shape]: every rank's x."""

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """The sum over the ranks of this rank's block of x [p, ...]."""


def transport_of(group: dist.ProcessGroup, rank: int, size: int) -> Transport:
    """The transport of a process group, by its backend."""
    return Nccl(group, size) if dist.get_backend(group) == "nccl" else Gloo(group, rank, size)


@dataclass(frozen=True)
class Nccl:
    """Between GPUs, by NCCL's own collectives."""

    group: dist.ProcessGroup
    size: int

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        x = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(x, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, x)

    def start_all_gather(self, x: Tensor) -> Pending:
        return _start_all_gather(x, self.size, self.group)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        flat = x_p.reshape(self.size, x_p[0].numel())
        out = torch.empty_like(x_p[0], memory_format=torch.contiguous_format)
        work = reduce_scatter_single(out.view(1, out.numel()), flat, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, out)


@dataclass(frozen=True)
class Gloo:
    """Between CPUs, through sockets.

    A reduce-scatter is an exchange: every rank sends every other its block and adds what it has received, in the order
    of the ranks and rounded once. It takes a third of the time of gloo's own.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        if x.nbytes * self.size <= _SMALL:
            gathered = self.start_all_gather(x)
            return lambda: _added(gathered())
        x = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(x, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, x)

    def start_all_gather(self, x: Tensor) -> Pending:
        return _start_all_gather(x, self.size, self.group)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        flat = x_p.reshape(self.size, x_p[0].numel())
        received = torch.empty_like(x_p, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(received.view_as(flat), flat, group=self.group, async_op=_returns_early())
        return lambda: _added(_waited(work, received))


@dataclass(frozen=True)
class OneHost:
    """Between CPUs of one host: through its memory what fits there, through ``gloo`` the rest."""

    memory: SharedMemory
    gloo: Gloo

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        if not self.memory.holds(x):
            return self.gloo.start_all_reduce(x, overwrite=overwrite)
        everyone = self.memory.start(x)
        return lambda: _added(everyone())

    def start_all_gather(self, x: Tensor) -> Pending:
        if not self.memory.holds(x):
            return self.gloo.start_all_gather(x)
        everyone = self.memory.start(x)
        return lambda: everyone().clone()

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        if not self.memory.holds(x_p):
            return self.gloo.start_reduce_scatter(x_p)
        everyone, rank = self.memory.start(x_p), self.gloo.rank
        return lambda: _added(everyone()[:, rank])


def _start_all_gather(x: Tensor, size: int, group: dist.ProcessGroup) -> Pending:
    out = x.new_empty((size, *x.shape))
    work = all_gather_single(
        out.flatten(0, 1) if x.dim() else out, x.contiguous(), group=group, async_op=_returns_early()
    )
    return lambda: _waited(work, out)


def _returns_early() -> bool:
    """Not while torch.compile traces: it gives no handles (None, or in 2.11 a tensor), and separates start and wait."""
    return not torch.compiler.is_compiling()


def _waited(work: Any, out: Tensor) -> Tensor:
    if _returns_early():
        work.wait()
    return out


def _added(x_p: Tensor) -> Tensor:
    return x_p[0] + x_p[1] if len(x_p) == 2 else x_p.sum(0, dtype=x_p.dtype)
