"""megaresnorm profile."""

from __future__ import annotations

import logging
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megaresnorm.cli.arguments import Overrides, count_up_to, examples, path, path_text
from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_PROFILED

if TYPE_CHECKING:  # commands import what they need, so that --help is instant
    from megaresnorm.opening import Opened
    from megaresnorm.recipe import Recipe
    from megaresnorm.resilience.signals import StopSignals

log = logging.getLogger(__name__)

MOST_ROWS = 100_000

_Recipe = Annotated[str, typer.Argument(parser=path_text, metavar="RECIPE", help="YAML file, as in configs/")]
_Steps = Annotated[int, typer.Option(parser=count_up_to(MAX_PROFILED), metavar="N", help="steps that are timed")]
_Warmup = Annotated[int, typer.Option(parser=count_up_to(MAX_PROFILED), metavar="N", help="steps before them")]
_SORT = "time: worst rows first; block: from the embedding to the output matrix"
_Sort = Annotated[str, typer.Option(metavar="time|block", help=_SORT)]
_Rows = Annotated[int, typer.Option("--rows", parser=count_up_to(MOST_ROWS), metavar="N", help="rows to print")]
_OLD = "say what has changed since an older profile: its file, or the folder of a run"
_Compare = Annotated[Path | None, typer.Option("--compare", parser=path, metavar="OLD", help=_OLD)]
_OUT = "where the files go [train.output/profile]"
_Out = Annotated[Path | None, typer.Option("--out", parser=path, metavar="FOLDER", help=_OUT)]
_Trace = Annotated[bool, typer.Option("--trace/--no-trace", help="write trace.json.gz, for ui.perfetto.dev")]


def add_to(app: typer.Typer) -> None:
    """Add the profile command."""
    app.command(
        epilog=examples(
            "megaresnorm profile configs/quickstart.yaml --steps 10",
            "megaresnorm profile configs/pre-24.yaml --compare runs/before recompute.policy=branch",
            "torchrun --nproc-per-node 2 -m megaresnorm profile configs/pre-24.yaml parallel.tp=2",
        )
    )(profile)


def profile(
    recipe: _Recipe,
    overrides: Overrides = None,
    *,
    steps: _Steps = 20,
    warmup: _Warmup = 5,
    sort: _Sort = "time",
    rows: _Rows = 24,
    compare: _Compare = None,
    out: _Out = None,
    trace: _Trace = True,
) -> int:
    """Measure where a step's time and memory go, by block and branch, on all ranks.

    A run of the recipe is begun from its first weights (or train.initial_weights), in a folder of its own, and makes as
    many steps as it takes. To measure a run that is going on, set train.profile in its recipe.
    """
    from megaresnorm.job import run_job

    if sort not in ("time", "block"):
        raise ConfigError(f"--sort={sort} is neither time nor block")
    given = [f"--steps={steps}", f"--warmup={warmup}", *([] if out is None else [f"--out={out}"]), *(overrides or [])]
    command, old = shlex.join(["megaresnorm", "profile", recipe, *given]), _Old()
    return run_job(
        recipe,
        overrides or [],
        adjust=partial(_as_profiled, steps=steps, warmup=warmup, out=out, compare=compare, old=old),
        work=partial(_measure, sort=sort, rows=rows, old=old, trace=trace, command=command),
    )


class _Old:
    """The profile to compare with, once it has been read."""

    profile: dict[str, Any] | None = None


def _as_profiled(
    recipe: Recipe, *, steps: int, warmup: int, out: Path | None, compare: Path | None, old: _Old
) -> Recipe:
    """The recipe of a run that is measured, and what it is compared with. An error here is one of all ranks."""
    from megaresnorm.profiling.profile import read_profile
    from megaresnorm.profiling.window import kinds_of
    from megaresnorm.recipe.load import build_recipe

    if compare is not None:
        old.profile = read_profile(compare)  # before this profile may take its place
    folder = out if out is not None else Path(recipe.train.output) / "profile"
    if (folder / "metrics.jsonl").exists() or any((folder / "checkpoints").glob("step-*")):
        raise ConfigError(f"{folder}: a run is there, which a profile would take up; give --out a folder of its own")
    values = recipe.model_dump(exclude_none=True, exclude_defaults=True)
    needed = warmup + len(kinds_of(steps, compiled=False))
    values["train"] |= {
        "profile": {"start": warmup + 1, "steps": steps},
        "steps": max(recipe.train.steps, needed),
        "output": str(folder),
        "loggers": [],
        "sample_tokens": 0,
    }
    return build_recipe(values)


def _measure(
    opened: Opened,
    stop: StopSignals,
    *,
    sort: str,
    rows: int,
    old: _Old,
    trace: bool,
    command: str,
) -> int:
    from megaresnorm.profiling.window import Profiler
    from megaresnorm.resilience.signals import exit_reason
    from megaresnorm.run import Run
    from megaresnorm.telemetry.log import log_lines, progress_bar
    from megaresnorm.trainer import Trainer

    with Run(opened) as run:
        log_lines(run.describe())
        window = run.recipe.train.profile
        profiler = Profiler(run, window, run.output, command, writes_trace=trace)
        trainer = Trainer(run, profiler)
        stop.begin()
        with progress_bar("profiling", profiler.last_step) as progress:
            while run.steps_done < profiler.last_step:
                trainer.step()
                progress.advance()
                if run.largest(stop.exit_code):
                    break
        profiler.finish()
        code = run.largest(stop.exit_code)
        if code:
            log.warning("%s: stopped after step %d of %d", exit_reason(code), run.steps_done, profiler.last_step)
    if profiler.profile is not None:
        _show(profiler.profile, old.profile, run.output, sort, rows, trace)
    return code


def _show(profile: dict[str, Any], old: dict[str, Any] | None, folder: Path, sort: str, rows: int, trace: bool) -> None:
    from megaresnorm.profiling.show import comparison, rows_table, summary_lines
    from megaresnorm.report.write import write_report
    from megaresnorm.telemetry.log import console, log_lines

    console.print(rows_table(profile, worst_first=sort == "time", most=rows))
    if old is not None:
        console.print(comparison(profile, old, rows))
    files = ["profile.json", "profile.csv", *(["trace.json.gz (opens in ui.perfetto.dev)"] if trace else [])]
    log_lines([*summary_lines(profile), f"written   {folder}/{', '.join(files)}"])
    try:
        log_lines([f"report    {write_report([folder])}"])
    except ConfigError as e:
        log_lines([f"report    not written: {e}"])
