"""The training loop. Read this first.

Randomness is never drawn from a generator that a run would have to save: the initial weights are a function of
(seed, name), sample i of (seed, i), a dropout mask of (seed, place, row, column). So a checkpoint needs the weights, the
optimizer's state and two integers (steps, samples), and a resumed run is equal to one that never stopped, bit for bit.
"""

import logging
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch

import megaresnorm
from megaresnorm.assemble import Assembled, build_model, compare_kernels
from megaresnorm.checkpoint.manifest import weights_digest
from megaresnorm.checkpoint.resume import check_same_run, open_newest, open_weights, wait_until_seen
from megaresnorm.checkpoint.saver import Saver
from megaresnorm.checkpoint.state import RunState, state_of
from megaresnorm.checkpoint.writer import Kept, bytes_of
from megaresnorm.data.loader import Batch, microbatches
from megaresnorm.data.samples import Samples, unigram_entropy
from megaresnorm.engines.engine import Decision, GradientStats
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import NonFiniteError, TrainingError, UserError
from megaresnorm.files import remove_unfinished, replace_file
from megaresnorm.generate import generate
from megaresnorm.opening import Opened, note_progress, open_recipe
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.control import share_results, together
from megaresnorm.parallel.mesh import ParallelContext, start_process_group
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.lock import LOCK, FolderLock
from megaresnorm.resilience.preflight import check_output
from megaresnorm.resilience.signals import StopSignals, exit_reason
from megaresnorm.schedule import batch_size, learning_rate
from megaresnorm.telemetry.describe import data_name, describe_run
from megaresnorm.telemetry.log import log_to_console_by_default, progress_bar, step_line
from megaresnorm.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Losses are means a token in nats, None where a signal came before them; exit_code as of StopSignals. checkpoint: the
    newest; None where a signal came before one could be written.   weights_digest: SHA-256 of the digests of its weight
    files: equal runs in one layout have equal digests, where printed losses can hide a difference; empty without one.
    """

    steps: int
    train_loss: float | None
    valid_loss: float | None
    unigram_entropy: float | None
    checkpoint: Path | None
    weights_digest: str
    exit_code: int


def train(recipe: Recipe) -> RunSummary:
    """Train, or go on training, the run in ``recipe.train.output``.

    Raises: ConfigError, DataError, CheckpointError or TrainingError, one line each.
    """
    log_to_console_by_default()
    with StopSignals() as stop, Run(recipe) as run:
        return run.train(stop)


class Run:
    """One run: its data, engine, position and output folder, which it holds until it is closed (``with Run(recipe) as run``); or
    until the process ends, where an error that other ranks may not have closes it in the middle of a checkpoint.

    Building it checks all that can be checked before step 0.   fallback: whether a damaged newest checkpoint may be passed over.
    """

    def __init__(self, recipe: Recipe | Opened, *, fallback: bool = True) -> None:
        opened = recipe if isinstance(recipe, Opened) else open_recipe(lambda: recipe)
        assert opened.sizes is not None and not opened.idles
        self.environment, self._store, self.data = opened.environment, opened.store, opened.data
        self.recipe, self.samples, self.valid = opened.recipe, opened.samples, opened.valid
        self.output, self.device = Path(self.recipe.train.output), opened.device
        if opened.store is not None:
            start_process_group(self.device, opened.store, opened.environment.rank, opened.sizes.num_ranks)
        self.context = ParallelContext.create(opened.sizes, self.device.type)
        self._lock: FolderLock | None = None
        try:
            self._together(self._lock_output)
            self._together(self._see_output)
            self._build(fallback)
        except BaseException:
            self.close()
            raise

    def _build(self, fallback: bool) -> None:
        recipe = self.recipe
        self.assembled: Assembled = build_model(
            recipe.model,
            recipe.precision,
            recipe.kernels,
            recipe.parallel,
            self.context,
            seed=recipe.train.seed,
            device=self.device,
            compiled=recipe.train.compile,
        )
        self.engine = NativeEngine(self.assembled, recipe)
        self.steps_done = self.samples_done = self.skipped_in_a_row = 0
        self.first_refused: int | None = None
        self._warned_of_no_labels = False
        self.train_loss: float | None = None
        self.saver = self._make_saver()
        compare_kernels(self.assembled)
        self._resume(fallback)
        self._together(self._prepare_output)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        alike = error is None or isinstance(error, UserError)  # on all ranks; after another error, some may be gone
        try:
            if alike or self.context.world.size == 1:
                if self.saver.busy:
                    log.info("waiting   for the checkpoint that is being written")
                self.saver.join()
        finally:
            if not self.saver.busy:  # whoever had the folder next would remove what is being written
                self.close()

    def close(self) -> None:
        """Leave the output folder to others."""
        if self._lock is not None:
            self._lock.release()

    def describe(self) -> list[str]:
        """What this run is, in lines for the console."""
        return describe_run(self.recipe, self.assembled, self.samples)

    def train(self, stop: StopSignals) -> RunSummary:
        """Steps until the recipe's end, a signal or the time limit, on all ranks the same; then a checkpoint.

        Raises: NonFiniteError where the last steps were refused, or weights are not finite: then nothing is saved.
        """
        steps = self.recipe.train.steps
        stopped = 0
        metrics = self._together(self._open_metrics)
        stop.begin(self.recipe.train.max_minutes)
        try:
            with progress_bar("training", steps, self.steps_done) as progress:
                while self.steps_done < steps and not (stopped := self._largest(stop.exit_code)):
                    record = self._step()
                    if metrics is not None:
                        metrics.write(self.steps_done - 1, record)
                    if self.steps_done % self.recipe.train.log_every == 0 or "valid_loss" in record:
                        log.info(step_line(self.steps_done, steps, record))
                    if self._due(self.recipe.checkpoint.every):
                        self.save()
                    progress.advance(progress.task_ids[0])
        finally:
            if metrics is not None:
                metrics.close()
        checkpoint = self._save_last(stopped)
        return RunSummary(
            steps=self.steps_done,
            train_loss=self.train_loss,
            valid_loss=None if stopped else self.evaluate(),
            unigram_entropy=None if stopped else unigram_entropy(self.samples.token_shares()),
            checkpoint=checkpoint,
            weights_digest=self._digest_of(checkpoint),
            exit_code=stopped,
        )

    def _save_last(self, stopped: int) -> Path | None:
        """The checkpoint with which this start of the run ends. stopped: exit code of what ended it early, or 0."""
        steps = self.recipe.train.steps
        if not self.skipped_in_a_row:
            checkpoint = self.save_now()
            if stopped:
                log.warning(
                    "%s: saved step %d of %d; start again to go on", exit_reason(stopped), self.steps_done, steps
                )
            return checkpoint
        self.saver.wait()
        refused = (
            f"the last {self.skipped_in_a_row} steps were refused, so nothing was saved; {self.saver.what_there_is()}"
        )
        if not stopped:
            raise NonFiniteError(f"step {self.steps_done} of {steps} is done, but {refused}")
        log.warning("%s: %s", exit_reason(stopped), refused)
        return None if self.saver.newest is None else self.saver.newest[1]

    def _digest_of(self, checkpoint: Path | None) -> str:
        """Read by the first rank: a network file system shows it to the others later."""

        def digest() -> str:
            return "" if checkpoint is None or not self.context.is_first_rank else weights_digest(checkpoint)

        return share_results(digest, self.context.messages)[0]

    def sample_text(self) -> str | None:
        """A continuation of train.sample_prompt; None without a tokenizer, when switched off, or with several ranks."""
        train = self.recipe.train
        if self.data.tokenizer is None or not train.sample_tokens or self.context.world.size > 1:
            return None
        return generate(
            self.engine.model, self.data.tokenizer, train.sample_prompt, train.sample_tokens, seed=train.seed
        )

    def evaluate(self) -> float | None:
        """Loss on the first train.eval_samples validation samples, always the same ones; None without a validation split.

        Raises: TrainingError where none of them has a label.
        """
        if self.valid is None:
            return None
        count = min(self.recipe.train.eval_samples, self.valid.per_epoch)
        loss = self.engine.evaluate(self._batches(self.valid, 0, count))
        if loss is None:
            raise TrainingError(
                f"none of the {count} validation samples has a label (data.mask_documents, documents of one token); raise "
                "train.eval_samples, or set data.valid_fraction to 0"
            )
        return loss

    def save(self) -> None:
        """Begin a checkpoint of the present step, unless there is one. None while steps are refused: the weights may be why."""
        if self.saver.newest is not None and self.saver.newest[0] == self.steps_done:
            return
        if self.skipped_in_a_row:
            log.warning("warning: step %d is not saved while steps are being refused", self.steps_done)
            return
        tokenizer = None if self.data.tokenizer is None else self.data.tokenizer.describe()
        attached = {}
        if self.data.tokenizer is not None and tokenizer is not None and "file" in tokenizer:
            attached[tokenizer["file"]] = self.data.tokenizer.model
        state = RunState(
            samples=self.samples_done,
            skipped_in_a_row=self.skipped_in_a_row,
            first_refused=self.first_refused,
            train_loss=self.train_loss,
            engine=self.engine.state(),
            recipe=self.recipe.model_dump(exclude_none=True),
            data=self.data.digest,
            tokenizer=tokenizer,
            kernels=self.assembled.kernel_choices,
            versions={
                "megaresnorm": megaresnorm.__version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        )
        self.saver.save(self.steps_done, state.model_dump(), attached)

    def save_now(self) -> Path:
        """The checkpoint of the present step, once it is on disk. Raises: TrainingError where it cannot be written."""
        self.saver.wait()
        self.save()
        self.saver.wait()
        step, path = self.saver.newest or (-1, Path())
        if step != self.steps_done:
            raise TrainingError(
                f"step {self.steps_done} could not be saved, see the warning above; start again to go on"
            )
        return path

    def _step(self) -> dict[str, float | None]:
        """One optimizer step, and what is recorded of it: no loss where no token had a label."""
        start, step = time.perf_counter(), self.steps_done
        count, lr = batch_size(step, self.recipe.train), learning_rate(step, self.recipe)
        stats = self.engine.step(self._batches(self.samples, self.samples_done, count), lr, self._accept)
        self.steps_done += 1
        self.samples_done += count
        if stats.loss is None and not self._warned_of_no_labels:
            self._warned_of_no_labels = True
            log.warning(
                "warning: no token of step %d has a label; it and others like it change nothing", self.steps_done
            )
        self.train_loss = stats.loss if stats.applied else self.train_loss
        record: dict[str, float | None] = {
            "loss": stats.loss,
            "gradient_norm": stats.gradient_norm,
            "lr": lr,
            "samples": self.samples_done,
            "tokens_per_second": stats.tokens / (time.perf_counter() - start),
        }
        if self._due(self.recipe.train.eval_every):
            valid_loss = self.evaluate()
            if valid_loss is not None:
                record["valid_loss"] = valid_loss
        return record

    def _accept(self, stats: GradientStats) -> Decision:
        """Refuse a step that would put NaN or Inf into the weights; give up when that goes on."""
        if stats.finite:
            self.skipped_in_a_row = 0
            return Decision.APPLY
        self.skipped_in_a_row += 1
        if self.first_refused is None:
            self._protect_checkpoints(self.steps_done)
        log.warning("step %d refused: loss %g, gradient norm %g", self.steps_done + 1, stats.loss, stats.norm)
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise NonFiniteError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, up to step {self.steps_done + 1}; "
                f"try a smaller optim.lr, or look at samples {self.samples_done} and before; {self.saver.what_there_is()} (where "
                "that is spoilt already, remove it to go on from the one before)"
            )
        return Decision.SKIP

    def _protect_checkpoints(self, step: int) -> None:
        """Those up to the first step that was ever refused stay, whatever comes after: they may be the last good ones."""
        self.first_refused = self.saver.protected = step

    def _batches(self, samples: Samples, position: int, count: int) -> Iterator[Batch]:
        micro = self.recipe.train.micro_batch_of(self.context.data.size, self.context.pp.size)
        masked = self.recipe.data.mask_documents
        return microbatches(samples, position, count, micro, self.context, self.device, mask_documents=masked)

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is true on any rank. Collective."""
        return bool(self._largest(int(flag)))

    def _largest(self, number: int) -> int:
        """Maximum over all ranks. Collective."""
        return int(all_gather_blocks(torch.tensor([number], device=self.device), self.context.world).max())

    def _together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, if it fails on no rank; between steps, when nothing is being saved."""
        return together(work, self.context.messages)

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    def _resume(self, fallback: bool) -> None:
        """Take over the newest whole checkpoint of the output folder, if there is one."""
        with progress_bar("verifying the checkpoint", None, of_bytes=True) as bar:
            advance = partial(bar.advance, bar.task_ids[0])
            checkpoint = open_newest(
                self.output / "checkpoints", self.context.messages, fallback=fallback, progress=advance
            )
        if checkpoint is None:
            self._start_from_weights()
            return
        state = self._together(lambda: state_of(checkpoint.folder, checkpoint.state))
        name = data_name(self.recipe)
        self._together(lambda: check_same_run(checkpoint, state, self.recipe, self.data, name))
        self._together(lambda: self.engine.load(checkpoint, state.engine))
        self.steps_done, self.samples_done = checkpoint.step, state.samples
        self.skipped_in_a_row, self.train_loss = state.skipped_in_a_row, state.train_loss
        if state.first_refused is not None:
            self._protect_checkpoints(state.first_refused)
        self._together(lambda: self.engine.check_finite(f"{checkpoint.folder}: "))
        self.saver.newest = (checkpoint.step, checkpoint.folder)
        log.info("resumed   %s: step %d of %d", checkpoint.folder, self.steps_done, self.recipe.train.steps)

    def _start_from_weights(self) -> None:
        """At step 0: those of train.initial_weights, if it is set."""
        if self.recipe.train.initial_weights is None:
            return
        tokenizer = None if self.data.tokenizer is None else self.data.tokenizer.describe()
        checkpoint = open_weights(self.recipe, tokenizer, self.context.messages)
        self._together(lambda: self.engine.load_weights(checkpoint))
        self._together(lambda: self.engine.check_finite(f"train.initial_weights={checkpoint.folder}: "))
        log.info("weights   %s", checkpoint.folder)

    def _make_saver(self) -> Saver:
        settings = self.recipe.checkpoint
        return Saver(
            self.output / "checkpoints",
            self.engine.slices,
            self.context.messages,
            self._any_rank,
            check=self._check_lock,
            kept=Kept(settings.keep, settings.keep_every),
            asynchronous=settings.asynchronous,
            skip_when_busy=settings.when_busy == "skip",
            max_failures=settings.max_failures,
            saved=partial(note_progress, self.environment, self._store),
        )

    def _lock_output(self) -> None:
        if self.context.is_first_rank:
            self._lock = FolderLock(self.output, f"train.output={self.output}", job=self.environment.job)

    def _see_output(self) -> None:
        """Raises: TrainingError where a rank's node does not share the output folder."""
        if not wait_until_seen(self.output / LOCK):
            raise TrainingError(
                f"train.output={self.output}: rank {self.context.world.rank} does not see it; all nodes must share this folder"
            )

    def _check_lock(self) -> None:
        """Raises: TrainingError where another job has taken the output folder over."""
        if self._lock is not None and self._lock.lost:
            raise TrainingError(f"train.output={self.output}: another job has taken it over; nothing more is written")

    def _open_metrics(self) -> MetricsWriter | None:
        if not self.context.is_first_rank:
            return None
        try:
            return MetricsWriter(self.output, first_step=self.steps_done, tensorboard=self.recipe.train.tensorboard)
        except OSError as e:
            raise TrainingError(f"train.output={self.output}: cannot be written ({e.strerror})") from None

    def _prepare_output(self) -> None:
        """What can fail of writing fails now."""
        if not self.context.is_first_rank:
            return
        check_output(self.output / "checkpoints", bytes_of(self.engine.slices), self.recipe.checkpoint.keep)
        try:
            remove_unfinished(self.output)
            replace_file(self.output / "recipe.yaml", dump_recipe(self.recipe))
        except OSError as e:
            raise TrainingError(f"train.output={self.output}: cannot be written ({e.strerror})") from None
