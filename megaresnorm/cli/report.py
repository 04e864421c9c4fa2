"""megaresnorm report: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megaresnorm.cli.arguments import examples, path
from megaresnorm.text import say

_RUNS = "output folder of a run, also of one that goes on; several are laid over each other"
_Runs = Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help=_RUNS)]
_PAGE = "the page, with its figures in a folder of its name beside it [report.html in the first RUN]"
_Out = Annotated[Path | None, typer.Option("--out", parser=path, metavar="FILE.html", help=_PAGE)]


def add_to(app: typer.Typer) -> None:
    """Add the report command."""
    app.command(
        epilog=examples(
            "megaresnorm report runs/quickstart/deepnorm-50",
            "megaresnorm report runs/a runs/b --out runs/a-and-b.html",
        )
    )(report)


def report(runs: _Runs, *, out: _Out = None) -> None:
    """Write a run as one HTML page that loads nothing: RUN/report.html, and its figures as PNGs in RUN/report/.

    It shows what the run is, its losses, speed and memory, spikes, refused steps and restarts, and what there is of
    depth over time (telemetry.every) and of a profile. Several runs are laid over each other.
    """
    from megaresnorm.report.write import write_report

    say(f"written    {write_report(runs, out)}")
