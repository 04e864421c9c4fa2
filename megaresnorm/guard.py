"""What becomes of a step that was refused: made again, then left out, passed over from a checkpoint, or the end.

An engine refuses a step whose loss or gradient norm is not finite, or above the bounds of a spike, before anything
changes. All decisions are made from numbers that all ranks have alike.
"""

import logging
from collections.abc import Callable
from math import isfinite
from pathlib import Path

from megaresnorm.data.loader import SampleRange, StepBatch
from megaresnorm.engines.attribution import IN_SUMS, Attribution, Finding
from megaresnorm.engines.digests import Sentry
from megaresnorm.engines.engine import StepStats
from megaresnorm.engines.replay import Replay
from megaresnorm.errors import CorruptionError, NonFiniteError
from megaresnorm.resilience.signals import exit_reason
from megaresnorm.run import Run
from megaresnorm.telemetry.incidents import Incidents
from megaresnorm.telemetry.log import skipped_line

log = logging.getLogger(__name__)


class Guard:
    """Judges the steps of one run, on all ranks alike.

    Args:
        run: whose state it counts in, and which it takes back.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._recipe = run, run.recipe.guard
        self._incidents = Incidents(run.output, writes=run.context.is_first_rank)
        self._replay = Replay(run.recipe, run.engine)
        self._sentry = Sentry(run.engine, run.context, self._recipe.digest_every)

    @property
    def metrics(self) -> dict[str, float | None]:
        """What was done so far, as far as anything was."""
        record = self._run.guard
        counts = {"reruns": record.reruns, "skips": record.skips, "rollbacks": record.rollbacks}
        return {name: count for name, count in counts.items() if count}

    def begin(self) -> None:
        """Tell the engine what the next step may have at most."""
        watched = self._recipe.spike != "none"
        self._run.engine.policy.bounds = self._run.guard.spikes.bounds() if watched else None

    def made(self, step: Callable[[], StepStats]) -> StepStats:
        """Make a step; where ``guard.replay_every`` asks for it twice, and again if a rank has computed two gradients.

        Raises:
            CorruptionError: a rank has done so both times; nothing was updated.
        """
        number = self._run.steps_done + 1
        try:
            with self._replay.seen_in(number):
                return step()
        except CorruptionError as e:
            self._note_replay(e, number, "made again")
        try:
            with self._replay.seen_in(number):
                return step()
        except CorruptionError as e:
            self._note_replay(e, number, "stop")
            raise

    def _note_replay(self, error: CorruptionError, step: int, action: str) -> None:
        self._run.guard.reruns += action == "made again"
        rank, host = error.found[0]
        log.warning("warning: %s; %s", error, action)
        self._incidents.note("corruption", step, str(error), rank=rank, host=host, action=action)

    def judge(self, stats: StepStats, batch: StepBatch, again: Callable[[], StepStats]) -> StepStats | None:
        """What has become of a step in the end.

        Args:
            stats: of the step.
            again: makes it once more.

        Returns:
            Of the step as it was applied or left out; None where the run has gone back to a checkpoint.

        Raises:
            NonFiniteError: the run is to end.
        """
        run = self._run
        if stats.applied:
            run.skipped_in_a_row = 0
            assert stats.loss is not None
            run.guard.spikes.add(stats.loss, stats.gradient_norm)
            return stats
        if stats.loss is None:  # no labels
            return stats
        if stats.lowered_to is not None:  # an overflow that a smaller loss scale may cure is no fault of the run
            number, steps = run.steps_done + 1, run.recipe.train.steps
            log.info(skipped_line(number, steps, stats.loss, stats.loss_scale, stats.lowered_to))
            return stats
        finding = None
        if not self._overflows(stats) and not run.skipped_in_a_row:  # of several in a row the first one tells
            repeated, finding = self._made_again(stats, batch, again)
            if repeated.applied:
                return self.judge(repeated, batch, again)
            stats = repeated
        return self._refused(stats, batch, finding)

    def replicas_agree(self, *, saves: bool) -> bool:
        """Compare what ranks hold alike, where that is due, and always before it is saved. Collective.

        Where they differ the run goes back to the newest checkpoint, which has been compared itself: what the odd rank
        has added to gradients since is undone as well. Without one the odd rank takes over what the others have.

        Returns:
            False where the run has gone back.

        Raises:
            CorruptionError: they differ, and neither can be done.
        """
        run = self._run
        if not (saves or self._sentry.due(run.steps_done)):
            return True
        try:
            self._sentry.check(run.steps_done)
        except CorruptionError as e:
            return self._repaired(e)
        return True

    def save(self) -> bool:
        """Begin a checkpoint. Where weights or moments turn out not to be finite, the run goes back if it may.

        Returns:
            False where it has gone back.

        Raises:
            TrainingError: as ``Run.save``.
        """
        run, step = self._run, self._run.steps_done
        try:
            run.save()
        except NonFiniteError as e:
            run.saver.join()
            may = self._recipe.nonfinite == "rollback" and run.guard.rollbacks < self._recipe.max_rollbacks
            action = "rollback" if may and run.saver.newest is not None else "stop"
            self._incidents.note("nonfinite", step, str(e), transient=False, action=action)
            if action == "stop":
                raise
            log.warning("warning: %s", e)
            self._go_back(step, None)
            return False
        return True

    def save_last(self, stopped: int) -> Path | None:
        """The checkpoint with which a run ends. Where ranks differ none is made of a run that is stopped. Collective.

        Args:
            stopped: exit code of what ended it before its last step; 0 at its end.

        Raises:
            TrainingError: as ``Run.save_last``; ranks differ, and there is no checkpoint to go on from.
        """
        run = self._run
        if not stopped:
            return run.save_last(None)
        try:
            self._sentry.check(run.steps_done)
        except CorruptionError as e:
            self._note_corruption(e, "not saved")
            run.saver.wait()
            if run.saver.newest is None:
                raise
            log.warning("%s: nothing was saved; %s", exit_reason(stopped), run.saver.what_there_is())
            return run.saver.newest[1]
        return run.save_last(exit_reason(stopped))

    def _repaired(self, error: CorruptionError) -> bool:
        run, step = self._run, self._run.steps_done
        run.saver.join()
        goes_back = run.saver.newest is not None and run.guard.rollbacks < self._recipe.max_rollbacks
        restored = not goes_back and self._sentry.digests is not None and self._sentry.digests.restore(error.found)
        action = "rollback" if goes_back else "restored" if restored else "stop"
        self._note_corruption(error, action)
        if goes_back:
            self._go_back(step, None)
        elif restored:
            log.warning("warning: step %d: the odd rank has taken over what the others hold", step)
        else:
            raise CorruptionError(
                f"{error}; {run.saver.what_there_is()}, guard.max_rollbacks={self._recipe.max_rollbacks}"
            )
        return not goes_back

    def _note_corruption(self, error: CorruptionError, action: str) -> None:
        odd = next((one for one in error.found if one.odd), error.found[0])
        rank = odd.odd[0] if odd.odd else None
        host = None if rank is None else odd.hosts[odd.members.index(rank)]
        log.warning("warning: %s", error)
        about = {"tensors": list(odd.tensors[:8]), "members": list(odd.members), "action": action}
        self._incidents.note("corruption", self._run.steps_done, str(error), rank=rank, host=host, **about)

    @staticmethod
    def _overflows(stats: StepStats) -> bool:
        """Whether a loss scale that does not move is too large, which a second time would be no news."""
        return (stats.loss_scale or 1.0) > 1.0 and isfinite(stats.loss or 0.0)

    def _made_again(
        self, stats: StepStats, batch: StepBatch, again: Callable[[], StepStats]
    ) -> tuple[StepStats, Finding | None]:
        """The step once more, from the same weights and samples: a fault that does not come again was none of theirs.

        Returns:
            Its stats, and where the first number arises that is not finite, if one does.
        """
        run, step = self._run, self._run.steps_done + 1
        run.guard.reruns += 1
        attribution = Attribution(run.engine, batch)
        with attribution.watching():
            repeated = again()
        run.saver.join()  # the ranks' messages about it and about a checkpoint would mix
        finding = attribution.finding()
        if finding is None and not repeated.is_finite:
            finding = IN_SUMS
        if repeated.applied:
            what = (
                f"step {step} was refused ({_figures(stats)}) and, made again, is fine ({_figures(repeated)}): a fault "
                "of a device or of its memory, not of the data or the model"
            )
            log.warning("warning: %s", what)
            self._incidents.note(self._kind(stats), step, what, transient=True, action="made again")
        return repeated, finding

    @staticmethod
    def _kind(stats: StepStats) -> str:
        return "spike" if stats.is_finite else "nonfinite"

    def _refused(self, stats: StepStats, batch: StepBatch, finding: Finding | None) -> StepStats | None:
        """Leave the step out, pass over its samples from a checkpoint, or end."""
        run, step, kind = self._run, self._run.steps_done + 1, self._kind(stats)
        policy = self._recipe.spike if kind == "spike" else self._recipe.nonfinite
        run.saver.join()  # on all ranks alike there is a checkpoint, or none
        run.skipped_in_a_row += 1
        if kind == "nonfinite" and run.first_refused is None:
            run.protect_checkpoints(run.steps_done)
        what = f"step {step} refused: {self._why(stats, batch, finding)}"
        log.warning("%s", what)
        action: str = policy
        if policy == "rollback":
            action = self._rollback_or_less(finding)
        elif finding is not None and finding.in_weights:  # no step could be applied any more
            action = "stop"
        self._incidents.note(
            kind,
            step,
            what,
            rank=finding and finding.rank,
            host=finding and finding.host,
            block=finding and finding.block,
            samples=self._samples(batch, finding),
            transient=False,
            action=action,
        )
        if action == "stop":
            most = self._recipe.max_rollbacks
            over = policy == "rollback" and run.guard.rollbacks >= most
            used = f", and the run has gone back guard.max_rollbacks={most} times" if over else ""
            raise NonFiniteError(f"{what}; guard.{kind}={policy}{used}; {self._what_there_is()}")
        if action == "rollback":
            self._go_back(step, None if finding is not None and finding.in_weights else batch.samples)
            return None
        run.guard.skips += 1
        self._check_budget(stats)
        return stats

    def _rollback_or_less(self, finding: Finding | None) -> str:
        """Go back, or where there is nothing to go back to leave the step out; a weight that is spoilt ends the run."""
        if self._run.guard.rollbacks >= self._recipe.max_rollbacks:
            return "stop"
        if self._run.saver.newest is not None:
            return "rollback"
        if finding is not None and finding.in_weights:
            return "stop"
        log.warning("warning: there is no checkpoint to go back to; the step is left out")
        return "skip"

    def _go_back(self, step: int, passed: SampleRange | None) -> None:
        run = self._run
        run.roll_back(passed)
        over = "" if passed is None else f", passing over samples {passed.position} to {passed.last}"
        what = f"from step {step} back to step {run.steps_done}{over} ({run.guard.rollbacks} of guard.max_rollbacks)"
        log.warning("rollback  %s", what)
        self._incidents.note(
            "rollback", step, what, to_step=run.steps_done, passed=None if passed is None else list(passed)
        )

    def _check_budget(self, stats: StepStats) -> None:
        """End where too many steps were left out.

        Raises:
            NonFiniteError: train.max_skipped_steps in a row, or guard.max_skips in all.
        """
        run, train = self._run, self._run.recipe.train
        step, kind = run.steps_done + 1, "a spike of" if stats.is_finite else "a non-finite"
        if run.skipped_in_a_row >= train.max_skipped_steps:
            raise NonFiniteError(
                f"{run.skipped_in_a_row} steps in a row had {kind} loss or gradient, up to step "
                f"{step}{self._at_scale(stats)}; {self._remedy(stats)}; {self._what_there_is()}"
            )
        if run.guard.skips >= self._recipe.max_skips:
            raise NonFiniteError(
                f"{run.guard.skips} steps were left out up to step {step} (guard.max_skips), the last for {kind} loss "
                f"or gradient; {self._remedy(stats)}; {self._what_there_is()}"
            )

    def _why(self, stats: StepStats, batch: StepBatch, finding: Finding | None) -> str:
        bounds, words = self._run.engine.policy.bounds, _figures(stats)
        if stats.is_finite and bounds is not None:
            words += f", at most {bounds.loss:.4g} and {bounds.norm:.4g} by the last steps"
            return f"{words} (a spike); samples {self._shown(batch)}"
        where = "" if finding is None else f"; first not finite: {finding}"
        return f"{words}{self._at_scale(stats)}{where}"

    @staticmethod
    def _shown(batch: StepBatch) -> str:
        return "of the step" if batch.samples is None else f"{batch.samples.position} to {batch.samples.last}"

    @staticmethod
    def _samples(batch: StepBatch, finding: Finding | None) -> list[int]:
        """Of the fault, or first and last of the step."""
        if finding is not None and finding.samples:
            return list(finding.samples)
        return [] if batch.samples is None else [batch.samples.position, batch.samples.last]

    def _at_scale(self, stats: StepStats) -> str:
        return f", at precision.loss_scale={stats.loss_scale:g}" if self._overflows(stats) else ""

    def _remedy(self, stats: StepStats) -> str:
        if self._overflows(stats):
            return "lower that, or set it to dynamic"
        return f"try a smaller optim.lr, or look at samples {self._run.samples_done} and before"

    def _what_there_is(self) -> str:
        none = self._run.saver.newest is None
        spoilt = "" if none else " (where that is spoilt already, remove it to go on from the one before)"
        return f"{self._run.saver.what_there_is()}{spoilt}"


def _figures(stats: StepStats) -> str:
    return f"loss {stats.loss:g}, gradient norm {stats.gradient_norm:g}"
