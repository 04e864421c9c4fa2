"""megaresnorm checkpoint ls | show | verify | diff | prune."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from megaresnorm.cli.arguments import Commands, count, path
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.text import shown, write

if TYPE_CHECKING:
    from megaresnorm.checkpoint.reader import Checkpoint
    from megaresnorm.telemetry.log import Table


def add_checkpoint(commands: Commands) -> None:
    """Add the checkpoint command with its five verbs."""
    checkpoint = commands.add_parser(
        "checkpoint",
        help="list, show, verify, compare and remove checkpoints",
        description="List, show, verify, compare and remove checkpoints. RUN is the output folder of a run.",
    )
    verbs = checkpoint.add_subparsers(title="commands", metavar="COMMAND", required=True)
    ls = verbs.add_parser("ls", help="the checkpoints of a run, without reading their tensors")
    ls.add_argument("run_folder", metavar="RUN", type=path)
    ls.set_defaults(run=_ls)
    show = verbs.add_parser("show", help="what is in a checkpoint")
    show.add_argument("checkpoint", type=path, help="a checkpoint, or a run: its newest one")
    show.add_argument("--tensors", action="store_true", help="every tensor with its shape and type")
    show.add_argument("--recipe", action="store_true", help="the recipe that it was trained with")
    show.set_defaults(run=_show)
    verify = verbs.add_parser("verify", help="read every byte and compare with the digests")
    verify.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", type=path, help="checkpoints, or runs: all of theirs"
    )
    verify.set_defaults(run=_verify)
    diff = verbs.add_parser("diff", help="how two checkpoints differ; exit code 1 if they do")
    diff.add_argument("one", metavar="A", type=path, help="a checkpoint, or a run: its newest one")
    diff.add_argument("other", metavar="B", type=path)
    diff.add_argument("--only", choices=["weights", "optimizer", "clipper"], help="compare these tensors alone")
    diff.add_argument("--rows", type=count, default=20, metavar="N", help="largest differences to show [20]")
    diff.set_defaults(run=_diff)
    prune = verbs.add_parser(
        "prune",
        help="remove old checkpoints",
        description="Remove all but the newest K checkpoints that are whole, which are verified first.",
    )
    prune.add_argument("run_folder", metavar="RUN", type=path)
    prune.add_argument("--keep", type=count, default=2, metavar="K", help="how many stay, at least 2 [2]")
    prune.add_argument("--keep-every", type=count, metavar="N", help="those of steps that N divides stay as well")
    prune.add_argument(
        "--also-before-refused",
        action="store_true",
        help="remove also those up to the run's first step with a non-finite loss or gradient, "
        "which are kept otherwise",
    )
    prune.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    prune.set_defaults(run=_prune)


def _ls(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.checkpoint.inspect import entries
    from megaresnorm.telemetry.log import Table, console

    found = list(entries(arguments.run_folder))
    if not found:
        raise CheckpointError(f"{arguments.run_folder}: has no checkpoints; wanted the output folder of a run")
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
    console.print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.format import human_bytes
    from megaresnorm.checkpoint.inspect import newest_of, num_bytes
    from megaresnorm.checkpoint.manifest import read_manifest
    from megaresnorm.checkpoint.state import recipe_of, state_of
    from megaresnorm.recipe.load import dump_recipe
    from megaresnorm.telemetry.log import Table, console

    folder = newest_of(arguments.checkpoint)
    manifest = read_manifest(folder)
    state = state_of(folder, manifest["state"])
    recipe = recipe_of(folder, state)
    if arguments.recipe:
        write(dump_recipe(recipe))
        return 0
    table = Table(show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    elements = {group: [prod(t["shape"]) for t in members.values()] for group, members in manifest["tensors"].items()}
    rows: dict[str, str | list[str]] = {
        "checkpoint": str(folder),
        "step": f"{manifest['step']:,} of {recipe.train.steps:,}",
        "samples": f"{state.samples:,}",
        "train loss": "" if state.train_loss is None else f"{state.train_loss:.6f}",
        "model": f"{recipe.model.topology}, {recipe.model.num_blocks} blocks, width {recipe.model.dim}",
        **{group: f"{len(sizes):,} tensors, {sum(sizes):,} elements" for group, sizes in elements.items()},
        "on disk": human_bytes(num_bytes(folder)),
        "data": state.data,
        "kernels": list(state.kernels.values()),
        "versions": ", ".join(f"{name} {version}" for name, version in state.versions.items()),
        "digest": manifest["digest"],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if arguments.tensors:
        console.print(_tensors_table(manifest["tensors"]))
    return 0


def _tensors_table(groups: dict[str, dict[str, dict]]) -> Table:
    from megaresnorm.telemetry.log import Table

    table = Table()
    for heading in ("group", "tensor", "shape", "type"):
        table.add_column(heading, no_wrap=True)
    for group, members in groups.items():
        for name, tensor in members.items():
            table.add_row(group, name, " x ".join(map(str, tensor["shape"])), tensor["dtype"])
    return table


def _verify(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.format import MANIFEST, checkpoints_of, human_bytes
    from megaresnorm.checkpoint.inspect import newest_of, num_bytes, verify
    from megaresnorm.telemetry.log import Table, console, progress_bar

    folders: list[Path] = []
    for given in arguments.checkpoints:
        newest_of(given)
        folders += [given] if (given / MANIFEST).exists() else [path for _, path in checkpoints_of(given)]
    table = Table()
    table.add_column("checkpoint", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    damaged = 0
    for folder in folders:
        size = _size_or_nothing(folder, num_bytes)
        with progress_bar(folder.name, 2 * size, of_bytes=True) as bar:
            problems = verify(folder, partial(bar.advance, bar.task_ids[0]))
        damaged += bool(problems)
        verdict = [p.removeprefix(f"{folder}/") for p in problems] or ["every byte is right"]
        table.add_row(str(folder), human_bytes(size) if size else "", verdict + _beside(folder))
    console.print(table)
    if damaged:
        raise CheckpointError(
            f"{damaged} of {len(folders)} checkpoints {'is' if damaged == 1 else 'are'} damaged, see above"
        )
    return 0


def _beside(folder: Path) -> list[str]:
    """A line about files in a checkpoint's folder that are not part of it, if there are any."""
    from megaresnorm.checkpoint.inspect import strangers

    try:
        names = strangers(folder)
    except CheckpointError:  # verify has reported it
        return []
    more = f" and {len(names) - 5} others" if len(names) > 5 else ""
    return [f"not part of it, and not read by anything: {', '.join(map(shown, names[:5]))}{more}"] if names else []


def _diff(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.inspect import compare_tensors, newest_of, num_bytes
    from megaresnorm.checkpoint.reader import Checkpoint
    from megaresnorm.recipe.load import differences
    from megaresnorm.telemetry.log import Table, console, progress_bar

    folders = [newest_of(arguments.one), newest_of(arguments.other)]
    with progress_bar("verifying", sum(map(num_bytes, folders)), of_bytes=True) as bar:
        one, other = (Checkpoint(f, progress=partial(bar.advance, bar.task_ids[0])) for f in folders)
    groups, alone = _groups(one, other, arguments.only)
    total = len({(g, n) for c in (one, other) for g in groups for n in c.tensors[g]})
    with progress_bar("comparing", total) as bar:
        found = list(compare_tensors(one, other, lambda: bar.advance(bar.task_ids[0]), groups))
    settings = differences(one.state, other.state) if arguments.only is None else {}
    if settings:
        table = Table(title="state")
        for heading in ("", "A", "B"):
            table.add_column(heading, overflow="fold")
        for key, (a, b) in settings.items():
            table.add_row(key, a, b)
        console.print(table)
    if found:
        found.sort(key=lambda d: (d.largest is not None, -(d.largest or 0.0)))
        table = Table(
            title=f"{len(found)} of {total} tensors differ"
            + (f"; the {arguments.rows} that do most" if len(found) > arguments.rows else "")
        )
        table.add_column("tensor", overflow="fold")
        table.add_column("largest difference", justify="right")
        table.add_column("largest of A", justify="right")
        for d in found[: arguments.rows]:
            cells = (d.what, "") if d.largest is None else (f"{d.largest:.3e}", f"{d.scale:.3e}")
            table.add_row(d.name, *cells)
        console.print(table)
    for line in _equal(one, groups, [d.name for d in found]) if found or alone or arguments.only else []:
        console.print(line)
    if not found and not alone and arguments.only is None:
        console.print(f"all {total} tensors are equal, bit for bit")
    for line in alone:
        console.print(line)
    return 1 if found or settings or alone else 0


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


def _prune(arguments: argparse.Namespace) -> int:
    from megaresnorm.checkpoint.format import checkpoints_of
    from megaresnorm.checkpoint.inspect import first_refused, num_bytes, prunable, run_of
    from megaresnorm.checkpoint.retention import Retention, remove_checkpoint
    from megaresnorm.resilience.lock import FolderLock
    from megaresnorm.telemetry.log import Table, console, progress_bar

    if arguments.keep < 2:
        raise ConfigError(
            f"--keep {arguments.keep}: at least 2 must stay, so that one is left should the other be damaged"
        )
    folder = run_of(arguments.run_folder)
    protected = None if arguments.also_before_refused else first_refused(folder)
    kept = Retention(arguments.keep, arguments.keep_every, protected)
    lock = None if arguments.dry_run else FolderLock(folder, str(folder))
    try:
        total = 2 * sum(_size_or_nothing(path, num_bytes) for _, path in checkpoints_of(folder)[-kept.newest :])
        with progress_bar("verifying what stays", total, of_bytes=True) as bar:
            removed, problems = prunable(folder, kept, partial(bar.advance, bar.task_ids[0]))
        table = Table()
        for heading in ("checkpoint", "" if not arguments.dry_run else "would be"):
            table.add_column(heading, overflow="fold")
        for _, path in checkpoints_of(folder):
            wrong = next((p for p in problems if p.startswith(str(path))), None)
            table.add_row(
                path.name, "removed" if path in removed else f"kept, does not count: {wrong}" if wrong else "kept"
            )
        for path in [] if arguments.dry_run else removed:
            remove_checkpoint(path)
        console.print(table)
    finally:
        if lock is not None:
            lock.release()
    return 0


def _size_or_nothing(folder: Path, num_bytes: Callable[[Path], int]) -> int:
    try:
        return num_bytes(folder)
    except CheckpointError:
        return 0
