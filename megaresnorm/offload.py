"""Tensors between spans of recomputed blocks, kept in host memory until backward needs them (recompute.offload).

What a span is run again from is copied out on a stream of its own while the next span computes, and copied back while
the span behind it is run again:

    forward   computes | span 0 | span 1 | span 2 | span 3 | head |
              out               | 0      | 1      | 2  ...
    backward  computes                                            | span 3 | span 2 | span 1 | span 0 |
              back                                                | (2)    | 1      | 0      |

The latest tensors wait on the device until another span begins: if backward comes first, the last span of a model is
never copied, and the one before it, which is still on the device, is only copied out. So the device has the tensors of
about two spans besides those of the span that computes. A copy costs no time where the bytes over the bandwidth (about
50 GB/s over PCIe 5) take less than a span computes.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from megaresnorm.errors import ConfigError
from megaresnorm.pinned import pin

LEAST = 1 << 20  # bytes of a tensor that is offloaded; of smaller ones a copy costs more than they take
PAGE = 4096

Mark = Any  # a point in the work of a stream; None for one that is passed


class Copies(Protocol):
    """How a device and its host copy to each other. All of it returns at once: a mark says when work is done."""

    def allocate(self, size: int) -> Tensor:
        """Host memory of ``size`` bytes that this object can copy to.

        Raises:
            ConfigError: the host gives none.
        """

    def reached(self) -> Mark:
        """What the current stream has been given until now."""

    def out(self, sources: Sequence[Tensor], hosts: Sequence[Tensor], after: Sequence[Mark]) -> Mark:
        """Copy tensors of the device, which the caller keeps until then, to the host."""

    def back(self, hosts: Sequence[Tensor], after: Sequence[Mark]) -> tuple[list[Tensor], Mark]:
        """Copy tensors to new ones on the device, which belong to the current stream and the caller keeps."""

    def wait(self, mark: Mark) -> None:
        """Let the current stream, not the host, wait for a mark."""


class PlainCopies:
    """Copies that are done when a call returns: device and host are both the memory of a CPU."""

    def allocate(self, size: int) -> Tensor:
        """See ``Copies``."""
        return torch.empty(size, dtype=torch.uint8)

    def reached(self) -> Mark:
        """See ``Copies``."""
        return None

    def out(self, sources: Sequence[Tensor], hosts: Sequence[Tensor], after: Sequence[Mark]) -> Mark:
        """See ``Copies``."""
        for source, host in zip(sources, hosts, strict=True):
            host.copy_(source)

    def back(self, hosts: Sequence[Tensor], after: Sequence[Mark]) -> tuple[list[Tensor], Mark]:
        """See ``Copies``."""
        return [host.clone() for host in hosts], None

    def wait(self, mark: Mark) -> None:
        """See ``Copies``."""


class CudaCopies:
    """Copies of a GPU through pinned memory, on one stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pinned = device, list[Tensor]()
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        """See ``Copies``; ``size`` is of whole pages, which can be pinned by themselves."""
        try:
            memory = torch.empty(size + PAGE, dtype=torch.uint8)
        except RuntimeError as error:
            raise self._no_memory(size, "out of memory") from error
        start = -memory.data_ptr() % PAGE
        memory = memory[start : start + size]
        if code := pin(memory, self):
            raise self._no_memory(size, f"error {code} of cudaHostRegister")
        self._pinned.append(memory)
        return memory

    def _no_memory(self, size: int, why: str) -> ConfigError:
        pinned = sum(memory.nbytes for memory in self._pinned)
        return ConfigError(
            f"recompute.offload=true: the host does not give this rank {size / 2**20:,.0f} MiB of pinned memory beside "
            f"{pinned / 2**30:,.2f} GiB that it has ({why}); lower train.micro_batch, raise recompute.every, "
            "raise the memory of the host or container and its limit of locked memory (ulimit -l), or use "
            "recompute.offload=false"
        )

    def reached(self) -> Mark:
        """See ``Copies``."""
        return torch.cuda.current_stream(self._device).record_event()

    def out(self, sources: Sequence[Tensor], hosts: Sequence[Tensor], after: Sequence[Mark]) -> Mark:
        """See ``Copies``."""
        _wait_for(self._out, after)
        with torch.cuda.stream(self._out):
            for source, host in zip(sources, hosts, strict=True):
                host.copy_(source, non_blocking=True)
        return self._out.record_event()

    def back(self, hosts: Sequence[Tensor], after: Sequence[Mark]) -> tuple[list[Tensor], Mark]:
        """See ``Copies``."""
        tensors = [torch.empty_like(host, device=self._device) for host in hosts]
        # What the current stream has been given may still use their memory.
        _wait_for(self._back, [*after, self.reached()])
        with torch.cuda.stream(self._back):
            for tensor, host in zip(tensors, hosts, strict=True):
                tensor.copy_(host, non_blocking=True)
        return tensors, self._back.record_event()

    def wait(self, mark: Mark) -> None:
        """See ``Copies``."""
        torch.cuda.current_stream(self._device).wait_event(mark)


def _wait_for(stream: torch.cuda.Stream, marks: Sequence[Mark]) -> None:
    for mark in marks:
        if mark is not None:
            stream.wait_event(mark)


class HostPool:
    """Host memory that is used again: it grows to what is in use at once."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._free: dict[int, list[tuple[Tensor, Mark]]] = defaultdict(list)

    def take(self, size: int) -> tuple[Tensor, Mark]:
        """Memory of at least ``size`` bytes, in whole pages, and the mark after which it can be written."""
        size = -(-size // PAGE) * PAGE
        return self._free[size].pop() if self._free[size] else (self._copies.allocate(size), None)

    def give_back(self, memory: Tensor, mark: Mark) -> None:
        """Return what ``take`` has given, which is in use until a mark."""
        self._free[memory.nbytes].append((memory, mark))


class Offload:
    """Keeps what spans are run again from in host memory, for all stages of a rank.

    Args:
        least: bytes of the smallest tensor that is copied; None: ``LEAST``.
    """

    def __init__(self, copies: Copies, least: int | None = None) -> None:
        self.copies, self.pool = copies, HostPool(copies)
        self._least = LEAST if least is None else least
        # Weak: a graph that is dropped takes its tensors along.
        self._latest: ReferenceType[Group] | None = None
        self._leaving: ReferenceType[Group] | None = None

    @classmethod
    def of_device(cls, device: torch.device) -> "Offload":
        """With the copies of a device."""
        return cls(CudaCopies(device) if device.type == "cuda" else PlainCopies())

    def begin(self, *, first: bool) -> "Group":
        """The keeper of a span that begins; what the one before it has kept starts to leave the device.

        Args:
            first: whether it is the first of a stage's forward pass: backward ends with it.

        Raises:
            ConfigError: the host gives no more pinned memory.
        """
        self.free_what_left()
        latest = None if self._latest is None else self._latest()
        if latest is not None and latest.leave():
            self._leaving = self._latest
        group = Group(self, None if first else self._latest)
        self._latest = ref(group)
        return group

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor is copied: a matrix of enough bytes, as the stream is.

        The weights that a region keeps are those of norms, vectors; no leaf with a gradient is copied in any case.
        """
        if tensor.is_leaf and tensor.requires_grad:
            return False
        is_large_matrix = tensor.dim() == 2 and tensor.is_floating_point() and tensor.nbytes >= self._least
        return is_large_matrix and tensor.is_contiguous()  # which a copy would be

    def free_what_left(self) -> None:
        """Drop the device's tensors that have started to leave, in whose place they then are on the host."""
        leaving, self._leaving = None if self._leaving is None else self._leaving(), None
        if leaving is not None:
            leaving.drop()


class _Place(Enum):
    DEVICE, LEAVING, HOST, RETURNING = range(4)


class Group:
    """The tensors that one region is made again from: its ``Keeper``. They leave the device and return together.

    Args:
        before: the group of the span before it in the same forward pass, which backward needs next.
    """

    def __init__(self, offload: Offload, before: "ReferenceType[Group] | None") -> None:
        self._offload, self._copies, self._before = offload, offload.copies, before
        self._place, self._asked = _Place.DEVICE, False
        self._tensors: list[Tensor] = []  # on the device
        self._memory: list[Tensor] = []  # on the host
        self._hosts: list[Tensor] = []  # the copies in it
        self._mark: Mark = None  # what must be over before the tensors can be copied, used or dropped

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See ``Keeper``."""
        if not self._offload.takes(tensor):
            return lambda: tensor
        assert self._place is _Place.DEVICE, "a region keeps nothing once the next has begun"
        number = next((i for i, kept in enumerate(self._tensors) if _is_same(kept, tensor)), len(self._tensors))
        if number == len(self._tensors):
            self._tensors.append(tensor.detach())
            self._mark = self._copies.reached()
        return lambda: self._fetch(number)

    def leave(self) -> bool:
        """Start to copy the tensors to the host, unless backward has asked for them already; whether it did."""
        if self._asked or not self._tensors:
            return False
        after = [self._mark]
        for tensor in self._tensors:
            memory, free = self._offload.pool.take(tensor.nbytes)
            self._memory.append(memory)
            self._hosts.append(memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            after.append(free)
        self._mark = self._copies.out(self._tensors, self._hosts, after)
        self._place = _Place.LEAVING
        return True

    def drop(self) -> None:
        """Drop the device's tensors, if they have not been asked for since they started to leave."""
        if self._place is _Place.LEAVING:
            self._copies.wait(self._mark)
            self._tensors, self._place = [], _Place.HOST

    def come_back(self) -> None:
        """Start to copy the tensors back to the device. Those that are still there stay."""
        self._asked = True
        if self._place is _Place.HOST:
            self._tensors, self._mark = self._copies.back(self._hosts, [self._mark])
        if self._place in (_Place.HOST, _Place.LEAVING):
            self._place = _Place.RETURNING
            self._give_memory_back()

    def _fetch(self, number: int) -> Tensor:
        self.come_back()
        before = None if self._before is None else self._before()
        if before is not None:
            before.come_back()
        self._offload.free_what_left()
        if self._place is _Place.RETURNING:
            self._copies.wait(self._mark)
            self._place = _Place.DEVICE
        return self._tensors[number]

    def _give_memory_back(self) -> None:
        self._hosts = []
        while self._memory:
            self._offload.pool.give_back(self._memory.pop(), self._mark)

    def __del__(self) -> None:
        """A graph that is dropped without backward ends here: no memory may be used again before its copy is over."""
        if self._place in (_Place.LEAVING, _Place.RETURNING):
            self._copies.wait(self._mark)
        self._give_memory_back()


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype
