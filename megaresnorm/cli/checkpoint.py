"""megaresnorm checkpoint ls | show | verify | diff | prune."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megaresnorm.cli.arguments import (
    CHECKPOINT_OR_RUN,
    CheckpointFolder,
    JsonFile,
    RunFolder,
    check_json,
    count,
    new_app,
    path,
    report,
)
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.text import shown, write

if TYPE_CHECKING:
    from megaresnorm.checkpoint.inspect import Difference
    from megaresnorm.checkpoint.reader import Checkpoint
    from megaresnorm.telemetry.log import Table

_Tensors = Annotated[bool, typer.Option("--tensors", help="every tensor with its shape and type")]
_Recipe = Annotated[bool, typer.Option("--recipe", help="the recipe that it was trained with")]
_ALL = "checkpoints, or output folders of runs: all of theirs"
_Checkpoints = Annotated[list[Path], typer.Argument(parser=path, metavar="CHECKPOINT...", help=_ALL)]
_A = Annotated[Path, typer.Argument(parser=path, metavar="A", help=CHECKPOINT_OR_RUN)]
_B = Annotated[Path, typer.Argument(parser=path, metavar="B", help="another one")]
_Only = Annotated[
    Literal["weights", "optimizer", "clipper", "amax"] | None, typer.Option(help="compare these tensors alone")
]
_Rows = Annotated[int, typer.Option(parser=count, metavar="N", help="largest differences to show")]
_Keep = Annotated[int, typer.Option(parser=count, metavar="K", help="how many stay, at least 2")]
_KeepEvery = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="those of steps that N divides stay as well")
]
_REFUSED = "remove also those up to the run's first step with a non-finite loss or gradient, which are kept otherwise"
_AlsoRefused = Annotated[bool, typer.Option("--also-before-refused", help=_REFUSED)]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be removed, and remove nothing")]


def add_to(app: typer.Typer) -> None:
    """Add the checkpoint command with its five verbs."""
    checkpoint = new_app(help="List, show, verify, compare and remove checkpoints.")
    for command in (ls, show, verify, diff, prune):
        checkpoint.command()(command)
    app.add_typer(checkpoint, name="checkpoint")


def ls(run: RunFolder, *, json: JsonFile = None) -> None:
    """List the checkpoints of a run, without reading their tensors."""
    from megaresnorm.checkpoint.format import MANIFEST, human_bytes
    from megaresnorm.checkpoint.inspect import entries
    from megaresnorm.telemetry.log import Table

    found = list(entries(run.resolve().parent if (run / MANIFEST).exists() else run))
    if not found:
        raise CheckpointError(f"{run}: has no checkpoints; wanted the output folder of a run")
    table = Table()
    table.add_column("checkpoint", no_wrap=True)
    for heading in ("step", "size", "ranks", "train loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("saved", no_wrap=True)
    table.add_column("", overflow="fold")
    for entry in found:
        table.add_row(
            entry.path.name,
            "" if entry.step is None else f"{entry.step:,}",
            "" if entry.num_bytes is None else human_bytes(entry.num_bytes),
            "" if entry.num_ranks is None else str(entry.num_ranks),
            "" if entry.train_loss is None else f"{entry.train_loss:.4f}",
            "" if entry.saved is None else f"{entry.saved:%Y-%m-%d %H:%M:%S}",
            entry.problem or "",
        )
    report(json, [_plain(entry) for entry in found], table)


def _plain(entry: Any) -> dict[str, Any]:
    """A dataclass with what JSON lacks as text."""
    values = {name: getattr(entry, name) for name in entry.__dataclass_fields__}
    return {name: value if isinstance(value, int | float | None) else str(value) for name, value in values.items()}


def show(
    checkpoint: CheckpointFolder, *, tensors: _Tensors = False, recipe: _Recipe = False, json: JsonFile = None
) -> None:
    """Show what is in a checkpoint."""
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.checkpoint.inspect import newest_of, num_bytes
    from megaresnorm.checkpoint.manifest import read_manifest
    from megaresnorm.checkpoint.state import recipe_of, state_of
    from megaresnorm.recipe.load import dump_recipe
    from megaresnorm.telemetry.log import Table

    folder = newest_of(checkpoint)
    manifest = read_manifest(folder)
    state = state_of(folder, manifest["state"])
    trained_with = recipe_of(folder, state)
    if recipe:
        write(dump_recipe(trained_with))
        return
    model = trained_with.model
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    elements = {group: [prod(t["shape"]) for t in members.values()] for group, members in manifest["tensors"].items()}
    rows: dict[str, str | list[str]] = {
        "checkpoint": str(folder),
        "step": f"{manifest['step']:,} of {trained_with.train.steps:,}",
        "samples": f"{state.samples:,}",
        "train loss": "" if state.train_loss is None else f"{state.train_loss:.6f}",
        "model": f"{model.topology}, {model.num_blocks} blocks, width {model.dim}",
        **{group: f"{len(sizes):,} tensors, {sum(sizes):,} elements" for group, sizes in elements.items()},
        "on disk": human_bytes(num_bytes(folder)),
        "data": state.data,
        "kernels": list(state.kernels.values()),
        "versions": ", ".join(f"{name} {version}" for name, version in state.versions.items()),
        "digest": manifest["digest"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    figures = {**rows, "step": manifest["step"], "samples": state.samples, "train loss": state.train_loss}
    if tensors:
        report(json, {**figures, "tensors": manifest["tensors"]}, table, _tensors_table(manifest["tensors"]))
    else:
        report(json, figures, table)


def _tensors_table(groups: dict[str, dict[str, dict]]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table()
    for heading in ("group", "tensor", "shape", "type"):
        table.add_column(heading, no_wrap=True)
    for group, members in groups.items():
        for name, tensor in members.items():
            table.add_row(group, name, " x ".join(map(str, tensor["shape"])), tensor["dtype"])
    return table


def verify(checkpoints: _Checkpoints, *, json: JsonFile = None) -> None:
    """Read every byte of checkpoints and compare with the digests."""
    from megaresnorm.checkpoint import inspect
    from megaresnorm.checkpoint.format import MANIFEST, checkpoints_of, human_bytes
    from megaresnorm.telemetry.log import Table, progress_bar

    check_json(json)
    folders: list[Path] = []
    for given in checkpoints:
        inspect.newest_of(given)
        folders += [given] if (given / MANIFEST).exists() else [path for _, path in checkpoints_of(given)]
    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    found = []
    for folder in folders:
        size = _size_or_nothing(folder, inspect.num_bytes)
        with progress_bar(folder.name, 2 * size, of_bytes=True) as bar:
            problems = inspect.verify(folder, bar.advance)
        found.append({"checkpoint": str(folder), "bytes": size, "problems": problems})
        verdict = [p.removeprefix(f"{folder}/") for p in problems] or ["every byte is right"]
        table.add_row(str(folder), human_bytes(size) if size else "", verdict + _beside(folder))
    report(json, found, table)
    damaged = sum(bool(one["problems"]) for one in found)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(folders)} checkpoints {'is' if damaged == 1 else 'are'} damaged, see above"
        )


def _beside(folder: Path) -> list[str]:
    """A line about files in a checkpoint's folder that are not part of it, if there are any."""
    from megaresnorm.checkpoint.inspect import strangers

    try:
        names = strangers(folder)
    except CheckpointError:  # verify has reported it
        return []
    more = f" and {len(names) - 5} others" if len(names) > 5 else ""
    return [f"not part of it, and not read by anything: {', '.join(map(shown, names[:5]))}{more}"] if names else []


def diff(one: _A, other: _B, *, only: _Only = None, rows: _Rows = 20, json: JsonFile = None) -> int:
    """Show how two checkpoints differ; exit code 1 if they do."""
    from megaresnorm.checkpoint.inspect import compare_tensors, newest_of, num_bytes
    from megaresnorm.checkpoint.reader import Checkpoint
    from megaresnorm.recipe.load import differences
    from megaresnorm.telemetry.log import progress_bar

    check_json(json)
    folders = [newest_of(one), newest_of(other)]
    with progress_bar("verifying", sum(map(num_bytes, folders)), of_bytes=True) as bar:
        a, b = (Checkpoint(f, progress=bar.advance) for f in folders)
    groups, alone = _groups(a, b, only)
    total = len({(g, n) for c in (a, b) for g in groups for n in c.tensors[g]})
    with progress_bar("comparing", total) as bar:
        found = list(compare_tensors(a, b, bar.advance, groups))
    found.sort(key=lambda d: (d.largest is not None, -(d.largest or 0.0)))
    settings = differences(a.state, b.state) if only is None else {}
    tables = [*([_settings_table(settings)] if settings else []), *([_differing(found, total, rows)] if found else [])]
    lines = _equal(a, groups, [d.name for d in found]) if found or alone or only else []
    if not found and not alone and only is None:
        lines.append(f"all {total} tensors are equal, bit for bit")
    values = {"state": settings, "tensors": [_plain(d) for d in found], "compared": total, "alone": alone}
    report(json, values, *tables, *lines, *alone)
    return 1 if found or settings or alone else 0


def _settings_table(settings: dict[str, tuple[str, str]]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table(title="state")
    for heading in ("", "A", "B"):
        table.add_column(heading, overflow="fold")
    for key, (a, b) in settings.items():
        table.add_row(key, a, b)
    return table


def _differing(found: list[Difference], total: int, most: int) -> Table:
    from megaresnorm.telemetry.log import Table

    more = f"; the {most} that do most" if len(found) > most else ""
    table = Table(title=f"{len(found)} of {total} tensors differ{more}")
    table.add_column("tensor", overflow="fold")
    table.add_column("largest difference", justify="right")
    table.add_column("largest of A", justify="right")
    for d in found[:most]:
        table.add_row(d.name, *((d.what, "") if d.largest is None else (f"{d.largest:.3e}", f"{d.scale:.3e}")))
    return table


def _groups(one: Checkpoint, other: Checkpoint, only: str | None) -> tuple[list[str], list[str]]:
    """The groups of tensors that two checkpoints share, and a line for each that one of them alone has.

    Args:
        only: the one group to look at; None for all.

    Raises:
        CheckpointError: a checkpoint does not have it.
    """
    for checkpoint in (one, other):
        if only is not None and only not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.folder}: has no {only}; it has {', '.join(checkpoint.tensors)}")
    groups = list({**one.tensors, **other.tensors}) if only is None else [only]
    shared = [group for group in groups if group in one.tensors and group in other.tensors]
    counts = {group: ("A", one) if group in one.tensors else ("B", other) for group in groups if group not in shared}
    return shared, [f"{group}: {len(c.tensors[group]):,}, in {name} alone" for group, (name, c) in counts.items()]


def _equal(one: Checkpoint, groups: list[str], differing: list[str]) -> list[str]:
    """A line for each group of tensors that are equal."""
    same = [group for group in groups if not any(name.split(" ")[0] == group for name in differing)]
    words = {group: group if group == "weights" else f"tensors of {group}" for group in same}
    return [f"{len(one.tensors[group]):,} {words[group]} are equal, bit for bit" for group in same]


def prune(
    run: RunFolder,
    *,
    keep: _Keep = 2,
    keep_every: _KeepEvery = None,
    also_before_refused: _AlsoRefused = False,
    dry_run: _DryRun = False,
) -> None:
    """Remove old checkpoints: all but the newest K that are whole, which are verified first."""
    from megaresnorm.checkpoint.format import checkpoints_of
    from megaresnorm.checkpoint.inspect import first_refused, num_bytes, prunable, run_of
    from megaresnorm.checkpoint.retention import Retention, remove_checkpoint
    from megaresnorm.resilience.lock import FolderLock
    from megaresnorm.telemetry.log import Table, console, progress_bar

    if keep < 2:
        raise ConfigError(f"--keep {keep}: at least 2 must stay, so that one is left should the other be damaged")
    folder = run_of(run)
    protected = None if also_before_refused else first_refused(folder)
    kept = Retention(keep, keep_every, protected)
    lock = None if dry_run else FolderLock(folder, str(folder))
    try:
        total = 2 * sum(_size_or_nothing(path, num_bytes) for _, path in checkpoints_of(folder)[-kept.newest :])
        with progress_bar("verifying what stays", total, of_bytes=True) as bar:
            removed, problems = prunable(folder, kept, bar.advance)
        table = Table()
        for heading in ("checkpoint", "" if not dry_run else "would be"):
            table.add_column(heading, overflow="fold")
        for _, path in checkpoints_of(folder):
            wrong = next((p for p in problems if p.startswith(str(path))), None)
            table.add_row(
                path.name, "removed" if path in removed else f"kept, does not count: {wrong}" if wrong else "kept"
            )
        for path in [] if dry_run else removed:
            remove_checkpoint(path)
        console.print(table)
    finally:
        if lock is not None:
            lock.release()


def _size_or_nothing(folder: Path, num_bytes: Callable[[Path], int]) -> int:
    try:
        return num_bytes(folder)
    except CheckpointError:
        return 0
