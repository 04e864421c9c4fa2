"""Bytes of each row in one step, from the memory events of torch's profiler, which sees every allocation.

Every mark is a point in the profiler's own events; what is allocated and freed until the next one is the row's.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._C._autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from megaresnorm.profiling.rows import NUM_PHASES, Phase, Row, Rows
from megaresnorm.profiling.timeline import Ranges

_FORWARD = (Phase.FORWARD, Phase.EXPOSED)


class Bytes(NamedTuple):
    """Memory of a row on this rank.

    Attributes:
        kept: that a forward pass of one microbatch leaves allocated, for backward and for the row after it; below zero
            where a row frees more of the one before it.
        transient: at most beyond what there was when the row began, in either pass.
    """

    kept: int
    transient: int


class Points(Ranges):
    """Marks as points in the events of torch's profiler."""

    def mark(self, place: int) -> None:
        """See ``Marks``."""
        self.current = place
        with record_function(f"{_POINT}{place}"):
            pass


_POINT = "megaresnorm.place "
_LEVEL = "KINETO_LOG_LEVEL"


class MemoryStep:
    """A step whose allocations are followed.

    Args:
        device: whose memory.

    Attributes:
        marks: takes the step's marks.
        found: by row, once the step has ended.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        self._rows, self._device = rows, device
        self.marks = Points(rows)
        self.found: dict[Row, Bytes] = {}

    @contextmanager
    def followed(self) -> Iterator[None]:
        """The step is made within."""
        with _silent_kineto(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        self.found = self._by_row(_segments(profiler.profiler.kineto_results.events(), self._device))

    def _by_row(self, segments: list[tuple[int, int, int]]) -> dict[Row, Bytes]:
        """From (place, bytes that it has added, most beyond its start), in order."""
        kept: Counter[int] = Counter()
        transient: dict[int, int] = {}
        visits: Counter[int] = Counter()
        backward_began, before = False, -1
        for place, added, peak in segments:
            row, phase = divmod(place, NUM_PHASES)
            backward_began |= phase == Phase.BACKWARD and self._rows.rows[row].part != "gradients"
            if not backward_began and phase in _FORWARD:
                kept[row] += added
                visits[row] += row != before  # a message within it returns to the same row
            before = row
            transient[row] = max(transient.get(row, 0), peak)
        passes = self._passes(visits)
        rows = self._rows.rows
        return {
            rows[row]: Bytes(round(kept[row] / max(1, passes.get(rows[row].stage, 1))), most)
            for row, most in transient.items()
        }

    def _passes(self, visits: Counter[int]) -> dict[int | None, int]:
        """Microbatches that had passed each stage before the first backward pass."""
        found: dict[int | None, int] = {}
        for number, row in enumerate(self._rows.rows):
            if row.block is not None and row.part not in ("norm", "weights"):
                found.setdefault(row.stage, visits[number])
        return found


@contextmanager
def _silent_kineto() -> Iterator[None]:
    """Kineto, which torch's profiler is made of, would write lines of its own as it begins and ends."""
    before = os.environ.get(_LEVEL)
    os.environ[_LEVEL] = before or "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LEVEL]


def _segments(events: list[Any], device: torch.device) -> list[tuple[int, int, int]]:
    wanted = {"cpu": DeviceType.CPU, "cuda": DeviceType.CUDA}[device.type]
    moments: list[tuple[int, int, int]] = []  # (when, 0 for a point and 1 for memory, place or bytes)
    for event in events:
        name = event.name()
        if name.startswith(_POINT):
            moments.append((event.start_ns(), 0, int(name.removeprefix(_POINT))))
        elif name == "[memory]" and event.device_type() == wanted:
            moments.append((event.start_ns(), 1, event.nbytes()))
    found: list[tuple[int, int, int]] = []
    place, level, peak = -1, 0, 0
    for _, kind, value in sorted(moments):
        if kind:
            level += value
            peak = max(peak, level)
            continue
        if place >= 0:
            found.append((place, level, peak))
        place, level, peak = value, 0, 0
    return found
