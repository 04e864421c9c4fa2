"""One line of time per rank, cut by marks: each says what is done from now on, so that no moment counts twice.

On a CPU it is the host's clock. On a GPU marks are events in the stream that computes, read once when the step has
ended, so that nothing waits between them.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.autograd.profiler import record_function

from megaresnorm.profiling.rows import NUM_PHASES, Phase, Rows


class Clock(Protocol):
    """Stamps moments of a step."""

    def now(self) -> Any:
        """A stamp of this moment."""

    def milliseconds(self, stamps: Sequence[Any]) -> list[float]:
        """Milliseconds from the first stamp to each. Waits for the device."""


class CpuClock:
    """The host's monotonic clock."""

    now = staticmethod(time.perf_counter_ns)

    def milliseconds(self, stamps: Sequence[int]) -> list[float]:
        """See ``Clock``."""
        return [(stamp - stamps[0]) / 1e6 for stamp in stamps]


class CudaClock:
    """Events from a pool, recorded in the current stream. Their resolution is about half a microsecond."""

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []
        self._used = 0

    def now(self) -> torch.cuda.Event:
        """See ``Clock``."""
        if self._used == len(self._pool):
            self._pool.append(torch.cuda.Event(enable_timing=True))
        event = self._pool[self._used]
        self._used += 1
        event.record()
        return event

    def milliseconds(self, stamps: Sequence[torch.cuda.Event]) -> list[float]:
        """See ``Clock``; the events are free afterwards."""
        self._pool[self._used - 1].synchronize()  # the last that was recorded, whatever the order of stamps
        self._used = 0
        return [stamps[0].elapsed_time(stamp) for stamp in stamps]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()


class Chunk(NamedTuple):
    """A microbatch's pass through a stage of a pipeline.

    Attributes:
        kind: F forward, B backward.
        start, end: milliseconds from the step's start.
    """

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


class Reduced(NamedTuple):
    """One step without its marks.

    Attributes:
        duration: milliseconds.
        places: milliseconds of each place.
        hidden: milliseconds in which a row's messages were under way behind its computation, by row.
        host_wait: milliseconds in which the host has waited for the device.
        samples: of the global batch.
    """

    duration: float
    places: np.ndarray
    hidden: np.ndarray
    host_wait: float
    samples: int


class Measured(NamedTuple):
    """One step.

    Attributes:
        number: counted from 1.
        start: the host's clock at its start, nanoseconds.
        duration: milliseconds.
        places: what was done after each mark.
        times: when, milliseconds from the step's start; the last number is the step's end.
        overlapped: (place, start, end) of messages that were under way while something else was computed.
        chunks: of a pipeline.
        host_wait: milliseconds in which the host has waited for the device.
    """

    number: int
    start: int
    duration: float
    places: list[int]
    times: list[float]
    overlapped: list[tuple[int, float, float]]
    chunks: list[Chunk]
    host_wait: float

    def reduced(self, num_places: int, samples: int) -> Reduced:
        """The same without marks, which would fill memory over many steps."""
        durations = np.diff(np.asarray(self.times))
        places = np.bincount(np.asarray(self.places, dtype=np.int64), weights=durations, minlength=num_places)
        hidden = np.zeros(num_places // NUM_PHASES)
        for place, start, end in self.overlapped:
            hidden[place // NUM_PHASES] += end - start
        return Reduced(self.duration, places, hidden, self.host_wait, samples)


class Marks(Protocol):
    """Takes marks.

    Attributes:
        current: the place that time is charged to.
    """

    current: int

    def mark(self, place: int) -> None:
        """What is done from now on."""

    def close(self) -> None:
        """A range ends here, whose time goes on until the next mark."""

    def now(self) -> Any:
        """A stamp of this moment, for ``overlap`` and ``chunk``."""

    def overlap(self, place: int, start: Any) -> None:
        """A message of this place was under way from ``start`` until now."""

    def chunk(self, kind: str, stage: int, microbatch: int, start: Any) -> None:
        """A microbatch has passed a stage from ``start`` until now."""

    def waited(self, seconds: float) -> None:
        """The host has waited for the device."""


class Timeline:
    """The marks of one step at a time."""

    def __init__(self, clock: Clock, rows: Rows) -> None:
        self._clock, self._rows = clock, rows
        self.current = rows.other
        self._places: list[int] = []
        self._stamps: list[Any] = []
        self._overlapped: list[tuple[int, Any, Any]] = []
        self._chunks: list[tuple[str, int, int, Any, Any]] = []
        self._waited, self._began, self._number = 0.0, 0, 1
        self.now = now = clock.now
        places, stamps = self._places.append, self._stamps.append

        def mark(place: int) -> None:
            self.current = place
            places(place)
            stamps(now())

        self.mark: Callable[[int], None] = mark

    def begin(self, number: int = 1) -> None:
        """Begin a step, counted from 1."""
        self._number = number
        for marks in (self._places, self._stamps, self._overlapped, self._chunks):
            marks.clear()
        self._waited, self._began = 0.0, time.perf_counter_ns()
        self.mark(self._rows.other)

    def end(self) -> Measured:
        """End the step. Waits for the device."""
        stamps = [*self._stamps, self.now()]
        ends = [stamp for _, *both in self._overlapped for stamp in both]
        ends += [stamp for *_, start, end in self._chunks for stamp in (start, end)]
        found = self._clock.milliseconds([*stamps, *ends])
        times, more = found[: len(stamps)], iter(found[len(stamps) :])
        overlapped = [(place, next(more), next(more)) for place, *_ in self._overlapped]
        chunks = [Chunk(kind, stage, number, next(more), next(more)) for kind, stage, number, *_ in self._chunks]
        return Measured(self._number, self._began, times[-1], [*self._places], times, overlapped, chunks, self._waited)

    def close(self) -> None:
        """See ``Marks``: a line of time has no ranges."""

    def overlap(self, place: int, start: Any) -> None:
        """See ``Marks``."""
        self._overlapped.append((place, start, self.now()))

    def chunk(self, kind: str, stage: int, microbatch: int, start: Any) -> None:
        """See ``Marks``."""
        self._chunks.append((kind, stage, microbatch, start, self.now()))

    def waited(self, seconds: float) -> None:
        """See ``Marks``."""
        self._waited += 1e3 * seconds


class Ranges:
    """Marks as ranges by name: of torch.profiler, and for Nsight of NVTX. A range ends where the next one begins.

    Ranges of torch.profiler nest within its own events. In backward a part begins and ends within those of different
    nodes: there what is run again has a range alone, and torch links each node to what it belongs to in forward.

    Args:
        rows: which have the names of places.
        nvtx: whether ranges are NVTX's, which need not nest.
    """

    def __init__(self, rows: Rows, *, nvtx: bool = False) -> None:
        self._rows, self._nvtx, self.current = rows, nvtx, rows.other
        self._names, self._in_backward = rows.names, False
        self._open: Any = None

    def mark(self, place: int) -> None:
        """See ``Marks``."""
        self.current, phase = place, place % NUM_PHASES
        self.close()
        if phase in (Phase.FORWARD, Phase.BACKWARD):
            self._in_backward = phase == Phase.BACKWARD
        if place == self._rows.other or (self._in_backward and phase != Phase.RECOMPUTE and not self._nvtx):
            return
        if place >= len(self._names):
            self._names = self._rows.names
        name = self._names[place]
        if self._nvtx:
            self._open = torch.cuda.nvtx.range_start(name)
            return
        self._open = record_function(name)
        self._open.__enter__()

    def close(self) -> None:
        """See ``Marks``."""
        if self._open is not None and self._nvtx:
            torch.cuda.nvtx.range_end(self._open)
        elif self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = None

    def now(self) -> None:
        """See ``Marks``."""

    def overlap(self, place: int, start: Any) -> None:
        """See ``Marks``."""

    def chunk(self, kind: str, stage: int, microbatch: int, start: Any) -> None:
        """See ``Marks``."""

    def waited(self, seconds: float) -> None:
        """See ``Marks``."""
