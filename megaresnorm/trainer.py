"""The training loop and what happens in one step. Read this first; run.py has what lies around it.

Randomness is never drawn from a generator that a run would have to save: the initial weights are a function of
(seed, name), sample i of (seed, i), a dropout mask of (seed, place, row, column). So a checkpoint needs the weights,
the optimizer's moments and a few counts (checkpoint/state.py), and a resumed run is equal to one that never stopped,
bit for bit.
"""

import logging
import time
from functools import partial

from megaresnorm.data.samples import unigram_entropy
from megaresnorm.engines.depth import depth_of
from megaresnorm.engines.engine import StepStats
from megaresnorm.engines.rank_times import RankTimes
from megaresnorm.errors import ConfigError, TrainingError
from megaresnorm.guard import Guard
from megaresnorm.profiling.window import Profiler
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.faults import Drill, Subject
from megaresnorm.resilience.host import process_age
from megaresnorm.resilience.signals import START_AGAIN, StopSignals
from megaresnorm.run import Run
from megaresnorm.schedule import learning_rate
from megaresnorm.telemetry.goodput import Goodput
from megaresnorm.telemetry.incidents import Incidents, ended_on_purpose
from megaresnorm.telemetry.log import (
    bar_note,
    log_lines,
    log_to_console_by_default,
    progress_bar,
    step_line,
)
from megaresnorm.telemetry.metrics import DEPTH, NUMBERS, MetricsWriter
from megaresnorm.telemetry.numbers import Numbers
from megaresnorm.telemetry.summary import RunSummary
from megaresnorm.telemetry.throughput import Meter

log = logging.getLogger(__name__)


def train(recipe: Recipe) -> RunSummary:
    """Train, or go on training, the run in ``recipe.train.output``, and say what it does.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: one line each, on all ranks.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"train takes a recipe, train(load_recipe(PATH)), not a {type(recipe).__name__}")
    log_to_console_by_default()
    with StopSignals() as stop, Run(recipe) as run:
        log_lines(run.describe())
        summary = Trainer(run).train(stop)
        log_lines(summary.describe())
    return summary


class Trainer:
    """Takes a run to its end, step by step, on all ranks alike.

    Args:
        profiler: measures steps; None: those of ``train.profile``.
    """

    def __init__(self, run: Run, profiler: Profiler | None = None) -> None:
        self.run = run
        run.watchdog.watch(self)
        self.meter = Meter.of(run.recipe, run.context.world.size, run.device)
        self.numbers = Numbers(run.recipe, run.engine.assembled, run.engine.tensors["weights"])
        window, folder = run.recipe.train.profile, run.output / "profile"
        self.profiler = profiler or Profiler(run, window, folder, "train.profile", tells=True)
        self.depth = depth_of(run.recipe, run.engine, run.samples)
        subject = Subject(run.context, run.engine, run.loader, run.saver, run.recipe.model.vocab_size or 0)
        self.drill = Drill(run.recipe.drill, run.output, subject)
        self.guard, self.goodput = Guard(run), Goodput(process_age() if run.watchdog.whole else 0.0)
        self.incidents = Incidents(run.output, writes=run.context.is_first_rank)
        self.rank_times = RankTimes(run.context, run.engine, run.watchdog.beats, self.incidents, self.goodput.waited)
        self._stop: StopSignals | None = None
        self._asked_to_stop = False
        self._warned_of_no_labels = False

    def train(self, stop: StopSignals) -> RunSummary:
        """Steps until the recipe's end, a signal or the time limit; then a checkpoint.

        Raises:
            NonFiniteError: too many steps were refused, the last ones of the run, or one that ends it (guard.py), or
                weights are not finite; then nothing is saved.
        """
        run, train = self.run, self.run.recipe.train
        metrics, code = run.open_metrics(), 1
        if metrics is not None:
            self.goodput.resume(metrics.kept, metrics.dropped, ended=ended_on_purpose(run.output))
        self.incidents.note("start", run.steps_done + 1, f"begins, ranks: {run.context.world.size}")
        self._stop = stop
        stop.begin(train.max_minutes)
        try:
            with self.rank_times.watching():
                record, stopped = self._steps(metrics)
            with self.goodput.spends("checkpoint"):
                checkpoint = self.guard.save_last(stopped)
            self.profiler.finish()
            with self.goodput.spends("evaluation"):
                evaluation = None if stopped else run.evaluate()
            more = {} if evaluation is None else evaluation.metrics()
            if record is not None and metrics is not None:
                metrics.amend(run.steps_done, more | self.goodput.metrics())
            if record is not None and not stopped:
                log.info(step_line(run.steps_done, train.steps, record | self.meter.mean() | more))
            code = stopped
            if code != START_AGAIN:  # with other nodes, for which the run has waited
                self.incidents.note("end", run.steps_done, f"ends with exit code {code}", code=code)
        except TrainingError as e:
            self.incidents.note("end", run.steps_done, str(e), code=e.exit_code)
            raise
        finally:
            if metrics is not None:
                metrics.close(code)
        return RunSummary(
            steps=run.steps_done,
            train_loss=run.train_loss,
            evaluation=evaluation,
            unigram_entropy=None if stopped else unigram_entropy(run.samples.token_shares()),
            checkpoint=checkpoint,
            weights_digest=run.digest_of(checkpoint),
            exit_code=stopped,
        )

    def _steps(self, metrics: MetricsWriter | None) -> tuple[dict[str, float | None] | None, int]:
        """All steps that are left, until something stops them. The last one is evaluated when it has been saved.

        Returns:
            What is recorded of the last step, and the exit code of what stopped the run; None and 0 without.
        """
        run, train = self.run, self.run.recipe.train
        stopped = run.largest(self._stop.exit_code) if self._stop and not run.is_finished else 0
        record: dict[str, float | None] | None = None
        with progress_bar("training", train.steps, run.steps_done) as progress:
            while not run.is_finished and not stopped:
                before, record = run.steps_done, self.step()
                saves = self._due(run.recipe.checkpoint.every)
                if record is None:
                    self._went_back(metrics)
                    progress.advance(run.steps_done - before)
                    continue
                if self._due(train.eval_every) and not run.is_finished:
                    with self.goodput.spends("evaluation"):
                        evaluation = run.evaluate()
                    record |= {} if evaluation is None else evaluation.metrics()
                if metrics is not None:
                    metrics.write(run.steps_done, record | self.goodput.metrics(), self._records())
                if (self._due(train.log_every) or "valid_loss" in record) and not run.is_finished:
                    log.info(step_line(run.steps_done, train.steps, record | self.meter.mean()))
                if saves:
                    with self.goodput.spends("checkpoint"):
                        stays = self.guard.save()
                    if not stays:
                        self._went_back(metrics)
                progress.advance(run.steps_done - before, note=bar_note(record))
                # A signal of the step came with its vector; what takes time beside a step is asked about here.
                asks = self._asked_to_stop or saves or "valid_loss" in record or run.context.world.size == 1
                stopped = run.largest(self._stop.exit_code) if self._stop and asks and not run.is_finished else 0
        return record, stopped

    def _went_back(self, metrics: MetricsWriter | None) -> None:
        self.rank_times.begin_anew()
        if metrics is not None:
            metrics.go_back(self.run.steps_done + 1)
            self.goodput.went_back(metrics.kept)

    def step(self) -> dict[str, float | None] | None:
        """One optimizer step.

        Returns:
            What is recorded of it; its loss is None where no token had a label. None where the run has gone back to a
            checkpoint instead.

        Raises:
            NonFiniteError: it, or the last of too many, was refused (guard.py).
        """
        with self.drill.seen_in(self.run.steps_done + 1), self.profiler.seen_in(self.run.steps_done + 1):
            record = self._step()
        if record is None:  # the run has gone back
            return None
        with self.goodput.spends("checkpoint"):
            saves = self.run.is_finished or self._due(self.run.recipe.checkpoint.every)
            if not self.guard.replicas_agree(saves=saves):
                return None
        self.depth.probe(self.run.steps_done)
        return record | self.numbers.worst | self.depth.metrics | self.guard.metrics

    def _step(self) -> dict[str, float | None] | None:
        self.goodput.begin_step()
        self.rank_times.begin_step()
        run, start = self.run, time.perf_counter()
        lr, batch = learning_rate(run.steps_done, run.recipe), run.next_batch()
        step = partial(run.engine.step, batch, lr, lambda: self._stop is not None and self._stop.exit_code != 0)

        def seen() -> StepStats:
            with self.numbers.seen_in(run.steps_done + 1), self.depth.seen_in(run.steps_done + 1, lr):
                return self.guard.made(step)

        self.guard.begin()
        made, once = seen(), time.perf_counter() - start
        stats, seconds = self.guard.judge(made, batch, seen), time.perf_counter() - start
        again = once if stats is not None and stats.applied else seconds
        self.goodput.step(seconds, lost=0.0 if stats is made and made.applied else again)
        if stats is None:
            return None
        self._asked_to_stop = stats.stop
        run.step_is_done()
        if stats.loss is None and not self._warned_of_no_labels:
            self._warned_of_no_labels = True
            log.warning(
                "warning: no token of step %d has a label; it and others like it change nothing", run.steps_done
            )
        run.train_loss = stats.loss if stats.applied else run.train_loss
        seq_len = run.recipe.model.seq_len
        tokens = (0 if batch.samples is None else batch.samples.num_samples) * seq_len
        record: dict[str, float | None] = {
            "loss": stats.loss,
            "gradient_norm": stats.gradient_norm,
            "lr": lr,
            "samples": run.samples_done,
            "tokens": run.samples_done * seq_len,
            "time": time.time(),
        }
        if stats.loss_scale is not None:
            record |= {"loss_scale": stats.loss_scale, "skipped": stats.skipped}
        record |= self.rank_times.record(run.steps_done, seconds)
        return record | self.meter.step(stats.tokens, tokens, seconds)

    def _records(self) -> dict[str, list[dict]]:
        """What there is of the last step beside its metrics, by file."""
        numbers = [] if self.numbers.record is None else [self.numbers.record]
        return {name: lines for name, lines in ((NUMBERS, numbers), (DEPTH, self.depth.records)) if lines}

    def _due(self, every: int) -> bool:
        return every > 0 and self.run.steps_done % every == 0
