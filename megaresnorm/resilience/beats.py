"""What each rank of a node is doing, in memory that another process reads while the rank hangs.

A rank has a slot of forty words of 64 bits, five cache lines: what its main thread does, what writes its checkpoint,
how many collectives it has begun on every axis, and who it is. It writes a few of them where its work goes on. Times
are CLOCK_MONOTONIC in nanoseconds, which is one clock for all processes of a host.

The memory belongs to no file system: a file in /tmp would be written back to a disk now and then, and a rank that
touches a page on its way there waits for that disk. The agent of a node makes it, without a name, and its ranks open it
through /proc (``Beats.of_agent``).
"""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from time import monotonic_ns

WORDS = 40
BYTES = 8 * WORDS
SECOND = 10**9
AXES = ("pp", "dp_replicate", "dp_shard", "tp", "dp", "model_shards", "world", "embedding", "control")
OPERATIONS = ("nothing", "all-reduce", "all-gather", "reduce-scatter", "activations", "gradients", "sends")
ACTIVATIONS, GRADIENTS, SENDS = 4, 5, 6  # what a stage of a pipeline waits for: a neighbour's tensors, or its own sent
CONTROL = AXES.index("control")
# Words of the main thread.
STEP, PHASE, SINCE, ALLOWED, PLACE, PLACE_SINCE, MICROBATCH, BLOCK = range(8)
AXIS, SEQUENCE, OPERATION, SIZE, WAITS_SINCE = range(8, 13)
WAITED, READ = 13, 14  # nanoseconds so far that it has waited for other ranks, and for samples
# Of what writes a checkpoint, and of the collectives over ``control``, which have no other user meanwhile.
WRITES, WRITES_SINCE, WRITES_ALLOWED, WRITTEN_STEP, C_OPERATION, C_SIZE, C_WAITS_SINCE = range(16, 23)
COUNTS = 24  # the first of as many as there are axes
RANK, PID, STACKS = range(33, 36)  # the rank plus one; a descriptor of its process into which it writes its stacks
SIZES = 36  # pp, dp_replicate, dp_shard, tp


class Phase(IntEnum):
    """What a rank has a time for."""

    REST = 0  # none: it is not at work for a run
    START = 1
    STEP = 2
    EVALUATION = 3
    SAVE = 4
    CLOSING = 5
    BACK = 6  # going back to a checkpoint
    METRICS = 7  # the first rank's loggers end, or begin again where the run has gone back


class Place(IntEnum):
    """Where in a step a rank is, in the order of a step."""

    BEGIN = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    UPDATE = 4
    AFTER = 5


class Beats:
    """The slots of a node's ranks.

    Args:
        descriptor: of the memory; closed here, the memory stays.
        own: the slot that this process writes.
    """

    def __init__(self, descriptor: int, own: int = 0) -> None:
        try:
            self._memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
        self.num_slots = len(self._memory) // BYTES
        self._all = memoryview(self._memory).cast("q")
        self.own = self._all[own * WORDS : (own + 1) * WORDS]

    @classmethod
    def of_agent(cls, agent: int, descriptor: int, own: int) -> "Beats | None":
        """The memory that a node's agent holds.

        Args:
            agent: its process id.
            descriptor: its descriptor of the memory.
            own: local rank of this process.

        Returns:
            None where it cannot be opened.
        """
        try:
            opened = os.open(f"/proc/{agent}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(opened).st_size < (own + 1) * BYTES:
                os.close(opened)
                return None
            return cls(opened, own)
        except OSError:
            return None

    @classmethod
    def make(cls, num_slots: int = 1) -> "tuple[Beats, int]":
        """New memory, and a descriptor of it that stays open, for others to open."""
        descriptor = os.memfd_create("megaresnorm-beats", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, num_slots * BYTES)
        return cls(os.dup(descriptor)), descriptor

    def read(self, slot: int) -> "Beat":
        """A slot as it is now. What hangs does not change meanwhile."""
        return Beat(tuple(self._all[slot * WORDS : (slot + 1) * WORDS]))

    def introduce(self, rank: int, stacks: int) -> None:
        """Begin this process's slot anew."""
        own = self.own
        for word in range(WORDS):
            own[word] = 0
        own[BLOCK] = own[MICROBATCH] = -1
        own[STACKS], own[PID], own[RANK] = stacks, os.getpid(), rank + 1

    def shape(self, sizes: Sequence[int]) -> None:
        """Say how the ranks are laid out: pp, dp_replicate, dp_shard, tp."""
        for word, size in enumerate(sizes, SIZES):
            self.own[word] = size

    def begin(self, phase: int, allowed: float, since: int | None = None) -> None:
        """Begin a phase.

        Args:
            allowed: seconds that it may last; 0 for as long as it likes.
            since: when it began, if not now.
        """
        own = self.own
        own[ALLOWED] = 0  # a reader never sees the new allowance with the time of the phase before, or that with this
        own[PHASE] = phase
        own[SINCE] = monotonic_ns() if since is None else since
        own[ALLOWED] = int(allowed * SECOND)

    def at(self, place: int) -> None:
        """Say where in a step this rank is."""
        own = self.own
        own[PLACE], own[PLACE_SINCE], own[BLOCK] = place, monotonic_ns(), -1

    def waited(self) -> None:
        """A wait for others is over."""
        own = self.own
        if own[WAITS_SINCE]:
            own[WAITED] += monotonic_ns() - own[WAITS_SINCE]
            own[WAITS_SINCE] = 0

    def begin_writing(self, step: int, allowed: float) -> None:
        """Say that a checkpoint begins to be written."""
        own = self.own
        own[WRITES_ALLOWED], own[WRITTEN_STEP], own[WRITES_SINCE] = int(allowed * SECOND), step, monotonic_ns()
        own[WRITES] = 1

    def end_writing(self) -> None:
        """Say that it is written, or cannot be."""
        self.own[WRITES] = 0


@dataclass(frozen=True)
class Beat:
    """A slot as it was read.

    Attributes:
        words: all of it.
    """

    words: tuple[int, ...]

    @property
    def is_used(self) -> bool:
        """Whether a rank has written it."""
        return self.words[RANK] > 0

    @property
    def rank(self) -> int:
        """Of all ranks."""
        return self.words[RANK] - 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """pp, dp_replicate, dp_shard, tp; 1 where that is not known yet."""
        pp, dp_replicate, dp_shard, tp = (max(1, size) for size in self.words[SIZES : SIZES + 4])
        return pp, dp_replicate, dp_shard, tp

    @property
    def writes(self) -> bool:
        """Whether a checkpoint is being written."""
        return bool(self.words[WRITES])

    @property
    def waits(self) -> "Wait | None":
        """The collective, or the neighbour's message, in which the main thread is; None where it is in none."""
        words = self.words
        if not words[WAITS_SINCE]:
            return self.waits_over_control if not self.writes else None
        message = words[OPERATION] >= ACTIVATIONS
        # On an axis one collective is under way at a time: the last one begun.
        sequence = words[SEQUENCE] if message else words[COUNTS + words[AXIS]]
        return Wait(AXES[words[AXIS]], sequence, words[OPERATION], words[SIZE], words[WAITS_SINCE])

    @property
    def waits_over_control(self) -> "Wait | None":
        """The same over ``control``, be it of the main thread or of what writes a checkpoint."""
        words = self.words
        if not words[C_WAITS_SINCE]:
            return None
        return Wait("control", words[COUNTS + CONTROL], words[C_OPERATION], words[C_SIZE], words[C_WAITS_SINCE])

    def count(self, axis: str) -> int:
        """How many collectives it has begun on an axis."""
        return self.words[COUNTS + AXES.index(axis)]


@dataclass(frozen=True)
class Wait:
    """What a rank waits for.

    Attributes:
        axis: name.
        sequence: which collective on that axis, from 1; of a pipeline the microbatch.
        operation: index into ``OPERATIONS``.
        size: bytes that the rank has given.
        since: when the wait began.
    """

    axis: str
    sequence: int
    operation: int
    size: int
    since: int

    @property
    def is_message(self) -> bool:
        """Whether it is a message between stages of a pipeline."""
        return self.operation >= ACTIVATIONS

    def __str__(self) -> str:
        if self.operation == SENDS:
            return "a neighbouring stage to take what it sends"
        if self.is_message:
            return f"{OPERATIONS[self.operation]} of microbatch {self.sequence} from a neighbouring stage"
        return f"{OPERATIONS[self.operation]} #{self.sequence} over {self.axis}, {self.size} bytes"
