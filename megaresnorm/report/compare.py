"""Several runs: curves over each other, and what differs between them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megaresnorm.recipe.names import flat
from megaresnorm.report.curves import window_of
from megaresnorm.report.depth import MEANINGS, WIDE
from megaresnorm.report.depth_records import BY_SUBLAYER
from megaresnorm.report.drawing import PALETTE, STYLES, Figure, draw, label, plain_numbers
from megaresnorm.report.marks import smoothed, thinned
from megaresnorm.report.runs import RunFiles
from megaresnorm.text import shown

MOST_RUNS = len(PALETTE) * len(STYLES)  # that lines tell apart
_DEPTH = "depth: 0 the first block, 1 the last"
Line = Callable[[RunFiles], tuple[np.ndarray, np.ndarray] | None]


def compared(runs: Sequence[RunFiles]) -> Iterator[Figure]:
    """The figures that any of the runs has something for."""
    mean = "The mean of each run's last steps, a fiftieth of it."
    yield from _overlaid(runs, "loss", "Loss", mean, "nats a token", _smooth("loss"))
    what = "Each run's validation loss, where it was evaluated."
    yield from _overlaid(runs, "valid_loss", "Validation loss", what, "nats a token", _points("valid_loss"))
    what = "Geometric mean of each run's last steps. Logarithmic."
    yield from _overlaid(runs, "gradient_norm", "Gradient norm", what, "norm", _smooth_log("gradient_norm"), log=True)
    yield from _overlaid(
        runs,
        "throughput",
        "Throughput",
        "All ranks together, smoothed.",
        "tokens a second",
        _smooth("tokens_per_second"),
    )
    for name, meaning in MEANINGS.items():
        what = f"{meaning.says[:-1]}; the last record of each run."
        yield from _overlaid(
            runs,
            f"depth_{name}",
            meaning.title,
            what,
            meaning.unit,
            _last_profile(name),
            x=_DEPTH,
        )


def differing_settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs whose recipe could be read: key -> the value in each run."""
    values = [{} if run.recipe is None else flat(run.recipe.model_dump(exclude_none=True)) for run in runs]
    keys = dict.fromkeys(key for one in values for key in one)
    table = {key: [shown(one[key]) if key in one else "" for one in values] for key in keys if key != "train.output"}
    known = [i for i, run in enumerate(runs) if run.recipe is not None]
    return {key: row for key, row in table.items() if len({row[i] for i in known}) > 1}


def _overlaid(
    runs: Sequence[RunFiles],
    name: str,
    title: str,
    what: str,
    unit: str,
    line: Line,
    *,
    log: bool = False,
    x: str = "step",
) -> Iterator[Figure]:
    found = {i: line(run) for i, run in enumerate(runs)}
    lines = {i: one for i, one in found.items() if one is not None and np.isfinite(one[1]).any()}
    if not lines:
        return

    def paint(axes: Any) -> None:
        handles = []
        for i, (steps, values) in lines.items():
            style = {"color": PALETTE[i % len(PALETTE)], "linestyle": STYLES[i // len(PALETTE) % len(STYLES)]}
            marker = {"marker": "o", "markersize": 3} if len(steps) < 20 else {}
            handles += axes.plot(*thinned(steps, values), **style, **marker)
        there = np.concatenate([values[np.isfinite(values)] for _, values in lines.values()])
        if (there > 0).all() and (log or there.max() > WIDE * there.min()):
            axes.set_yscale("log")
        axes.set(xlabel=x, ylabel=unit)
        names = [label(shown(runs[i].name)) for i in lines]
        axes.figure.legend(handles, names, loc="outside lower left", ncols=2 if len(max(names, key=len)) < 22 else 1)
        for one in (axes.xaxis, axes.yaxis):
            plain_numbers(one)

    yield draw(f"runs_{name}", title, what, paint, height=2.6 + 0.1 * len(lines))


def _smooth(name: str) -> Line:
    def line(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
        values = run.metrics.get(name)
        return None if values is None else (run.metrics.steps, smoothed(values, window_of(len(values))))

    return line


def _smooth_log(name: str) -> Line:
    def line(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
        values = run.metrics.get(name)
        if values is None or not (values > 0).any():
            return None
        logarithms = np.log(np.where(values > 0, values, np.nan))
        return run.metrics.steps, np.exp(smoothed(logarithms, window_of(len(values))))

    return line


def _points(name: str) -> Line:
    def line(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
        values = run.metrics.get(name)
        if values is None:
            return None
        there = np.isfinite(values)
        return run.metrics.steps[there], values[there]

    return line


def _last_profile(name: str) -> Line:
    """Over depth from 0 to 1, so that runs of other depths can be compared; of sub-layers the mean of a block's two."""

    def line(run: RunFiles) -> tuple[np.ndarray, np.ndarray] | None:
        over = run.depth.by_place.get(name)
        if over is None:
            return None
        row = over.values[-1]
        row = row.reshape(-1, 2).mean(axis=1) if name in BY_SUBLAYER and len(row) % 2 == 0 else row
        return np.linspace(0, 1, len(row)), row

    return line
