"""How a group of ranks sends: nccl between GPUs, gloo between CPUs, the memory of one host where CPUs share it.

Every method ``start_...`` begins a collective and returns what waits for its result; on an axis one is under way at a
time.
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
_SMALL = 2**17  # bytes that a rank receives; up to there gloo gathers and adds faster than it reduces


class Transport(Protocol):
    """The collectives of a group of p ranks, for collectives.py."""

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """The sum over the ranks, the same bits on each.

        Args:
            overwrite: whether x may be used for the sum.

        Communication:
            Each rank gives x.
        """

    def start_all_gather(self, x: Tensor) -> Pending:
        """Every rank's x, as [p, *x.shape].

        Communication:
            Each rank gives x.
        """

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """The sum over the ranks of this rank's block of x [p, ...].

        Communication:
            Each rank gives p blocks, one of them to itself.
        """


def transport_of(group: dist.ProcessGroup, rank: int, size: int, device_type: str | None = None) -> Transport:
    """The transport of a process group.

    Args:
        device_type: of the tensors that are sent; None: cuda where the group's backend is nccl alone. A group that a
            program has made for both kinds of devices does not say.
    """
    if device_type is None:
        device_type = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    return Nccl(group, size) if device_type == "cuda" else Gloo(group, rank, size)


@dataclass(frozen=True)
class Nccl:
    """Between GPUs, by NCCL's own collectives.

    Communication:
        For each call one collective of its name.
    """

    group: dist.ProcessGroup
    size: int

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """As in ``Transport``; it runs in place where it may."""
        x = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(x, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, x)

    def start_all_gather(self, x: Tensor) -> Pending:
        """As in ``Transport``."""
        return _start_all_gather(x, self.size, self.group)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """As in ``Transport``; the sums are NCCL's."""
        flat = x_p.reshape(self.size, x_p[0].numel())
        out = torch.empty_like(x_p[0], memory_format=torch.contiguous_format)
        work = reduce_scatter_single(out.view(1, out.numel()), flat, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, out)


@dataclass(frozen=True)
class Gloo:
    """Between CPUs, through sockets.

    Communication:
        An all-gather is gloo's. So is an all-reduce, except that up to ``_SMALL`` received bytes every rank gathers all
        and adds. A reduce-scatter is one all-to-all: every rank sends every other its block and adds what it has
        received, in the order of the ranks and rounded once. It takes a third of the time of gloo's own.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """As in ``Transport``; a small x is gathered and added."""
        if x.nbytes * self.size <= _SMALL:
            gathered = self.start_all_gather(x)
            return lambda: _added(gathered())
        x = x.contiguous() if overwrite else x.clone(memory_format=torch.contiguous_format)
        work = dist.all_reduce(x, group=self.group, async_op=_returns_early())
        return lambda: _waited(work, x)

    def start_all_gather(self, x: Tensor) -> Pending:
        """As in ``Transport``."""
        return _start_all_gather(x, self.size, self.group)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """As in ``Transport``; blocks are exchanged, then added."""
        flat = x_p.reshape(self.size, x_p[0].numel())
        received = torch.empty_like(x_p, memory_format=torch.contiguous_format)
        work = dist.all_to_all_single(received.view_as(flat), flat, group=self.group, async_op=_returns_early())
        return lambda: _added(_waited(work, received))


@dataclass(frozen=True)
class OneHost:
    """Between CPUs of one host: what fits into its memory goes through that, the rest through ``gloo``.

    Communication:
        Through memory every rank hands its whole tensor to all others (``SharedMemory.start``), who add what they need.
    """

    memory: SharedMemory
    gloo: Gloo

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """As in ``Transport``; every rank adds all tensors in the same order."""
        if not self.memory.holds(x):
            return self.gloo.start_all_reduce(x, overwrite=overwrite)
        everyone = self.memory.start(x)
        return lambda: _added(everyone())

    def start_all_gather(self, x: Tensor) -> Pending:
        """As in ``Transport``; the result is a copy of the slot, which the next handover but one overwrites."""
        if not self.memory.holds(x):
            return self.gloo.start_all_gather(x)
        everyone = self.memory.start(x)
        return lambda: everyone().clone()

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """As in ``Transport``; every rank adds its own block of all tensors."""
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
    """Whether a collective gives a handle to wait for.

    It does not while torch.compile traces, which gives None, or in 2.11 a tensor, and separates start and wait itself.
    """
    return not torch.compiler.is_compiling()


def _waited(work: Any, out: Tensor) -> Tensor:
    if _returns_early():
        work.wait()
    return out


def _added(x_p: Tensor) -> Tensor:
    return x_p[0] + x_p[1] if len(x_p) == 2 else x_p.sum(0, dtype=x_p.dtype)
