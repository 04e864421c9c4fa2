"""The profile of each layer (RUN/profile/profile.json) as figures and tables."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megaresnorm.report.columns import number
from megaresnorm.report.curves import BLUE, GREEN, ORANGE, PINK, RED, SKY
from megaresnorm.report.drawing import Figure, draw, plain_numbers, whole_numbers

MAX_PROFILE_VALUES = 1 << 24  # twenty thousand rows of thirty fields and their times
_TIMES = {"forward": BLUE, "backward": SKY, "recompute": ORANGE, "norm": GREEN, "exposed": RED}
_BYTES = {
    "parameter_bytes": (BLUE, "parameters"), "activation_bytes": (ORANGE, "activations"),
    "transient_bytes": (PINK, "transient"),
}  # fmt: skip
SLOWEST = 10


def rows_of(profile: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of a profile that are such."""
    rows = profile.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def median(time: Any) -> float:
    """The median of a time in milliseconds; 0 where nothing of the kind happened."""
    value = time.get("p50") if isinstance(time, dict) else None
    return _number(value)


def total(row: Mapping[str, Any]) -> float:
    """Milliseconds of a row in a step. What is hidden behind other work counts not."""
    return sum(median(row.get(name)) for name in ("forward", "backward", "recompute", "exposed", "optimizer"))


def slowest(profile: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows that take longest."""
    return sorted(rows_of(profile), key=total, reverse=True)[:SLOWEST]


def profile_figures(profile: Mapping[str, Any]) -> Iterator[Figure]:
    """The figures that there are rows for."""
    blocks = sorted({row["block"] for row in rows_of(profile) if _is_block(row.get("block"))})
    if not blocks:
        return
    times = _times(profile, blocks)
    what = "Milliseconds of a step in each block, medians over steps: a block that stands out is what to look at."
    yield _bars("profile_time", "Time by block", what, blocks, {n: (_TIMES[n], t) for n, t in times.items()}, "ms")
    sizes = _sizes(profile, blocks)
    if sizes:
        what = "Bytes of each block: parameters, what it holds until backward, and the most that lives for a moment."
        shown = {_BYTES[name][1]: (_BYTES[name][0], values / 1e6) for name, values in sizes.items()}
        yield _bars("profile_memory", "Memory by block", what, blocks, shown, "MB")
    ranks = [one for one in _list(profile.get("ranks")) if isinstance(one, dict)]
    if len(ranks) > 1:
        yield _ranks(ranks)


def _times(profile: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, np.ndarray]:
    """Milliseconds by block: norms apart, those of a block's other parts together."""
    found: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows_of(profile):
        if not _is_block(row.get("block")):
            continue
        for name in ("forward", "backward", "recompute", "exposed"):
            kind = "norm" if row.get("part") == "norm" and name in ("forward", "backward") else name
            found[kind][row["block"]] += median(row.get(name))
    return {name: values for name in _TIMES if (values := np.array([found[name][block] for block in blocks])).any()}


def _sizes(profile: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, np.ndarray]:
    found: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows_of(profile):
        for name in _BYTES:
            if not _is_block(row.get("block")) or not _number(row.get(name)):
                continue
            block, size = row["block"], _number(row[name])
            # What lives for a moment in one part is gone before the next.
            found[name][block] = (
                max(found[name][block], size) if name == "transient_bytes" else found[name][block] + size
            )
    return {name: np.array([found[name][block] for block in blocks]) for name in _BYTES if found[name]}


def _bars(
    name: str, title: str, what: str, blocks: Sequence[int], parts: Mapping[str, tuple[str, np.ndarray]], unit: str
) -> Figure:
    def paint(axes: Any) -> None:
        below = np.zeros(len(blocks))
        for label, (colour, values) in parts.items():
            axes.bar(blocks, values, bottom=below, width=0.85, color=colour, label=label)
            below = below + values
        axes.set(xlabel="block", ylabel=unit)
        axes.set_ylim(0, 1.3 * float(below.max()) or 1.0)
        axes.grid(False, axis="x")
        axes.legend(loc="upper left", ncols=3, handlelength=1.0, columnspacing=1.0, borderaxespad=0.1)
        whole_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)

    return draw(name, title, what, paint)


def _ranks(ranks: Sequence[Mapping[str, Any]]) -> Figure:
    parts = {
        "own work": ("own_ms",), "waiting": ("exposed_ms", "bubble_ms"),
        "data, host, other": ("data_ms", "host_ms", "unaccounted_ms"),
    }  # fmt: skip
    numbers = np.array([_number(one.get("rank")) for one in ranks])
    heights = {what: np.array([sum(_number(r.get(n)) for n in of) for r in ranks]) for what, of in parts.items()}

    def paint(axes: Any) -> None:
        below = np.zeros(len(ranks))
        for (label, values), colour in zip(heights.items(), (BLUE, SKY, ORANGE), strict=True):
            axes.bar(numbers, values, width=0.85, bottom=below, color=colour, label=label)
            below = below + values
        axes.set(xlabel="rank", ylabel="ms")
        axes.set_ylim(0, 1.25 * float(np.nanmax(below)) or 1.0)
        axes.grid(False, axis="x")
        axes.legend(loc="upper left", ncols=3, handlelength=1.0, columnspacing=1.0, borderaxespad=0.1)
        whole_numbers(axes.xaxis)
        plain_numbers(axes.yaxis)

    what = "Own work of each rank in a step, and its wait for others: the rank that waits least is the slow one."
    return draw("profile_ranks", "Ranks", what, paint, height=2.3)


def _is_block(value: Any) -> bool:
    return type(value) is int and 0 <= value < 100_000


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float:
    """A time or size; 0 where there is none."""
    found = number(value)
    return found if found > 0 else 0.0
