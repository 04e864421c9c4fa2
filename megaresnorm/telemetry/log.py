"""The console: log lines above a progress bar on a terminal, plain lines elsewhere."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class _Console(Console):
    """A console whose reader may go away (``| head``, a closed terminal): the run goes on without it."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


console = _Console(highlight=False, soft_wrap=True)


class _ConsoleHandler(logging.Handler):
    """Prints records through rich, so that a progress bar stays below them."""

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno == logging.WARNING else "red" if record.levelno > logging.WARNING else None
        console.print(self.format(record), style=style, markup=False)


def configure_logging(rank: int = 0) -> None:
    """Send the package's log to the console; of ranks but the first only errors. To be called once, by the command line."""
    logger = logging.getLogger("megaresnorm")
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.handlers = [_ConsoleHandler()]
    logger.propagate = False


@contextmanager
def progress_bar(label: str, total: int | None, done: int = 0, *, of_bytes: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere. ``progress.advance(progress.task_ids[0], n)`` moves it.

    total: None where it is not known.
    """
    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn(label), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        progress.add_task(label, total=total, completed=done)
        yield progress


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Bars of bytes, one after the other: a function from a label and a total (0: not known) to what moves the bar on."""
    with ExitStack() as current:

        def start(label: str, total: int) -> Callable[[int], None]:
            current.close()
            bar = current.enter_context(progress_bar(label, total or None, of_bytes=True))
            return partial(bar.advance, bar.task_ids[0])

        yield start


def step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    """One aligned line: the columns stay in place from the first step of a run to the last.

    >>> step_line(7, 1000, {"loss": 5.25, "gradient_norm": 1.5, "lr": 1e-3, "tokens_per_second": 10500.0})
    'step    7/1000 | loss  5.2500 | grad   1.500 | lr 1.000e-03 |    10,500 tok/s'
    """
    line = (
        f"step {step:>{len(str(steps))}}/{steps} | loss {metrics['loss']:7.4f} | grad {metrics['gradient_norm']:7.3f} "
        f"| lr {metrics['lr']:.3e} | {metrics['tokens_per_second']:9,.0f} tok/s"
    )
    return line + (f" | valid {metrics['valid_loss']:.4f}" if "valid_loss" in metrics else "")
