"""What stands out among the steps of a run: spikes of the loss, refused steps, starts and pauses. Pure.

S steps
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megaresnorm.report.columns import Columns

WINDOW, LEAST, SIGMAS = 128, 64, 6.0
TYPICAL_GAPS, LEAST_PAUSE = 20.0, 60.0  # a pause is so many times the median from step to step, and so many seconds
_PIECE = 8192  # steps whose windows are looked at together


class Marks(NamedTuple):
    """Indices of steps that stand out, in order.

    Attributes:
        spikes: as ``spikes_of``.
        refused: the update was refused, or skipped since FP16 gradients had overflowed.
        starts: the first steps of later starts of the run, where TensorBoard's files tell of them.
        pauses: steps after a gap in time that is far longer than a step, where they do not.
    """

    spikes: np.ndarray
    refused: np.ndarray
    starts: np.ndarray
    pauses: np.ndarray


def marks_of(columns: Columns, starts: list[float]) -> Marks:
    """What stands out.

    Args:
        starts: times at which the run was started, in seconds of the epoch; empty where they are not known.
    """
    loss, times = columns.get("loss"), columns.get("time")
    none = np.zeros(0, dtype=np.int64)
    begun = none if times is None else _first_steps(times, starts)
    pauses = none if times is None or starts else _pauses(columns, times)
    return Marks(none if loss is None else spikes_of(loss), _refused(columns), begun, pauses)


def spikes_of(loss: np.ndarray) -> np.ndarray:
    """Steps whose loss is above mean + 6 standard deviations of the 128 steps before it, of which 64 must have a loss.

    Source:
        OLMo-core's SkipStep optimizers, which leave such steps out; their window and factor.

    Args:
        loss: [S]; NaN where a step has none.

    >>> spikes_of(np.array([3.0, 3.1] * 40 + [9.0, 3.0]))
    array([80])
    """
    found = []
    padded = np.concatenate([np.full(WINDOW, np.nan), loss])
    windows = np.lib.stride_tricks.sliding_window_view(padded[:-1], WINDOW) if len(loss) else padded[:0]
    for first in range(0, len(loss), _PIECE):
        before, now = windows[first : first + _PIECE], loss[first : first + _PIECE]
        there = np.isfinite(before)
        count = there.sum(axis=1)
        mean = np.where(there, before, 0.0).sum(axis=1) / np.maximum(1, count)
        square = np.where(there, before - mean[:, None], 0.0) ** 2
        deviation = np.sqrt(square.sum(axis=1) / np.maximum(1, count - 1))
        above = np.isfinite(now) & (now > mean + SIGMAS * np.maximum(deviation, 1e-6 * np.abs(mean)))
        found.append(first + np.flatnonzero(above & (count >= LEAST)))
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _refused(columns: Columns) -> np.ndarray:
    """Loss or gradient norm is not finite; or a count has grown, of overflows or of steps that the guard has left out.

    Without labels the norm is 0.
    """
    norm, loss = (columns.values.get(name) for name in ("gradient_norm", "loss"))
    if norm is None or loss is None:
        return np.zeros(0, dtype=np.int64)
    refused = ~np.isfinite(norm) | (~np.isfinite(loss) & (norm != 0))
    for skipped in (columns.values.get(name) for name in ("skipped", "skips")):
        if skipped is None:
            continue
        count = np.where(np.isfinite(skipped), skipped, 0.0)
        refused |= np.diff(count, prepend=count[:1]) > 0
        refused[:1] |= count[:1] > 0
    return np.flatnonzero(refused)


def _first_steps(times: np.ndarray, starts: list[float]) -> np.ndarray:
    """The step that followed each start but the first; a start that made no step has none."""
    known = np.flatnonzero(np.isfinite(times))
    later = np.searchsorted(times[known], np.array(sorted(starts)[1:]))
    return known[np.unique(later[(later > 0) & (later < len(known))])]


def _pauses(columns: Columns, times: np.ndarray) -> np.ndarray:
    """Gaps behind an evaluation are its own time, and no pauses."""
    gaps = np.diff(times, prepend=times[:1])
    typical = np.nanmedian(gaps[1:]) if len(gaps) > 1 and np.isfinite(gaps[1:]).any() else 0.0
    valid = columns.values.get("valid_loss")
    evaluated = np.zeros(len(gaps), dtype=bool) if valid is None else np.append(False, np.isfinite(valid[:-1]))
    return np.flatnonzero((gaps > max(LEAST_PAUSE, TYPICAL_GAPS * typical)) & ~evaluated)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last ``window`` steps that have a figure; NaN before there is one."""
    there = np.isfinite(values)
    if there.any():  # of sums with a figure of 1e30 in them nothing else would be left
        values = np.clip(values, None, 1e6 * max(1.0, float(np.median(np.abs(values[there])))))
    sums, counts = np.cumsum(np.where(there, values, 0.0)), np.cumsum(there)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.where(counts > 0, sums / np.maximum(1, counts), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, bins: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """As few points as can be seen: the least and the greatest of each of ``bins`` pieces, in their order.

    >>> thinned(np.arange(6), np.array([1.0, 9.0, 2.0, 3.0, 0.0, 4.0]), bins=2)
    (array([0, 1, 4, 5]), array([1., 9., 0., 4.]))
    """
    y = np.where(np.isfinite(y), y, np.nan)
    if len(x) <= 2 * bins:
        return x, y
    edges = np.linspace(0, len(x), bins + 1).astype(np.int64)
    chosen: list[int] = []
    for first, last in pairwise(edges):
        piece = y[first:last]
        if np.isfinite(piece).any():
            chosen += sorted({first + int(np.nanargmin(piece)), first + int(np.nanargmax(piece))})
        else:
            chosen.append(int(first))
    return x[chosen], y[chosen]
