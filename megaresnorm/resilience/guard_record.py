"""What a run keeps of steps that were refused: counts, the last good figures, and samples that are passed over."""

from megaresnorm.checkpoint.state import GuardState
from megaresnorm.data.loader import SampleRange
from megaresnorm.resilience.spikes import Spikes


class GuardRecord:
    """Kept in memory as the run goes on, and in its checkpoints.

    Args:
        state: of a checkpoint.

    Attributes:
        spikes: the figures of the last applied steps.
        reruns, skips, rollbacks: how often a step was made again, left out, and the run taken back.
        passed: samples that no step reads any more.
    """

    def __init__(self, state: GuardState | None = None) -> None:
        state = state or GuardState()
        self.spikes = Spikes(state.losses, state.norms)
        self.reruns, self.skips, self.rollbacks = state.reruns, state.skips, state.rollbacks
        self.passed = [SampleRange(*one) for one in state.passed]

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
