"""megaresnorm train."""

from __future__ import annotations

from typing import Annotated

import typer

from megaresnorm.cli.arguments import Overrides, count_up_to, examples, memory, path_text
from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_RANKS
from megaresnorm.text import say, write

_Recipe = Annotated[str, typer.Argument(parser=path_text, metavar="RECIPE", help="YAML file, as in configs/")]
_CHECK = "check recipe and data, say what the run takes of memory and time, print the recipe, and end"
_DryRun = Annotated[bool, typer.Option("--dry-run", help=_CHECK)]
_LAYOUT = "with --dry-run: for so many ranks; unset: the fewest that the layout needs"
_Ranks = Annotated[int | None, typer.Option(parser=count_up_to(MAX_RANKS), metavar="N", help=_LAYOUT)]
_ROOM = "with --dry-run: memory of a GPU, such as 80GB, that the ranks are to fit into"
_Memory = Annotated[int | None, typer.Option(parser=memory, metavar="SIZE", help=_ROOM)]
_PLAN = "with --dry-run: where the data are not, to plan; needs model.vocab_size"
_NoData = Annotated[bool, typer.Option("--no-data", help=_PLAN)]
_ALL = "print every setting, not only those that differ from the defaults"
Full = Annotated[bool, typer.Option("--full", help=_ALL)]
_DAMAGED = "end if the newest checkpoint is damaged, rather than go on from an older one"
NoFallback = Annotated[bool, typer.Option("--no-fallback", help=_DAMAGED)]


def add_to(app: typer.Typer) -> None:
    """Add the train command."""
    app.command(
        epilog=examples(
            "megaresnorm train configs/quickstart.yaml model.topology=keel train.steps=100",
            "megaresnorm train configs/deepnorm-200-1b.yaml --dry-run --no-data --ranks 32 --memory 80GB",
        )
    )(train)


def train(
    recipe: _Recipe,
    overrides: Overrides = None,
    *,
    dry_run: _DryRun = False,
    ranks: _Ranks = None,
    memory: _Memory = None,
    no_data: _NoData = False,
    full: Full = False,
    no_fallback: NoFallback = False,
) -> int:
    """Train the run of a recipe. If its output folder has a checkpoint, the run goes on from the newest one."""
    from megaresnorm.job import run_job

    if dry_run:
        return _dry_run(recipe, overrides or [], ranks, memory, no_data, full)
    for name, given in {"--ranks": ranks, "--memory": memory, "--no-data": no_data}.items():
        if given:
            raise ConfigError(f"{name} is for --dry-run; ranks are started by megaresnorm launch")
    return run_job(recipe, overrides or [], fallback=not no_fallback, full=full)


def _dry_run(
    recipe_file: str, overrides: list[str], ranks: int | None, memory: int | None, no_data: bool, full: bool
) -> int:
    from megaresnorm.parallel.environment import read_environment
    from megaresnorm.planner.estimate import estimate
    from megaresnorm.recipe.load import dump_recipe, load_recipe

    if read_environment().rank:
        return 0
    recipe = load_recipe(recipe_file, overrides)
    found = estimate(recipe, ranks=ranks, device_memory=memory, with_data=not no_data)
    write(dump_recipe(found.recipe, full=full))
    for line in found.describe():  # comments, so that the whole is a recipe
        say(f"# {line}")
    return 0
