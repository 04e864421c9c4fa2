"""The console: log lines above a progress bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import log2
from typing import Any

import rich.console
import rich.table
from rich.console import RenderableType
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from megaresnorm.parallel.environment import is_copied, read_environment
from megaresnorm.text import OneLine, say, shown


class Console(rich.console.Console):
    """Shows strings as they are: no markup, no emoji codes, no links, control characters written out.

    Line breaks are kept, since some texts have them on purpose; print ``shown(line)`` for a string of one line. The
    reader may go away (``| head``, a closed terminal): the run goes on without it.
    """

    _said_that_it_waits = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Text of a string, without control characters. Printed strings, cells and titles of tables all pass here."""
        return super().render_str(shown(text, lines=True), **settings | {"markup": False, "emoji": False})

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print. Where a disk is full, lines wait until there is room; training goes on, and a warning says so once."""
        try:
            super().print(*objects, **settings)
        except OSError as e:
            if not self._said_that_it_waits:
                self._said_that_it_waits = True
                say(f"warning: the output cannot be written ({e.strerror}); work goes on, the rest follows", error=True)

    def on_broken_pipe(self) -> None:
        """Discard further output once the reader has gone away."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Table(rich.table.Table):
    """A table whose string cells have one line each: line breaks in them are written out."""

    def add_row(self, *cells: RenderableType | list[str] | None, **settings: Any) -> None:
        """Add a row; a list is a cell of several lines."""
        super().add_row(*map(_cell, cells), **settings)


def _cell(content: RenderableType | list[str] | None) -> RenderableType | None:
    lines = [content] if isinstance(content, str) else content
    return "\n".join(map(shown, lines)) if isinstance(lines, list) else lines


class _Shell(Console):
    """The console of commands. Where it is no terminal, tables are as wide as their content."""

    @property
    def is_terminal(self) -> bool:
        """Whether lines can be written over. A notebook says that they can, and shows each attempt."""
        return super().is_terminal and "ipykernel" not in sys.modules and not is_copied()

    @property
    def options(self) -> rich.console.ConsoleOptions:
        """How wide things may be."""
        options = super().options
        return options if self.is_terminal else options.update(width=UNLIMITED)


UNLIMITED = 100_000  # columns
console = _Shell(soft_wrap=True, force_jupyter=False)  # a notebook shows it as plain lines
log = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Prints records through rich, so that a progress bar stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno == logging.WARNING else "red" if record.levelno > logging.WARNING else None
        console.print(self.format(record), style=style)


def configure_logging(rank: int = 0) -> None:
    """Send the package's log to the console; only errors on ranks other than 0. The command line calls it once."""
    logger, handler = logging.getLogger("megaresnorm"), _ConsoleHandler()
    handler.setFormatter(OneLine())
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.propagate = False


def log_to_console_by_default() -> None:
    """Call ``configure_logging``, unless the program or notebook that trains has configured logging itself."""
    if not logging.getLogger("megaresnorm").hasHandlers():
        configure_logging(read_environment().rank)


def log_lines(lines: list[str]) -> None:
    """Log several lines, each as one record."""
    for line in lines:
        log.info("%s", line)


class Bar:
    """A progress bar with room for a few words, as ``progress_bar`` makes it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def advance(self, num: float = 1, note: str | None = None) -> None:
        """Move it, and say something beside it."""
        bar = self._progress.task_ids[0]
        if note is None:
            self._progress.advance(bar, num)
        else:
            self._progress.update(bar, advance=num, note=shown(note))


@contextmanager
def progress_bar(label: str, total: int | None, done: int = 0, *, of_bytes: bool = False) -> Iterator[Bar]:
    """A bar on a terminal, nothing elsewhere.

    Args:
        total: None where it is not known.
        done: where the bar starts.
        of_bytes: whether the unit is bytes.
    """
    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    note = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn(), note)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        progress.add_task(shown(label), total=total, completed=done, note="")
        yield Bar(progress)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Bars of bytes, one after the other.

    Yields:
        A function that starts a bar from its label and total (0: not known), and returns a function that moves it on.
    """
    with ExitStack() as current:

        def start(label: str, total: int) -> Callable[[int], None]:
            current.close()
            return current.enter_context(progress_bar(label, total or None, of_bytes=True)).advance

        yield start


def step_line(step: int, steps: int, metrics: Mapping[str, float | None]) -> str:
    """One aligned line: its columns stay in place from the first step of a run to the last.

    Speeds are means over the steps since the line before. FLOP/s are those of one rank, peak memory is the first
    rank's. A step without labels has no loss, and only FP16 has a loss scale.

    >>> figures = {"loss": 5.25, "gradient_norm": 1.5, "lr": 1e-3, "tokens_per_second": 10500.0, "seconds": 0.0975}
    >>> line = step_line(7, 1000, figures | {"tflops": 0.021, "peak_memory": 5.3e8, "tokens": 7168, "time": 0.0})
    >>> line[:77]
    'step    7/1000 | loss  5.2500 | grad   1.500 | lr 1.000e-03 |    10,500 tok/s'
    >>> line[77:-8]
    ' |  0.098 s |   21 GFLOP/s | 0.53 GB | 7.17 K tokens | '
    """
    loss, mfu = "   none" if metrics["loss"] is None else f"{metrics['loss']:7.4f}", metrics.get("mfu")
    parts = [
        f"step {step:>{len(str(steps))}}/{steps} | loss {loss} | grad {metrics['gradient_norm']:7.3f} "
        f"| lr {metrics['lr']:.3e} | {metrics['tokens_per_second']:9,.0f} tok/s | {metrics['seconds']:6.3f} s",
        f"{large(1e12 * (metrics['tflops'] or 0)):>6}FLOP/s" + ("" if mfu is None else f", {mfu:.1%} MFU"),
    ]
    if metrics.get("peak_memory") is not None:
        parts.append(f"{(metrics['peak_memory'] or 0) / 1e9:.2f} GB")
    if metrics.get("loss_scale") is not None:
        parts.append(f"scale 2^{log2(metrics['loss_scale'] or 1):<2.0f}")
    parts.append(f"{large(metrics['tokens'] or 0):>6} tokens")
    parts.append(time.strftime("%H:%M:%S", time.localtime(metrics["time"])))
    return " | ".join(parts) + (f" | {valid_figures(metrics)}" if "valid_loss" in metrics else "")


def skipped_line(step: int, steps: int, loss: float, scale: float | None, lowered_to: float) -> str:
    """One line, aligned with ``step_line``, for a step whose gradients overflow.

    >>> skipped_line(7, 1000, 5.25, 65536.0, 32768.0)
    'step    7/1000 | loss  5.2500 | skipped: gradients overflow at loss scale 2^16, next 2^15'
    """
    powers = [log2(one or 1) for one in (scale, lowered_to)]
    return (
        f"step {step:>{len(str(steps))}}/{steps} | loss {loss:7.4f} | skipped: gradients overflow at loss scale "
        f"2^{powers[0]:g}, next 2^{powers[1]:g}"
    )


def bar_note(metrics: Mapping[str, float | None]) -> str:
    """What stands beside the bar of a run."""
    loss = "" if metrics["loss"] is None else f"loss {metrics['loss']:.4f}  "
    return f"{loss}{large(metrics['tokens_per_second'] or 0)} tok/s"


def large(number: float) -> str:
    """A large number in few characters.

    >>> large(999), large(20480), large(1_049_733_760), large(3e12)
    ('999', '20.5 K', '1.05 G', '3 T')
    """
    power = 0
    while number >= 999.5 and power < 7:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{['', ' K', ' M', ' G', ' T', ' P', ' E', ' Z'][power]}"


def valid_figures(metrics: Mapping[str, float | None]) -> str:
    """Validation figures of a step in words, then the loss on each set where there are several.

    >>> valid_figures({"valid_loss": 1.5, "valid_perplexity": 4.481689, "valid_bits_per_byte": 0.5})
    'valid 1.5000 (perplexity 4.482, 0.5000 bits a byte)'
    """
    bits = metrics.get("valid_bits_per_byte")
    units = f"perplexity {metrics['valid_perplexity']:.4g}" + ("" if bits is None else f", {bits:.4f} bits a byte")
    sets = [f"{name.partition('/')[2]} {loss:.4f}" for name, loss in metrics.items() if name.startswith("valid_loss/")]
    return f"valid {metrics['valid_loss']:.4f} ({units})" + (f": {', '.join(sets)}" if sets else "")
