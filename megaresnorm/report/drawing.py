"""Figures as SVG and PNG. The only file that imports matplotlib; what is drawn comes as functions of its axes."""

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import ceil, floor, inf, log10
from typing import Any

from megaresnorm.errors import ConfigError
from megaresnorm.report.svg import inlined

INK, SOFT, LINE = "#1f2328", "#59636e", "#d8dee4"  # become variables of the page's style
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
STYLES = ("-", "--", ":", "-.")
WIDTH = 4.3  # inches, of 72 units of the SVG: shown at 350 to 400 pixels, where 9 units are 9 to 11 pixels
RESOLUTION = 160  # dots an inch: of PNGs, and of heat maps within SVGs
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9, "axes.labelsize": 9,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False,
    "text.parse_math": False, "text.color": INK, "axes.facecolor": "none", "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT, "ytick.color": SOFT, "grid.color": LINE, "grid.linewidth": 0.6, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.4,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "axes.formatter.useoffset": False, "axes.formatter.limits": (-4, 6), "path.simplify": True,
}  # fmt: skip
Paint = Callable[[Any], None]


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        name: of its file, and prefix of the ids within its SVG.
        title: a few words.
        caption: one sentence that says how to read it.
        svg: an element to be put into a page.
        png: a file.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def check_matplotlib() -> None:
    """Check that figures can be drawn.

    Raises:
        ConfigError: matplotlib is missing; the line says what to install.
    """
    try:
        import matplotlib  # noqa: F401 - whether it can be
    except ImportError:
        raise ConfigError(
            "figures need matplotlib, which is not installed; pip install matplotlib, or 'megaresnorm[plots]'"
        ) from None


def draw(
    name: str,
    title: str,
    caption: str,
    paint: Paint,
    *,
    height: float = 2.6,
    mosaic: Sequence[Sequence[str]] | None = None,
    ratios: tuple[Sequence[float], Sequence[float]] = ((1,), (1,)),
) -> Figure:
    """Draw one figure, once, and save it twice. Equal input makes equal bytes.

    Args:
        paint: takes its axes; those of several panels by name.
        height: in inches.
        mosaic: names of panels, row by row.
        ratios: widths of the columns of panels, and heights of their rows.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawn

    with rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs that its own font lacks and browsers have
        figure = Drawn(figsize=(WIDTH, height), layout="constrained", dpi=RESOLUTION)
        FigureCanvasAgg(figure)
        if mosaic is None:
            paint(figure.subplots())
        else:
            widths, heights = ratios
            paint(figure.subplot_mosaic([list(row) for row in mosaic], width_ratios=widths, height_ratios=heights))
        vector, pixels = io.BytesIO(), io.BytesIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(vector, format="svg", facecolor="none", metadata=nothing)
        figure.set_layout_engine("none")  # what was laid out stays so
        figure.savefig(pixels, format="png", facecolor="white", metadata={"Software": None})
    names = {INK: "ink", SOFT: "soft", LINE: "line", PALETTE[0]: "first", PALETTE[5]: "faint"}
    variables = {colour: f"var(--{name})" for colour, name in names.items()}
    return Figure(name, title, caption, inlined(vector.getvalue(), name, title, variables), pixels.getvalue())


def whole_numbers(axis: Any) -> None:
    """Label an axis with whole numbers: steps, blocks, ranks."""
    axis.get_major_locator().set_params(integer=True)
    plain_numbers(axis)


def plain_numbers(axis: Any) -> None:
    """Label an axis with plain numbers, as many as are told apart, also where it is logarithmic."""
    if axis.get_scale() == "log":
        low, high = sorted(axis.get_view_interval())
        axis.set_ticks(log_ticks(low, high))
        axis.set_ticks([], minor=True)
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_major_formatter(_formatter()())


@cache
def _formatter() -> type:
    """The class of formatters that write all numbers of an axis with the digits that tell them apart."""
    from matplotlib.ticker import Formatter

    class Plain(Formatter):
        def __call__(self, value: float, pos: int | None = None) -> str:
            return short(value)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            digits = digits_of(values)
            return [short(value, digits) for value in values]

    return Plain


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Numbers to be written at a logarithmic axis: of one digit, or fewer of these, or in between where there is none.

    >>> log_ticks(0.3, 40.0), log_ticks(1e-9, 1.0, most=4), log_ticks(1.1, 1.6), log_ticks(0.38, 0.66)
    ([0.5, 1.0, 2.0, 5.0, 10.0, 20.0], [1e-09, 1e-06, 0.001, 1.0], [1.2, 1.4, 1.6], [0.4, 0.5, 0.6])
    """
    powers = range(floor(log10(low) - 1e-9), floor(log10(high) + 1e-9) + 1)
    for factors in (range(1, 10), (1, 2, 5), (1,)):
        found = [float(f"{factor}e{power}") for power in powers for factor in factors]
        found = [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(found) <= most:
            break
    found = found[:: -(-len(found) // most)] if found else found
    return found if len(found) > 1 else few_ticks(low, high)


def few_ticks(low: float, high: float) -> list[float]:
    """Two or three round numbers from a range: a narrow panel has no room for more.

    >>> few_ticks(0.27, 0.58), few_ticks(-3.0, 40.0), few_ticks(2.83, 3.19)
    ([0.3, 0.4, 0.5], [0.0, 20.0, 40.0], [2.9, 3.0, 3.1])
    """
    if not high > low:
        return [low]
    ticks: list[float] = []
    for factor in (1, 2, 5, 10):
        unit, finer = factor * 10.0 ** floor(log10((high - low) / 2)), ticks
        ticks = [unit * step for step in range(ceil(low / unit - 1e-9), floor(high / unit + 1e-9) + 1)]
        if len(ticks) <= 3:
            break
    ticks = ticks if len(ticks) > 1 else finer[:1] + finer[1:][-1:] or ticks
    return [float(f"{tick:.6g}") + 0.0 for tick in ticks]  # no minus before a zero


def short(value: float, digits: int = 3) -> str:
    """A number in few characters.

    >>> [short(value) for value in (0.0, 0.25, 1e-5, 1500.0, 2.5e6)]
    ['0', '0.25', '1e-5', '1500', '2.5e6']
    """
    text = f"{value:.{digits}g}" if not 1000 <= abs(value) < 100_000 else f"{value:.{max(0, digits - 4)}f}"
    head, e, power = text.partition("e")
    return f"{head}e{int(power)}" if e else text


def digits_of(values: Sequence[float]) -> int:
    """How many digits tell numbers apart.

    >>> digits_of([0.5, 1.0, 1.5]), digits_of([1.0, 1.0025, 1.005])
    (3, 5)
    """
    ordered = sorted({*values})
    near = 0.1 * min((after - before for before, after in pairwise(ordered)), default=inf)
    return next((n for n in range(3, 9) if all(abs(float(short(v, n)) - v) <= near for v in ordered)), 9)


def label(name: str) -> str:
    """A name as a legend shows it: cut, and never hidden, as matplotlib does to those that begin with _."""
    name = name if len(name) <= 30 else f"{name[:18]}...{name[-9:]}"
    return f" {name}" if name.startswith("_") else name
