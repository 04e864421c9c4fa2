"""Tensors handed over in the memory of one host, by ranks on CPUs, in place of sending them through sockets.

A rank writes into its own part of a slot, tells the others by one byte through the process group, and reads theirs. Two
slots take turns. A rank that has heard all others begin a turn knows that they have read what was written two turns
before.
"""

import logging
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)
FOLDER = Path("/dev/shm")
CAPACITY = 4 * 2**20  # bytes a rank can hand over at once; beyond that the process group's bandwidth counts


class SharedMemory:
    """Two slots of ``CAPACITY`` bytes for every rank of a group.

    There is one handover at a time: start, wait and read before the next.

    Args:
        descriptor: a file of 2 * size * ``CAPACITY`` bytes that all ranks of the group have open.
    """

    def __init__(self, descriptor: int, group: dist.ProcessGroup, rank: int, size: int) -> None:
        memory = mmap.mmap(descriptor, 2 * size * CAPACITY)
        self._slots = torch.frombuffer(memory, dtype=torch.uint8).view(2, size, CAPACITY)
        self._group, self._rank, self._turn, self._under_way = group, rank, 0, False
        self._said, self._heard = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)

    @classmethod
    def open(cls, group: dist.ProcessGroup, rank: int, size: int) -> "SharedMemory | None":
        """Memory in common to all ranks of the group. Collective.

        Returns:
            None where they do not share a host, or it has no memory to spare.

        Communication:
            One broadcast of 64 bytes, the file's name, and one all-reduce of 8 bytes.
        """
        descriptor, path = _create(2 * size * CAPACITY) if rank == 0 else (-1, None)
        try:
            name = torch.zeros(64, dtype=torch.uint8)
            if path is not None:
                name[: len(path.name)] = torch.frombuffer(bytearray(path.name.encode()), dtype=torch.uint8)
            dist.broadcast(name, group=group, group_src=0)
            found = bytes(name.tolist()).rstrip(b"\0").decode()
            if rank > 0 and found:
                descriptor = _open(FOLDER / found)
            opened = torch.tensor([int(descriptor >= 0)])
            dist.all_reduce(opened, dist.ReduceOp.MIN, group=group)
            if opened.item():
                return cls(descriptor, group, rank, size)
            log.info("tensor-parallel ranks have no memory in common in %s: they send through sockets", FOLDER)
            return None
        finally:
            if path is not None:
                path.unlink()  # it lasts as long as somebody has it open
            if descriptor >= 0:
                os.close(descriptor)

    def holds(self, x: Tensor) -> bool:
        """Whether x can be handed over: on a CPU, within ``CAPACITY``, and not while torch.compile traces."""
        return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.nbytes <= CAPACITY

    def start(self, x: Tensor) -> Callable[[], Tensor]:
        """Hand x over.

        Returns:
            A function that waits for the others and gives every rank's x, [p, *x.shape]. It is a view of the slot, to
            be read at once.

        Communication:
            One all-to-all of a byte for each rank. x itself goes through memory.
        """
        assert not self._under_way, "one handover at a time: start, wait and read before the next"
        self._under_way = True
        slot, self._turn = self._slots[self._turn, :, : x.nbytes], 1 - self._turn
        slot[self._rank].view(x.dtype).view(x.shape).copy_(x)
        work = dist.all_to_all_single(self._heard, self._said, group=self._group, async_op=True)

        def wait() -> Tensor:
            work.wait()
            self._under_way = False
            return slot.view(x.dtype).view(len(slot), *x.shape)

        return wait


def _create(size: int) -> tuple[int, Path | None]:
    try:
        descriptor, path = tempfile.mkstemp(prefix="megaresnorm-", dir=FOLDER)
    except OSError:
        return -1, None
    try:
        os.posix_fallocate(descriptor, 0, size)  # else a full /dev/shm would end a run in the middle of a write
    except BaseException as e:
        os.unlink(path)
        os.close(descriptor)
        if isinstance(e, OSError):
            return -1, None
        raise
    return descriptor, Path(path)


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)
    except OSError:
        return -1
