"""Listing, verifying and comparing checkpoints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import (
    DAMAGED,
    FINITE,
    MANIFEST,
    UNFINISHED,
    checkpoints_of,
    is_finite,
    list_checkpoints,
    root_of,
)
from megaresnorm.checkpoint.manifest import missing_files, read_manifest, unreadable
from megaresnorm.checkpoint.reader import Checkpoint, verify_file
from megaresnorm.checkpoint.retention import Retention, superfluous
from megaresnorm.checkpoint.state import state_of
from megaresnorm.errors import CheckpointError
from megaresnorm.parallel.control import ALONE, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class FolderEntry:
    """One folder among the checkpoints of a run. Figures are None where its manifest cannot be read.

    Attributes:
        num_ranks: how many ranks wrote it.
        saved: when its manifest was written.
        problem: what is wrong with it, as far as that is seen without reading its tensors; None if nothing is.
    """

    path: Path
    step: int | None = None
    num_bytes: int | None = None
    num_ranks: int | None = None
    train_loss: float | None = None
    saved: datetime | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Difference:
    """How one tensor differs between two checkpoints.

    Attributes:
        name: its group and its global name.
        what: "values", or which checkpoint alone has it, or both dtypes and shapes.
        largest: the largest absolute difference, infinite where one value is NaN; None where only one checkpoint has
            the tensor, or dtypes or shapes differ.
        scale: the largest absolute value in the first checkpoint; None as for ``largest``.
    """

    name: str
    what: str
    largest: float | None = None
    scale: float | None = None


def newest_of(folder: Path) -> Path:
    """``folder`` if it is a checkpoint itself, or else the newest checkpoint of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / MANIFEST).exists():
        return folder
    found = checkpoints_of(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: has no checkpoint; wanted the output folder of a run, or one of its step-... folders"
        )
    return found[-1][1]


def run_of(folder: Path) -> Path:
    """The output folder of a run, given that folder or its folder of checkpoints.

    Raises:
        CheckpointError: ``folder`` is neither.
    """
    run = folder.resolve().parent if folder.name == "checkpoints" else folder
    if not list_checkpoints(run / "checkpoints"):
        raise CheckpointError(f"{folder}: has no checkpoint; wanted the output folder of a run")
    return run


def entries(folder: Path) -> Iterator[FolderEntry]:
    """Every checkpoint of a run, oldest first, then what is left of unfinished and damaged ones."""
    root = root_of(folder)
    for step, path in list_checkpoints(root):
        try:
            yield _entry(step, path)
        except CheckpointError as e:
            yield FolderEntry(path, step, problem=str(e).removeprefix(f"{path}/").removeprefix(f"{path}: "))
        except OSError as e:  # a run that goes on removes old ones
            yield FolderEntry(path, step, problem=f"cannot be read ({e.strerror})")
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name.startswith(UNFINISHED):
            yield FolderEntry(path, problem="unfinished; removed by the next save")
        elif path.name.startswith(DAMAGED):
            yield FolderEntry(path, problem="set aside; nothing reads it, remove it when you like")


def _entry(step: int, path: Path) -> FolderEntry:
    manifest = read_manifest(path)
    state, files = state_of(path, manifest["state"]), manifest["files"]
    missing = missing_files(path, manifest)
    return FolderEntry(
        path,
        step,
        sum(entry["size"] for entry in files.values()),
        len({name.split("-")[1] for name in files if name.endswith(".safetensors")}),
        state.train_loss,
        datetime.fromtimestamp((path / MANIFEST).stat().st_mtime),
        f"{missing[0]} is missing or has another size" if missing else None,
    )


def num_bytes(path: Path) -> int:
    """Size of the files of a checkpoint, without its manifest.

    Raises:
        CheckpointError: the manifest cannot be used.
    """
    return sum(entry["size"] for entry in read_manifest(path)["files"].values())


def strangers(path: Path) -> list[str]:
    """Names in the folder of a checkpoint that are not part of it: nothing reads them.

    Raises:
        CheckpointError: the manifest cannot be used, or the folder cannot be read.
    """
    known = {MANIFEST, *read_manifest(path)["files"]}
    try:
        return sorted(found.name for found in path.iterdir() if found.name not in known)
    except OSError as e:
        raise unreadable(path, e) from None


def non_finite(
    checkpoint: Checkpoint, group: str = "weights", control: Axis = ALONE, progress: Progress = None
) -> list[str]:
    """Names of the tensors of a group that hold NaN or infinity. Reads them a chunk at a time. Collective.

    Args:
        control: all ranks that share the work, an equal number of tensors each; all of them get the same result.
        progress: called with the number of bytes of every chunk that this rank has read.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def finite(name: str) -> bool:
        found = True
        for chunk in checkpoint.chunks(group, name):
            found = found and is_finite(chunk)
            if progress is not None:
                progress(chunk.nbytes)
        return found

    mine = checkpoint.names(group)[control.rank :: control.size]
    everyone = run_on_all_ranks(lambda: [name for name in mine if not finite(name)], control)
    return sorted(name for found in everyone for name in found)


def verify(path: Path, progress: Progress = None) -> list[str]:
    """Find everything that is wrong with a checkpoint.

    Args:
        progress: called with the number of bytes of every part; all files are read twice, twice ``num_bytes`` in all.

    Returns:
        A line for every damaged file; or else one for the first slice that does not fit; or else one for each group
        with tensors that are not finite. Empty for a checkpoint that is whole.
    """
    try:
        files = read_manifest(path)["files"]
    except CheckpointError as e:
        return [str(e)]
    problems = []
    for name, recorded in files.items():
        try:
            verify_file(path, name, recorded, progress)
        except CheckpointError as e:
            problems.append(str(e))
    if not problems:
        try:
            problems += _not_finite(Checkpoint(path, hashed=True), progress)
        except CheckpointError as e:
            problems.append(str(e))
    return problems


def _not_finite(checkpoint: Checkpoint, progress: Progress) -> list[str]:
    """A line for each group with tensors that are not finite."""
    groups = [group for group in FINITE if group in checkpoint.tensors]
    found = {group: non_finite(checkpoint, group, progress=progress) for group in groups}
    return [
        f"{checkpoint.folder}/{group}: {names[0]} holds NaN or infinity"
        + (f", and so {'does 1 other' if len(names) == 2 else f'do {len(names) - 1} others'}" if names[1:] else "")
        for group, names in found.items()
        if names
    ]


def compare_tensors(
    one: Checkpoint, other: Checkpoint, advance: Callable[[], None], groups: Sequence[str] | None = None
) -> Iterator[Difference]:
    """Every tensor that is not the same in both, bit for bit. Two tensors are in memory at a time.

    Args:
        groups: to compare; None for all.
        advance: called before each tensor.
    """
    for group in {**one.tensors, **other.tensors} if groups is None else groups:
        ours: Mapping = one.tensors.get(group, {})
        theirs: Mapping = other.tensors.get(group, {})
        for name in {**ours, **theirs}:
            advance()
            title = f"{group} {name}"
            if name not in ours or name not in theirs:
                yield Difference(title, f"only in {one.folder if name in ours else other.folder}")
            elif ours[name] != theirs[name]:
                a, b = ours[name], theirs[name]
                yield Difference(title, f"{a['dtype']} {a['shape']} and {b['dtype']} {b['shape']}")
            else:
                a, b = one.read(group, name), other.read(group, name)
                if not torch.equal(_bits(a), _bits(b)):
                    largest = (a.double() - b.double()).abs().nan_to_num(nan=inf).max().item()
                    yield Difference(title, "values", largest, a.double().abs().max().item())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def first_refused(folder: Path) -> int | None:
    """The first refused step of a run, according to its newest readable checkpoint; None where none was refused."""
    for _, path in reversed(checkpoints_of(folder)):
        try:
            return state_of(path, read_manifest(path)["state"]).first_refused
        except CheckpointError:
            continue
    return None


def prunable(folder: Path, retention: Retention, progress: Progress = None) -> tuple[list[Path], list[str]]:
    """Find the checkpoints of a run that need not stay once ``retention.newest`` others have been verified.

    Returns:
        Their folders, and the problems that ``verify`` found on the way.
    """
    problems: list[str] = []

    def whole(path: Path) -> bool:
        found = verify(path, progress)
        problems.extend(found)
        return not found

    return superfluous(root_of(folder), retention, whole), problems
