"""What a run keeps of steps that were refused: counts, the last good figures, and samples that are passed over."""

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaresnorm.checkpoint.state import GuardState
from megaresnorm.data.loader import SampleRange
from megaresnorm.files import replace_file
from megaresnorm.reading import read_plain_file
from megaresnorm.resilience.spikes import Spikes

log = logging.getLogger(__name__)
DECIDED = "guard.json"  # in the run's folder
MAX_BYTES = 1 << 20


class GuardRecord:
    """Kept in memory as the run goes on, and in its checkpoints.

    Args:
        state: of a checkpoint.

    Attributes:
        spikes: the figures of the last applied steps.
        reruns, skips, rollbacks: how often a step was made again, left out, and the run taken back.
        passed: samples that no step reads any more.
        spikes_in_a_row: steps that were left out for a spike up to here.
    """

    def __init__(self, state: GuardState | None = None) -> None:
        state = state or GuardState()
        self.spikes = Spikes(state.losses, state.norms)
        self.reruns, self.skips, self.rollbacks = state.reruns, state.skips, state.rollbacks
        self.passed = [SampleRange(*one) for one in state.passed]
        self.spikes_in_a_row = 0

    def state(self) -> GuardState:
        """What a checkpoint keeps of it."""
        return GuardState(
            losses=self.spikes.losses,
            norms=self.spikes.norms,
            reruns=self.reruns,
            skips=self.skips,
            rollbacks=self.rollbacks,
            passed=[[one.position, one.num_samples] for one in self.passed],
        )

    def went_back(self, before: "GuardRecord", passed: SampleRange | None) -> None:
        """The run has gone back to this record from a later one.

        Steps that were left out since are made again, and count again. What happened goes on being counted.

        Args:
            passed: samples that are to be passed over from now on; None: all are read again.
        """
        self.reruns, self.rollbacks = before.reruns, before.rollbacks + 1
        self.passed = before.passed + ([] if passed is None else [passed])

    def write(self, folder: Path) -> None:
        """Keep what was decided when the run went back until a checkpoint has it. A failure is a warning."""
        try:
            replace_file(
                folder / DECIDED, json.dumps({"rollbacks": self.rollbacks, "passed": self.state().passed}) + "\n"
            )
        except OSError as e:
            log.warning("warning: %s: cannot be written (%s)", folder / DECIDED, e.strerror)

    def decided_before(self, said: dict[str, Any]) -> None:
        """Take over what an earlier process has decided after the checkpoint that the run goes on from.

        Args:
            said: what ``read_decided`` has found on the first rank.
        """
        self.rollbacks = max(self.rollbacks, said.get("rollbacks", 0))
        known = set(self.passed)
        self.passed += [one for one in (SampleRange(*pair) for pair in said.get("passed", [])) if one not in known]

    def samples_from(self, position: int, count: int) -> SampleRange:
        """The samples of a step: the next ``count`` at ``position``, or after those that are passed over.

        >>> record = GuardRecord()
        >>> record.passed = [SampleRange(8, 4)]
        >>> record.samples_from(4, 4), record.samples_from(8, 4)
        (SampleRange(position=4, num_samples=4), SampleRange(position=12, num_samples=4))
        """
        for passed in sorted(self.passed):
            if position < passed.end and passed.position < position + count:
                position = passed.end
        return SampleRange(position, count)


def read_decided(folder: Path) -> dict[str, Any]:
    """What an earlier process has decided when the run went back; empty where there is nothing to be read."""
    try:
        said = GuardState.model_validate_json(read_plain_file(folder / DECIDED, MAX_BYTES))
    except (OSError, ValidationError):
        return {}
    return {"rollbacks": said.rollbacks, "passed": said.passed}
