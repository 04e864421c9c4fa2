"""megaresnorm drill."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaresnorm.cli.arguments import (
    JsonFile,
    Overrides,
    Words,
    check_json,
    count_up_to,
    examples,
    number,
    path,
    path_text,
    report,
    words,
)
from megaresnorm.errors import ConfigError
from megaresnorm.parallel.plan import MAX_LOCAL
from megaresnorm.resilience.signals import undone_on_sigterm

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.launch.drill import Outcome
    from megaresnorm.resilience.drill_table import Row

MOST_MINUTES = 7 * 24 * 60
MAX_SEED = 2**31 - 1


def _minutes(text: str | float) -> float:
    if not 0 < number(text) <= MOST_MINUTES:
        raise typer.BadParameter(f"{text!r} is not a number of minutes up to {MOST_MINUTES}")
    return number(text)


_Recipe = Annotated[str, typer.Argument(parser=path_text, metavar="RECIPE", help="YAML file, as in configs/")]
_MINUTES = "that the run with faults takes, about; the undisturbed one takes nearly as long again"
_Minutes = Annotated[float, typer.Option(parser=_minutes, metavar="N", help=_MINUTES)]
_SEED = "chooses the faults' order, steps, ranks and places"
_Seed = Annotated[int, typer.Option(parser=count_up_to(MAX_SEED), metavar="N", help=_SEED)]
_Ranks = Annotated[int, typer.Option(parser=count_up_to(MAX_LOCAL), metavar="N", help="ranks, all on this host")]
_FAULTS = (
    "which, separated by commas: kill, stop, hang, slow, nan, flip, spike, torn_write, no_space, io_error, cut, clock "
    "[all that a run of this layout survives exactly]"
)
_Faults = Annotated[Words | None, typer.Option(parser=words, metavar="KIND,..", help=_FAULTS)]
_OUT = "folder to make, for recipes, logs and runs [train.output with -drill]"
_Out = Annotated[Path | None, typer.Option(parser=path, metavar="FOLDER", help=_OUT)]
_COMPARE = "make the same run undisturbed first, and compare every loss and the weights, bit for bit"
_Compare = Annotated[bool, typer.Option("--compare/--no-compare", help=_COMPARE)]


def add_to(app: typer.Typer) -> None:
    """Add the drill command."""
    app.command(
        epilog=examples(
            "megaresnorm drill configs/quickstart.yaml --minutes 20 --ranks 4",
            "megaresnorm drill configs/quickstart.yaml --minutes 2 --ranks 2 --faults kill,nan,torn_write --seed 7",
        )
    )(drill)


def drill(
    recipe: _Recipe,
    overrides: Overrides = None,
    *,
    minutes: _Minutes = 20.0,
    seed: _Seed = 1,
    ranks: _Ranks = 2,
    faults: _Faults = None,
    out: _Out = None,
    compare: _Compare = True,
    json: JsonFile = None,
) -> int:
    """Train a recipe while faults are injected on purpose, and see whether each is noticed, named and survived.

    Ranks are killed, stopped and slowed, numbers spoilt, files cut, disks full, connections shut down, at random steps
    of a run of its own. Exit code 0 only if everything that was injected was noticed, and named where it can be, and
    the run came to its end as an undisturbed one does.
    """
    from megaresnorm.launch.drill import DrillRun
    from megaresnorm.recipe.load import load_recipe
    from megaresnorm.resilience.drill_plan import kinds_of

    loaded = load_recipe(recipe, overrides or [])
    if loaded.drill is not None:
        raise ConfigError(f"{recipe} has a drill of its own; megaresnorm launch with MEGARESNORM_DRILL=1 runs it")
    kinds = kinds_of(faults, loaded, ranks)
    folder = Path(f"{loaded.train.output}-drill") if out is None else out
    check_json(json)
    alone = redirect_stdout(sys.stderr) if str(json) == "-" else nullcontext()  # JSON stands alone on stdout
    with undone_on_sigterm(), alone:
        outcome = DrillRun(loaded, folder, ranks).run(kinds, seed=seed, minutes=minutes, compares=compare)
    _show(outcome, json)
    return 0 if outcome.passed else 1


def _show(outcome: Outcome, json: Path | None) -> None:
    from rich import box

    from megaresnorm.telemetry.log import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("fault", "where", "step", "rank", "injected", "noticed after", "by", "named right", "steps lost"):
        table.add_column(heading, justify="right" if heading in ("step", "rank", "steps lost") else "left")
    for row in outcome.rows:
        table.add_row(*_cells(row))
    report(json, outcome.as_json(), table, *_summary(outcome))


def _cells(row: Row) -> list[str]:
    named = {None: "-", True: "yes", False: "NO"}[row.named]
    after = "" if row.after is None else f"{row.after:.1f} s"
    by = row.noticed or ("NOTHING" if row.injected else "")
    injected = "yes" if row.injected else "NO"
    return [row.kind, row.place, str(row.step), str(row.rank), injected, after, by, named, str(row.lost)]


def _summary(outcome: Outcome) -> list[str]:
    right, all_of_them = sum(row.right for row in outcome.rows), len(outcome.rows)
    lines = [f"{right} of {all_of_them} faults were injected, noticed, and named where somebody can be"]
    ended = "came to its end" if outcome.code == 0 else f"ended with exit code {outcome.code}"
    by_hand = "" if outcome.starts == 1 else f", started {outcome.starts} times by hand"
    lines.append(f"the run {ended} in {outcome.seconds:.0f} s{by_hand}: {outcome.plan.steps:,} steps")
    if outcome.goodput is not None:
        spent = ", ".join(f"{kind} {seconds:.0f} s" for kind, seconds in outcome.spent.items())
        lines.append(
            f"goodput {outcome.goodput:.1%} of the time ({spent}); {outcome.productive:.1%} of steps' time stays"
        )
    if outcome.differing is not None:
        same = "the same weights" if outcome.same_weights else "other weights"
        must = "" if outcome.plan.exact else " (not every fault is survived exactly)"
        lines.append(f"undisturbed: {outcome.differing} losses differ, and it ended with {same}{must}")
    return lines
