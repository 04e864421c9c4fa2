"""Curves of one run over its steps.

S steps
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megaresnorm.report.columns import Columns
from megaresnorm.report.drawing import LINE, PALETTE, SOFT, Figure, draw, plain_numbers, whole_numbers
from megaresnorm.report.marks import Marks, smoothed, thinned

BLUE, RED, GREEN, PINK, ORANGE, SKY = PALETTE


def window_of(num_steps: int) -> int:
    """Steps of a smoothed curve's mean: a fiftieth of the run.

    >>> window_of(150), window_of(100_000)
    (5, 2000)
    """
    return min(2000, max(5, num_steps // 50))


def curves_of(columns: Columns, marks: Marks) -> Iterator[Figure]:
    """The figures that there are columns for."""
    if columns.get("loss") is not None:
        yield _loss(columns, marks)
    if columns.get("gradient_norm") is not None:
        yield _gradient_norm(columns, marks)
    if columns.get("lr") is not None:
        yield _plain(columns, "lr", "Learning rate", "The schedule's learning rate in each step.", "learning rate")
    if columns.get("loss_scale") is not None:
        yield _loss_scale(columns, marks)
    if columns.get("tokens_per_second") is not None:
        yield _throughput(columns, marks)
    if columns.get("peak_memory") is not None:
        what = "The most memory that the first rank has had up to each step; it can only grow within one start."
        yield _plain(columns, "peak_memory", "Peak memory", what, "GB", scale=1e-9)


def _loss(columns: Columns, marks: Marks) -> Figure:
    steps, loss = columns.steps, columns.values["loss"]
    window = window_of(len(steps))
    valid = {n: v for n, v in columns.values.items() if n == "valid_loss" or n.startswith("valid_loss/")}
    valid = valid if len(valid) <= 5 else {"valid_loss": valid["valid_loss"]}
    mean = smoothed(loss, window)

    def paint(axes: Any) -> None:
        axes.plot(*thinned(steps, loss), color=SKY, linewidth=0.7, alpha=0.7, label="each step")
        axes.plot(*thinned(steps, mean), color=BLUE, label=f"mean of {window}")
        for i, (name, values) in enumerate(valid.items()):
            there = np.isfinite(values)
            marker = {"marker": "o", "markersize": 3} if there.sum() < 60 else {}
            shown = "validation" + (f" {name.partition('/')[2]}" if "/" in name else "")
            axes.plot(steps[there], values[there], color=(RED, GREEN, PINK, ORANGE, SOFT)[i], label=shown, **marker)
        _limits(axes, loss)
        _mark(axes, steps, loss, marks)
        _finish(axes, "nats a token", legend=True)

    caption = (
        f"Thin: the loss of each step; thick: its mean over the last {window} steps; points: validation. {_key(marks)}"
    )
    return draw("loss", "Loss", caption.strip(), paint, height=2.9)


def _gradient_norm(columns: Columns, marks: Marks) -> Figure:
    steps, norm = columns.steps, columns.values["gradient_norm"]
    norm = np.where(norm > 0, norm, np.nan)
    window = window_of(len(steps))

    def paint(axes: Any) -> None:
        axes.plot(*thinned(steps, norm), color=SKY, linewidth=0.7, alpha=0.7)
        axes.plot(*thinned(steps, np.exp(smoothed(np.log(norm), window))), color=BLUE)
        axes.set_yscale("log")
        _mark(axes, steps, norm, marks)
        _finish(axes, "norm")

    what = f"Of all gradients before clipping; thick: the geometric mean of the last {window} steps. Logarithmic."
    return draw("gradient_norm", "Gradient norm", what, paint)


def _loss_scale(columns: Columns, marks: Marks) -> Figure:
    steps, scale = columns.steps, columns.values["loss_scale"]

    def paint(axes: Any) -> None:
        axes.plot(*thinned(steps, np.log2(np.where(scale > 0, scale, np.nan))), color=BLUE, drawstyle="steps-post")
        _mark(axes, steps, np.full(len(steps), np.nan), marks)
        low, high = np.floor(axes.get_ylim()[0]), np.ceil(axes.get_ylim()[1])
        axes.set_yticks(np.arange(low, high + 1)[:: max(1, int(high - low) // 6)])
        _finish(axes, "power of two")

    what = "Its base-2 logarithm: it falls where FP16 gradients overflow, and that step is skipped."
    return draw("loss_scale", "Loss scale", what, paint)


def _throughput(columns: Columns, marks: Marks) -> Figure:
    steps, speed = columns.steps, columns.values["tokens_per_second"]
    median = float(np.nanmedian(speed))

    def paint(axes: Any) -> None:
        axes.plot(*thinned(steps, speed), color=SKY, linewidth=0.7, alpha=0.7)
        axes.plot(*thinned(steps, smoothed(speed, window_of(len(steps)))), color=BLUE)
        axes.axhline(median, color=SOFT, linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1.08 * float(np.nanmax(speed)))
        _mark(axes, steps, np.full(len(steps), np.nan), marks)
        _finish(axes, "tokens a second")

    what = "Labels of a step over its seconds, all ranks together; dotted: the median of all steps. Dips are stalls."
    return draw("throughput", "Throughput", what, paint)


def _plain(columns: Columns, column: str, title: str, what: str, unit: str, scale: float = 1.0) -> Figure:
    values = columns.values[column] * scale

    def paint(axes: Any) -> None:
        axes.plot(*thinned(columns.steps, values), color=BLUE)
        axes.set_ylim(0, 1.08 * float(np.nanmax(values)) or 1.0)
        _finish(axes, unit)

    return draw("learning_rate" if column == "lr" else column, title, what, paint, height=2.2)


def _mark(axes: Any, steps: np.ndarray, values: np.ndarray, marks: Marks) -> None:
    """Spikes where they are, refused steps on the lower edge, starts and pauses as lines."""
    edge = axes.get_xaxis_transform()  # of x in steps, of y from 0 to 1
    for where in [*steps[marks.starts], *steps[marks.pauses]][:200]:
        axes.axvline(where, color=SOFT, linewidth=0.8, linestyle="--")
    spikes, refused = steps[marks.spikes], steps[marks.refused]
    if len(spikes) and np.isfinite(values).any():
        seen = np.minimum(values[marks.spikes], axes.get_ylim()[1])
        axes.plot(spikes[:500], seen[:500], "v", color=RED, markersize=4, linestyle="none", clip_on=False)
    if len(refused):
        low = np.full(len(refused[:500]), 0.03)
        axes.plot(refused[:500], low, "x", color=RED, markersize=4, linestyle="none", transform=edge)


def _key(marks: Marks) -> str:
    """What the marks that are there mean."""
    found = []
    if len(marks.spikes):
        found.append("triangles: spikes")
    if len(marks.refused):
        found.append("crosses: refused or skipped steps")
    if len(marks.starts):
        found.append("dashed lines: the run was started again")
    if len(marks.pauses):
        found.append("dashed lines: pauses")
    return f"Marks: {'; '.join(found)}." if found else ""


def _limits(axes: Any, loss: np.ndarray) -> None:
    """The first steps and a few spikes do not press the rest of the curve flat."""
    there = loss[np.isfinite(loss)]
    low, high = np.percentile(there, (0, 99.5))
    if there.max() > high + 2 * (high - low):
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + 2 * margin + 1e-9)


def _finish(axes: Any, unit: str, *, legend: bool = False) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    whole_numbers(axes.xaxis)
    plain_numbers(axes.yaxis)
    axes.margins(x=0.02)
    axes.spines["left"].set_visible(False)
    if legend:
        axes.figure.legend(loc="outside upper left", ncols=3, handlelength=1.2, columnspacing=1.0)
    axes.tick_params(colors=SOFT, grid_color=LINE)
