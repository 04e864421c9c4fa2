"""Depth over time as heat maps, each with its last profile over depth beside it.

R records   D places in depth
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from megaresnorm.report.curves import BLUE, RED
from megaresnorm.report.depth_records import BY_SUBLAYER, Depth, OverTime
from megaresnorm.report.drawing import (
    SOFT,
    Figure,
    digits_of,
    draw,
    few_ticks,
    log_ticks,
    plain_numbers,
    short,
    whole_numbers,
)

MOST_COLUMNS = 300  # of a heat map; more records than this are put together, by their maximum
ROOM = 13  # characters below a profile
WIDE = 30.0  # a range of so many times is shown on a logarithmic scale


class Meaning(NamedTuple):
    """How a quantity is shown: a title, the unit, and what is read off."""

    title: str
    unit: str
    says: str


MEANINGS = {
    "stream_rms": Meaning(
        "Residual stream", "RMS", "RMS of the residual stream where a sub-layer opens: growth with depth is the sum of "
        "branches, growth with time is drift."
    ),
    "branch_ratio": Meaning(
        "Branch to stream", "ratio", "Norm of what a branch adds over that of what it is added to: near 0 a sub-layer "
        "changes nothing."
    ),
    "angular_distance": Meaning(
        "Angular distance", "angle / π", "Angle between input and output of a block: blocks near 0 could be left "
        "out."
    ),
    "gradient_norm": Meaning(
        "Gradient by block", "norm", "Norm of the gradient of a block's weights: even over depth is what deep "
        "topologies promise."
    ),
    "update_ratio": Meaning(
        "Update to weight", "ratio", "Norm of a block's update over that of its weights: 1e-3 is usual, 0 means that a "
        "block does not learn."
    ),
    "logit_max": Meaning(
        "Attention logits", "largest", "The largest attention logit of a block: growth without end precedes spikes."
    ),
    "attention_entropy": Meaning(
        "Attention entropy", "nats", "Mean entropy of the attention of a block, where it was probed: near 0 every "
        "token looks at one other."
    ),
    "collapse": Meaning(
        "Rank collapse", "residual", "How far the tokens behind a block differ from their mean, over their norm: "
        "near 0 they cannot be told apart (rank collapse)."
    ),
}  # fmt: skip


_WHOLE = {  # figure -> title, columns, caption, unit
    "effective_depth": (
        "Effective depth", ("effective_depth", "sublayers_above"), "The number of equal branches that would be as "
        "spread out (participation ratio of branch to stream), and of sub-layers above a threshold.", "sub-layers"
    ),
    "path_length": (
        "Mean path length", ("mean_path_length",), "Branches that a path from output to input goes through on average, "
        "weighted by its gradient: short paths are those of a shallow model.", "branches"
    ),
}  # fmt: skip
Line = tuple[np.ndarray, np.ndarray]  # steps, values


def depth_figures(depth: Depth) -> Iterator[Figure]:
    """The figures that there are records for."""
    for name, meaning in MEANINGS.items():
        if name in depth.by_place:
            yield _heat_map(name, meaning, depth.by_place[name])
    for name, (title, columns, what, unit) in _WHOLE.items():
        lines: dict[str, Line] = {column: depth.whole[column] for column in columns if column in depth.whole}
        if lines:
            yield _lines(name, title, lines, what, unit)
    if depth.paths is not None:
        yield _paths(*depth.paths)


def numbers_figures(numbers: Mapping[str, Mapping[str, OverTime]]) -> Iterator[Figure]:
    """Shares of numbers that saturate and underflow, where any do."""
    titles = {"saturated": ("Saturation", "above the largest number"), "underflown": ("Underflow", "below the least")}
    for kind, classes in numbers.items():
        if has_shares(classes):
            title, where = titles[kind]
            what = f"Shares of the numbers that products read {where} of their format, by block; white is none."
            yield _shares(kind, title, what, classes)


def has_shares(classes: Mapping[str, OverTime]) -> bool:
    """Whether anything is lost in any class."""
    return any(np.nanmax(one.values) > 0 for one in classes.values())


def _heat_map(name: str, meaning: Meaning, over: OverTime) -> Figure:
    places = (np.arange(over.values.shape[1] + 1) - 0.5) * (0.5 if name in BY_SUBLAYER else 1.0)
    steps, values = thinned_records(over)
    logarithmic, low, high = _range(values)

    def paint(panels: dict[str, Any]) -> None:
        heat, key, last = panels["heat"], panels["key"], panels["last"]
        scale = {"norm": "log"} if logarithmic else {}
        mesh = heat.pcolormesh(
            edges(steps), places, values.T, cmap="viridis", rasterized=True, vmin=low, vmax=high, **scale
        )
        bar = heat.figure.colorbar(mesh, cax=key, orientation="horizontal")
        bar.outline.set_visible(False)
        key.xaxis.set_ticks_position("top")
        key.set_title(meaning.unit, loc="left", color=SOFT, pad=3)
        _profile(last, name, places, over.values[-1], logarithmic)
        last.set_title(f"step {over.steps[-1]}", loc="left", color=SOFT, pad=3)
        heat.set(xlabel="step", ylabel="block", xlim=(edges(steps)[0], edges(steps)[-1]))
        last.set(ylim=(places[0], places[-1]), xlabel=meaning.unit)
        heat.set_ylim(places[0], places[-1])
        heat.grid(False)
        for one in (heat.xaxis, heat.yaxis, last.yaxis):
            whole_numbers(one)
        _few_numbers(last)
        if not logarithmic:
            key.locator_params(axis="x", nbins=5)
        plain_numbers(key.xaxis)

    note = " Colours are logarithmic." if logarithmic else ""
    caption = f"{meaning.says[:-1]}; right: the last record.{note}"
    ratios = ((2.3, 1), (0.07, 1))
    mosaic = [["key", "."], ["heat", "last"]]
    return draw(
        f"depth_{name}",
        meaning.title,
        caption,
        paint,
        height=3.3 if name in BY_SUBLAYER else 3.1,
        mosaic=mosaic,
        ratios=ratios,
    )


def _profile(axes: Any, name: str, places: np.ndarray, row: np.ndarray, logarithmic: bool) -> None:
    middle = (places[:-1] + places[1:]) / 2
    if name in BY_SUBLAYER:
        axes.plot(row[0::2], middle[0::2], color=BLUE, label="attention")
        axes.plot(row[1::2], middle[1::2], color=RED, label="ffn")
        axes.figure.legend(loc="outside upper right", ncols=2, handlelength=1.0, columnspacing=1.0, borderaxespad=0.1)
    else:
        axes.plot(row, middle, color=BLUE)
    there = row[np.isfinite(row)]
    if logarithmic and len(there) and (there > 0).any():
        axes.set_xscale("log")


def _few_numbers(axes: Any) -> None:
    """Label x with so few numbers that they fit under a narrow panel."""
    low, high = axes.get_xlim()
    ticks = log_ticks(low, high, 3) if axes.get_xscale() == "log" else few_ticks(low, high)
    labels = [short(tick, digits_of(ticks)) for tick in ticks]
    if sum(map(len, labels)) > ROOM:
        ticks, labels = [ticks[0], ticks[-1]], [labels[0], labels[-1]]
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)


def _lines(name: str, title: str, lines: Mapping[str, Line], what: str, unit: str) -> Figure:
    def paint(axes: Any) -> None:
        for colour, (label, (steps, values)) in zip((BLUE, RED), lines.items(), strict=False):
            marker = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
            axes.plot(steps, values, color=colour, label=label.replace("_", " "), **marker)
        axes.set(xlabel="step", ylabel=unit)
        axes.set_ylim(0)
        if len(lines) > 1:
            axes.legend(loc="best")
        for one in (axes.xaxis, axes.yaxis):
            plain_numbers(one)

    return draw(f"depth_{name}", title, what, paint, height=2.3)


def _paths(step: int, lengths: np.ndarray, shares: np.ndarray) -> Figure:
    def paint(axes: Any) -> None:
        width = 0.9 * float(np.median(np.diff(np.unique(lengths)))) if len(np.unique(lengths)) > 1 else 0.9
        axes.bar(lengths, shares, width=width, color=BLUE)
        axes.set(xlabel="branches on the path", ylabel="share of the gradient")
        for one in (axes.xaxis, axes.yaxis):
            plain_numbers(one)

    what = f"Shares of the gradient that paths of each length carry, at step {step}: a bulk far left of the number of "
    what += "sub-layers is a shallow ensemble."
    return draw("depth_paths", "Paths", what, paint, height=2.3)


def _shares(kind: str, title: str, what: str, classes: Mapping[str, OverTime]) -> Figure:
    high = max(float(np.nanmax(one.values)) for one in classes.values())

    def paint(panels: dict[str, Any]) -> None:
        for (name, over), panel in zip(classes.items(), (panels[one] for one in classes), strict=True):
            steps, values = thinned_records(over)
            places = np.arange(values.shape[1] + 1) - 0.5
            mesh = panel.pcolormesh(
                edges(steps), places, 100 * values.T, cmap="Blues", rasterized=True, vmin=0, vmax=100 * high
            )
            panel.set_title(f"{name}s", loc="left", color=SOFT, pad=2)
            panel.set_ylabel("block")
            panel.tick_params(labelbottom=name == [*classes][-1])
            panel.grid(False)
            for one in (panel.xaxis, panel.yaxis):
                whole_numbers(one)
        panel.set_xlabel("step")
        bar = panel.figure.colorbar(mesh, cax=panels["key"])
        bar.outline.set_visible(False)
        panels["key"].set_title("%", color=SOFT, pad=2)

    mosaic = [[name, "key"] for name in classes]
    ratios = ((1, 0.04), [1] * len(classes))
    return draw(f"numbers_{kind}", title, what, paint, height=0.6 + 1.05 * len(classes), mosaic=mosaic, ratios=ratios)


def thinned_records(over: OverTime) -> tuple[np.ndarray, np.ndarray]:
    """At most ``MOST_COLUMNS`` records: of those that are put together the step of the first, and the maxima."""
    num = len(over.steps)
    if num <= MOST_COLUMNS:
        return over.steps, over.values
    firsts = np.unique(np.linspace(0, num, MOST_COLUMNS, endpoint=False).astype(np.int64))
    filled = np.where(np.isfinite(over.values), over.values, -np.inf)
    most = np.maximum.reduceat(filled, firsts, axis=0)
    return over.steps[firsts], np.where(np.isfinite(most), most, np.nan)


def edges(steps: np.ndarray) -> np.ndarray:
    """Borders of the columns of a heat map: half way between its steps.

    >>> edges(np.array([10, 20, 40]))
    array([ 5., 15., 30., 50.])
    """
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[steps[0] - (middle[0] - steps[0])], middle, [steps[-1] + (steps[-1] - middle[-1])]])


def _range(values: np.ndarray) -> tuple[bool, float, float]:
    """Whether a logarithmic scale is needed, and the least and greatest values that colours tell apart."""
    there = values[np.isfinite(values)]
    positive = there[there > 0]
    if len(positive) == len(there) and len(there) and there.max() > WIDE * there.min():
        low, high = np.percentile(there, (0.5, 99.5))
        return True, float(low), float(high)
    low, high = np.percentile(there, (0.5, 99.5))
    return False, float(low), float(high) if high > low else float(low) + 1e-9 + abs(float(low)) * 1e-6
