"""What checkpoints there are, what is in them, and how two differ."""

from collections.abc import Callable, Iterator, Mapping
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
from megaresnorm.checkpoint.state import state_of
from megaresnorm.checkpoint.writer import Retention, superfluous
from megaresnorm.errors import CheckpointError
from megaresnorm.parallel.control import ALONE, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis

Progress = Callable[[int], None] | None


@dataclass(frozen=True)
class FolderEntry:
    """One folder of checkpoints. problem: what is wrong with it, seen without reading its tensors; the figures are None then."""

    path: Path
    step: int | None = None
    num_bytes: int | None = None
    num_ranks: int | None = None
    train_loss: float | None = None
    saved: datetime | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints. largest: of the absolute differences, infinite where one is NaN, None where only one
    checkpoint has the tensor or shapes differ; scale: the largest absolute value in the first.
    """

    name: str
    what: str
    largest: float | None = None
    scale: float | None = None


def newest_of(folder: Path) -> Path:
    """A checkpoint itself, or the newest of a run. Raises: CheckpointError if there is none."""
    if (folder / MANIFEST).exists():
        return folder
    found = checkpoints_of(folder)
    if not found:
        raise CheckpointError(
            f"{folder}: has no checkpoint; wanted the output folder of a run, or one of its step-... folders"
        )
    return found[-1][1]


def run_of(folder: Path) -> Path:
    """The output folder of a run, of whose checkpoints it may be the folder. Raises: CheckpointError if it is neither."""
    run = folder.resolve().parent if folder.name == "checkpoints" else folder
    if not list_checkpoints(run / "checkpoints"):
        raise CheckpointError(f"{folder}: has no checkpoint; wanted the output folder of a run")
    return run


def entries(folder: Path) -> Iterator[FolderEntry]:
    """Every checkpoint of a run, oldest first, and what is left of unfinished and damaged ones."""
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
    """What its files hold."""
    return sum(entry["size"] for entry in read_manifest(path)["files"].values())


def strangers(path: Path) -> list[str]:
    """What lies in the folder of a checkpoint and is not part of it: nothing reads it. Raises: CheckpointError."""
    known = {MANIFEST, *read_manifest(path)["files"]}
    try:
        return sorted(found.name for found in path.iterdir() if found.name not in known)
    except OSError as e:
        raise unreadable(path, e) from None


def non_finite(
    checkpoint: Checkpoint, group: str = "weights", control: Axis = ALONE, progress: Progress = None
) -> list[str]:
    """The tensors of a group that hold NaN or infinity, looked at a chunk at a time.

    control: all ranks that look together, each at an equal number of tensors; every one must call it, and all get the same.
    progress: called with the bytes of every chunk that this rank has looked at.   Raises: CheckpointError.
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
    """Everything that is wrong with a checkpoint: every file that is damaged, or else the first slice that does not fit, or else
    the tensors that are not finite. Reads what ``num_bytes`` says twice, and calls ``progress`` with both.
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
    """A line for each group that has such tensors."""
    groups = [group for group in FINITE if group in checkpoint.tensors]
    found = {group: non_finite(checkpoint, group, progress=progress) for group in groups}
    return [
        f"{checkpoint.folder}/{group}: {names[0]} holds NaN or infinity"
        + (f", and so {'does 1 other' if len(names) == 2 else f'do {len(names) - 1} others'}" if names[1:] else "")
        for group, names in found.items()
        if names
    ]


def compare_tensors(one: Checkpoint, other: Checkpoint, advance: Callable[[], None]) -> Iterator[Difference]:
    """Every tensor that is not the same in both, bit for bit. Two tensors are in memory at a time."""
    for group in {**one.tensors, **other.tensors}:
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
    """The first step of a run that was refused, as its newest checkpoint that can be read says; None where none was."""
    for _, path in reversed(checkpoints_of(folder)):
        try:
            return state_of(path, read_manifest(path)["state"]).first_refused
        except CheckpointError:
            continue
    return None


def prunable(folder: Path, retention: Retention, progress: Progress = None) -> tuple[list[Path], list[str]]:
    """The checkpoints that need not stay once ``retention.newest`` have been verified, and what was found wrong on the way."""
    problems: list[str] = []

    def whole(path: Path) -> bool:
        found = verify(path, progress)
        problems.extend(found)
        return not found

    return superfluous(root_of(folder), retention, whole), problems
