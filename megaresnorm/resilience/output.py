"""The output folder of a run: held by one job at a time, seen by all of its ranks, and found writable before step 0."""

import os
from collections.abc import Mapping
from pathlib import Path

from megaresnorm.checkpoint.format import Groups
from megaresnorm.checkpoint.resume import wait_until_seen
from megaresnorm.checkpoint.writer import bytes_of
from megaresnorm.errors import TrainingError
from megaresnorm.files import remove_unfinished, replace_file
from megaresnorm.parallel.control import all_or_raise
from megaresnorm.parallel.mesh import Axis
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.names import flat
from megaresnorm.resilience.faults import Drill
from megaresnorm.resilience.lock import LOCK, FolderLock
from megaresnorm.resilience.preflight import check_output
from megaresnorm.telemetry.metrics import DEPTH, NUMBERS, MetricsWriter


class OutputFolder:
    """``train.output`` as all ranks of a run hold it until it is released. The first rank alone writes.

    Args:
        path: the folder; it is made where it is missing.
        control: all ranks of the run. Every one must make this object.
        job: the launcher's name for the job, None where it has none.

    Raises:
        TrainingError: another job holds the folder, or a rank's node does not share it.
    """

    def __init__(self, path: Path, control: Axis, job: str | None) -> None:
        self.path, self._control, self._job = path, control, job
        self._lock: FolderLock | None = None
        try:
            all_or_raise(self._take, control)
            all_or_raise(self._see, control)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            self._lock.release()

    def check(self) -> None:
        """Check that the folder is still held.

        Raises:
            TrainingError: another job has taken it over, or it is gone.
        """
        if self._lock is not None and self._lock.lost:
            why = "another job has taken it over"
            if not os.path.lexists(self.path / LOCK):
                why = f"its {LOCK} was removed" if os.path.exists(self.path) else "the folder was removed"
            raise TrainingError(f"train.output={self.path}: {why}; nothing more is written")

    def prepare(self, files: Mapping[str, str | None], groups: Groups, keep: int, *, drill: bool = False) -> None:
        """Write what describes the run, and remove what killed runs have left half-written.

        Writing that must fail fails now.

        Args:
            files: their contents by name; None for one that this run has not, and may have had before.
            groups: the tensors of a checkpoint, for whose size there must be space.
            keep: how many checkpoints stay.
            drill: whether the run is one, which the folder says before anything else that it holds a run.

        Raises:
            TrainingError: the folder cannot be written, or there is no space for a checkpoint.
        """
        if self._control.rank > 0:
            return
        check_output(self.path / "checkpoints", bytes_of(groups), keep)
        try:
            remove_unfinished(self.path)
            if drill:
                (self.path / Drill.FOLDER).mkdir(exist_ok=True)
            for name, content in files.items():
                if content is None:
                    (self.path / name).unlink(missing_ok=True)
                else:
                    replace_file(self.path / name, content)
        except OSError as e:
            raise TrainingError(f"train.output={self.path}: cannot be written ({e.strerror})") from None

    def open_metrics(self, first_step: int, recipe: Recipe) -> MetricsWriter | None:
        """The first rank's metrics, written from ``first_step`` on; None on the other ranks.

        Args:
            first_step: counted from 1.

        Raises:
            TrainingError: the file cannot be written.
        """
        if self._control.rank > 0:
            return None
        telemetry, loggers = recipe.telemetry, recipe.train.loggers
        records = [NUMBERS] if telemetry.every and recipe.precision.rounds else []
        records += [DEPTH] if telemetry.every or telemetry.probe_every else []
        settings = flat(recipe.model_dump(exclude_none=True))
        try:
            return MetricsWriter(self.path, first_step=first_step, loggers=loggers, settings=settings, records=records)
        except OSError as e:
            raise TrainingError(f"train.output={self.path}: cannot be written ({e.strerror})") from None

    def _take(self) -> None:
        if self._control.rank == 0:
            self._lock = FolderLock(self.path, f"train.output={self.path}", job=self._job)

    def _see(self) -> None:
        if not wait_until_seen(self.path / LOCK):
            raise TrainingError(
                f"train.output={self.path}: rank {self._control.rank} does not see it; all nodes must share this folder"
            )
