"""Files that drills spoil: writes and reads that fail as a disk's do, and files that are cut once they are written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megaresnorm.checkpoint import writer
from megaresnorm.checkpoint.format import UNFINISHED
from megaresnorm.data import token_file
from megaresnorm.recipe import FaultRecipe

Fires = Callable[[], bool]
ERRORS = {"no_space": errno.ENOSPC, "io_error": errno.EIO}


class BadFiles:
    """Spoils files of one rank. What it prepares stays until it has happened: a save comes behind the step.

    Args:
        saver: see checkpoint.saver; its files are spoilt.
        rank: of the run.
    """

    def __init__(self, saver: Any, rank: int) -> None:
        self._saver, self._rank = saver, rank

    def spoil(self, fault: FaultRecipe, fires: Fires) -> None:
        """Prepare a fault of the next checkpoint, or of the next samples that are read.

        Args:
            fires: asked each time that it could happen.
        """
        if fault.kind == "torn_write":
            self._tear(fault, fires)
        elif fault.place == "loader":
            _fail(token_file, "pread", ERRORS[fault.kind], fires, passed=0)
        else:
            _fail(writer, "write", ERRORS[fault.kind], fires, passed=1)  # a header is on the disk by then

    def _tear(self, fault: FaultRecipe, fires: Fires) -> None:
        """Cut a file of this rank in half, before the checkpoint is renamed, or when it has been."""
        saver, before_it_counts = self._saver, fault.place == "save"
        name = "_check" if before_it_counts else "_saved"
        once = getattr(saver, name)

        def torn() -> None:
            folder = next(saver.root.glob(f"{UNFINISHED}*"), None) if before_it_counts else saver.newest[1]
            following = folder is not None and int(folder.name.rpartition("-")[2]) >= fault.step
            path = self._file(folder) if folder is not None and following else None
            if path is not None and fires():
                os.truncate(path, path.stat().st_size // 2)
            once()

        setattr(saver, name, torn)

    def _file(self, folder: Path) -> Path | None:
        """A file that this rank has written, else any rank's; None where there is none yet."""
        files = sorted(folder.glob("*.safetensors"))
        own = [path for path in files if f"-{self._rank:05d}-" in path.name]
        return next(iter(own or files), None)


def _fail(module: ModuleType, name: str, number: int, fires: Fires, *, passed: int) -> None:
    """Let one system call of a module fail, as often as the fault happens.

    Args:
        name: of the call.
        number: the error's.
        passed: calls that work before.
    """
    before: Any = module.os
    module.os = _Failing(before, name, number, fires, passed)  # type: ignore[attr-defined]


class _Failing:
    """The module ``os``, one call of which fails."""

    def __init__(self, real: Any, name: str, number: int, fires: Fires, passed: int) -> None:
        self._real, self._name, self._number, self._fires, self._passed = real, name, number, fires, passed

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._real, name)
        if name != self._name:
            return call

        def fails(*arguments: Any) -> Any:
            self._passed -= 1
            if self._passed < 0 and self._fires():
                raise OSError(self._number, os.strerror(self._number))
            return call(*arguments)

        return fails
