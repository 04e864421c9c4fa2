"""Which checkpoints stay when newer ones have been written, and how old ones are removed."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from megaresnorm.checkpoint.format import UNFINISHED, list_checkpoints
from megaresnorm.checkpoint.manifest import missing_files, read_manifest
from megaresnorm.errors import CheckpointError

log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """Which checkpoints stay when old ones are removed.

    Attributes:
        newest: so many whole ones, at least 2.
        every: those of steps that this divides.
        protected: those up to this step, which may be the last good ones.
    """

    newest: int = 2
    every: int | None = None
    protected: int | None = None


THE_NEWEST_TWO = Retention()


def superfluous(root: Path, retention: Retention, whole: Callable[[Path], bool]) -> list[Path]:
    """The checkpoints that need not stay, oldest first. One that is not ``whole`` does not count as one that stays."""
    found, staying = list[Path](), 0
    for step, path in reversed(list_checkpoints(root)):
        stays = (retention.every and step % retention.every == 0) or (
            retention.protected is not None and step <= retention.protected
        )
        if staying >= retention.newest and not stays:
            found.insert(0, path)
        else:
            staying += whole(path)
    return found


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint. A failure is a warning; links are left alone.

    It is renamed first, so that one that is half gone is no checkpoint any more.
    """
    try:
        if not path.is_symlink():
            gone = path.with_name(f"{UNFINISHED}{path.name}")
            os.rename(path, gone)
            shutil.rmtree(gone)
    except OSError as e:
        log.warning("warning: %s: an old checkpoint cannot be removed (%s)", path, e.strerror)


def remove_old(root: Path, retention: Retention) -> None:
    """Remove what need not stay; a failure is a warning."""
    try:
        for old in superfluous(root, retention, has_its_files):
            remove_checkpoint(old)
    except CheckpointError as e:  # the new checkpoint is there all the same
        log.warning("warning: old checkpoints are not removed: %s", e)


def has_its_files(folder: Path) -> bool:
    """Whether all files are there, with the sizes in the manifest. Their content was verified as they were written."""
    try:
        return not missing_files(folder, read_manifest(folder))
    except CheckpointError:
        return False
