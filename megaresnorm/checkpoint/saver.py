"""Saving while training goes on: a copy in host memory, and a thread that writes it.

At most one checkpoint is written at a time. The writing threads of all ranks communicate over the control group, which
the main threads leave alone meanwhile, so that they never come between the collectives of a step.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import Groups
from megaresnorm.checkpoint.host_memory import HostCopies
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.errors import CheckpointError, NonFiniteError, NonFiniteTensorError, TrainingError
from megaresnorm.parallel.mesh import Axis

log = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run, in order. Every rank makes one and calls it alike.

    Args:
        root: the folder of checkpoints.
        groups: this rank's slices of all tensors, live.
        control: all ranks; nothing else uses its group while a checkpoint is being written.
        any_rank: whether something is true on any rank. Collective, called from the main threads.
        check: as for ``save_checkpoint``.
        asynchronous: return when the tensors are copied; otherwise when they are on disk.
        skip_when_busy: leave a checkpoint out that is due while the one before is being written; otherwise wait for it.
        max_failures: how many checkpoints in a row cannot be written before TrainingError is raised.
        saved: called when a checkpoint is on disk, from the thread that wrote it.

    Attributes:
        protected: checkpoints up to this step are not pruned.
        failures: how many checkpoints in a row could not be written.
        newest: step and folder of the last checkpoint that was written, or that the run resumed from.
    """

    def __init__(
        self,
        root: Path,
        groups: Groups,
        control: Axis,
        any_rank: Callable[[bool], bool],
        *,
        check: Callable[[], None] = lambda: None,
        retention: Retention,
        asynchronous: bool,
        skip_when_busy: bool,
        max_failures: int,
        saved: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self._groups, self._control, self._any_rank = root, groups, control, any_rank
        self._kept, self._asynchronous, self._skip = retention, asynchronous, skip_when_busy
        self._max_failures, self._check, self._saved = max_failures, check, saved
        self.protected: int | None = None
        self._copies: Groups | None = None
        self._sources = list[Tensor]()
        self._memory = HostCopies([])
        self._thread: threading.Thread | None = None
        self._mistake: BaseException | None = None
        self.failures = 0
        self.newest: tuple[int, Path] | None = None

    def save(self, step: int, state: Mapping[str, Any], attached: Mapping[str, bytes]) -> None:
        """Begin a checkpoint, or write it; a failure is a warning unless it was one too many.

        Args:
            state: as for ``save_checkpoint``.
            attached: likewise.

        Raises:
            TrainingError: ``max_failures`` checkpoints in a row could not be written; on all ranks at the same step.
            NonFiniteError: weights or moments hold NaN or infinity.
        """
        if self._skip and self._any_rank(self.busy):
            log.warning("warning: step %d is not saved: the checkpoint before is still being written", step)
            return
        self.wait()
        start = time.perf_counter()
        if self._asynchronous:
            groups = self._copied()
            self._thread = threading.Thread(
                target=self._write, args=(step, groups, state, attached, start), name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._write(step, self._groups, state, attached, start)
            self._settle()

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            TrainingError, NonFiniteError: as for ``save``.
        """
        self.join()
        self._settle()

    def abandon(self) -> None:
        """As ``wait``, where the run is about to go back: that its state was not finite, and not saved, is over then.

        Raises:
            TrainingError: as for ``save``.
        """
        self.join()
        if isinstance(self._mistake, NonFiniteError):
            self._mistake = None
        self._settle()

    def join(self) -> None:
        """As ``wait``, but raise nothing, whatever came of the checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def _settle(self) -> None:
        if self._mistake is not None:
            raise self._mistake
        if self.failures >= self._max_failures:
            raise TrainingError(
                f"{self.failures} checkpoints in a row could not be written to {self.root}; {self.what_there_is()}"
            )

    def _write(self, step: int, groups: Groups, state: Mapping[str, Any], attached: Mapping, start: float) -> None:
        try:
            path = save_checkpoint(
                self.root,
                step,
                groups,
                state,
                retention=self._kept,
                protected=lambda: self.protected,
                attached=attached,
                control=self._control,
                check=self._check,
            )
        except NonFiniteTensorError as e:
            self._mistake = NonFiniteError(f"step {step} is not saved: {e}; {self.what_there_is()}")
        except CheckpointError as e:
            self.failures += 1
            count = f"{self.failures} of {self._max_failures} failures in a row"
            log.warning("warning: %s; training goes on, %s (%s)", e, self.what_there_is(), count)
        except BaseException as e:  # noqa: BLE001 - raised in the main thread
            self._mistake = e
        else:
            self.failures, self.newest = 0, (step, path)
            self._saved()
            log.info("saved     %s in %.1f s", path, time.perf_counter() - start)

    def what_there_is(self) -> str:
        """The newest checkpoint in a few words, for messages."""
        return "there is no checkpoint" if self.newest is None else f"the newest is {self.newest[1].name}"

    def _copied(self) -> Groups:
        """The groups, with the slices that this rank writes copied to host memory, which is kept for the next time."""
        if self._copies is None:
            written = [
                s for members in self._groups.values() for s in members.values() if s.owned and s.local is not None
            ]
            self._sources = [slices.local for slices in written if slices.local is not None]
            self._memory = HostCopies(self._sources)
            memory = {id(slices): target for slices, target in zip(written, self._memory.tensors, strict=True)}
            self._copies = {
                group: {n: replace(s, local=memory.get(id(s), s.local)) for n, s in members.items()}
                for group, members in self._groups.items()
            }
        if self._sources:  # empty where other ranks write all that this one holds
            with torch.no_grad():
                torch._foreach_copy_(self._memory.tensors, self._sources, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self._copies
