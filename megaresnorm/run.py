"""One run from its opening to its end: its parts, where it goes on, what it saves. trainer.py takes its steps."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import torch

from megaresnorm.assemble import compare_kernels
from megaresnorm.checkpoint.format import SOURCE
from megaresnorm.checkpoint.manifest import weights_digest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.resume import check_same_run, open_newest, open_weights
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.saver import Saver
from megaresnorm.checkpoint.state import RunState, recipe_of, state_of
from megaresnorm.data.loader import Loader, SampleRange, StepBatch
from megaresnorm.data.samples import Samples
from megaresnorm.data.training_data import open_samples
from megaresnorm.engines import engine_files, make_engine
from megaresnorm.engines.engine import Engine
from megaresnorm.errors import CheckpointError, NonFiniteError, TrainingError, UserError
from megaresnorm.evaluation import Evaluation, Validation
from megaresnorm.opening import Opened, note_progress, open_recipe
from megaresnorm.packages import versions_of_run
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.control import all_or_raise, run_on_all_ranks
from megaresnorm.parallel.mesh import ParallelContext, start_process_group
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.cluster.start import check_start
from megaresnorm.resilience.following import BACKUP
from megaresnorm.resilience.guard_record import DECIDED, GuardRecord, read_decided
from megaresnorm.resilience.output import OutputFolder
from megaresnorm.resilience.watchdog import Watchdog
from megaresnorm.schedule import batch_size, lr_jump
from megaresnorm.telemetry.describe import data_name, describe_run
from megaresnorm.telemetry.log import progress_bar
from megaresnorm.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
T = TypeVar("T")


class Run:
    """A run: its data, engine, position and output folder (``with Run(recipe) as run``).

    It holds the folder until it is closed; or until the process ends, where an error that other ranks may not have
    closes it in the middle of a checkpoint.

    Making it checks all that can be checked before step 0, and goes on from the newest checkpoint of its output folder.
    Every rank makes one, and calls its methods alike.

    Args:
        recipe: or what ``open_recipe`` has made of one.
        fallback: whether a damaged newest checkpoint may be passed over for an older one.

    Attributes:
        steps_done, samples_done: where the run stands.
        skipped_in_a_row: refused steps up to here.
        first_refused: steps done before the first one that was ever refused: checkpoints up to there are trusted.
        train_loss: of the last step that was applied, in nats a token.
        guard: what is kept of refused steps.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: one line each, on all ranks.
    """

    def __init__(self, recipe: Recipe | Opened, *, fallback: bool = True) -> None:
        opened = recipe if isinstance(recipe, Opened) else open_recipe(lambda: recipe)
        assert opened.sizes is not None and not opened.idles
        self.environment, self._store, self.data = opened.environment, opened.store, opened.data
        self.recipe, self.samples, self.valid = opened.recipe, opened.samples, opened.valid
        self.output, self.device = Path(self.recipe.train.output), opened.device
        self.watchdog = opened.watchdog or Watchdog(self.environment, self.recipe.watchdog)
        start = self.recipe.watchdog.start + BACKUP
        if opened.store is not None:
            start_process_group(self.device, opened.store, self.environment.rank, opened.sizes.num_ranks, start)
        self.context = ParallelContext.create(opened.sizes, self.device.type, start)
        check_start(self.environment, self.context, self.device)
        self.folder = OutputFolder(self.output, self.context.control, self.environment.job)
        self.steps_done = self.samples_done = self.skipped_in_a_row = self._steps_here = 0
        self.first_refused: int | None = None
        self.train_loss: float | None = None
        self.guard, self._fallback = GuardRecord(), fallback
        self._split: Literal["tokens", "documents"] = "tokens"
        self._source: bytes | None = None  # what the checkpoint that the weights come from says of its own source
        try:
            self._build()
            self._resume(fallback)
            self._validation = self._all_or_raise(self._validate_with)
            self._all_or_raise(self._prepare_output)
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        recipe = self.recipe
        self.engine: Engine = make_engine(recipe, self.context, self.device)
        self.loader = self._loader(self.samples)
        settings = recipe.checkpoint
        self.saver = Saver(
            self.output / "checkpoints",
            self.engine.tensors,
            self.context.control,
            lambda flag: bool(self.largest(int(flag))),
            check=self.folder.check,
            retention=Retention(settings.keep, settings.keep_every),
            asynchronous=settings.asynchronous,
            skip_when_busy=settings.when_busy == "skip",
            max_failures=settings.max_failures,
            saved=partial(note_progress, self.environment, self._store),
        )
        compare_kernels(self.engine.assembled)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        # A UserError is raised on every rank. Anything else may have killed some, for whom the saver would wait.
        all_ranks_raised = error is None or isinstance(error, UserError)
        try:
            if all_ranks_raised or self.context.world.size == 1:
                if self.saver.busy:
                    log.info("waiting   for the checkpoint that is being written")
                self.saver.join()
        finally:
            if not self.saver.busy:  # whoever had the folder next would remove what is being written
                self.close()

    def close(self) -> None:
        """Leave the output folder to others. The end of the process does so too."""
        self.watchdog.release()
        self.folder.release()

    def describe(self, *, full: bool = False) -> list[str]:
        """Lines for the console, with the settings that differ from the defaults, or all (``full``)."""
        return describe_run(self.recipe, self.engine.assembled, self.samples, full=full)

    def _loader(self, samples: Samples) -> Loader:
        """What reads this rank's share of samples as the engine takes it."""
        return Loader(
            samples,
            self.recipe.model.seq_len,
            self.context,
            self.device,
            micro=self.recipe.train.micro_batch_of(self.context.dp.size, self.context.pp.size),
            mask_documents=self.recipe.data.mask_documents,
            stack=self.engine.stack,
        )

    @property
    def is_finished(self) -> bool:
        """Whether all steps of the recipe are done."""
        return self.steps_done >= self.recipe.train.steps

    def next_batch(self) -> StepBatch:
        """This rank's share of the next step; that of the one after it begins to be read. Errors are all ranks'."""
        train, done = self.recipe.train, self.steps_done
        samples, following = self.guard.samples_from(self.samples_done, batch_size(done, train)), None
        if done + 1 < train.steps:
            following = self.guard.samples_from(samples.end, batch_size(done + 1, train))
        read = partial(self.loader.step, samples, following)
        return self._read(read) if self._steps_here == 0 or self.engine.policy.unread else read()

    def step_is_done(self) -> None:
        """Count the step whose batch ``next_batch`` has given. The first of this process ends the start."""
        size = batch_size(self.steps_done, self.recipe.train)
        self.samples_done = self.guard.samples_from(self.samples_done, size).end
        self.steps_done += 1
        self._steps_here += 1
        if self._steps_here == 1:
            step, checkpoint = self.watchdog.step_seconds, self.recipe.watchdog.checkpoint
            self.context.set_timeouts(step + BACKUP, checkpoint + BACKUP)

    def largest(self, number: int) -> int:
        """Maximum over all ranks. Collective."""
        return int(all_gather_blocks(torch.tensor([number], device=self.device), self.context.world).max())

    def open_metrics(self) -> MetricsWriter | None:
        """The first rank's metrics from this step on; None on the other ranks."""
        return self._all_or_raise(lambda: self.folder.open_metrics(self.steps_done + 1, self.recipe))

    def evaluate(self) -> Evaluation | None:
        """See ``Validation``."""
        return self._validation.evaluate()

    def _validate_with(self) -> Validation:
        """The first rank counts bytes of text, which alone records what follows from them."""

        def loss_of(samples: Samples, count: int) -> float | None:
            return self.engine.evaluate(self._read(partial(self._loader(samples).load, SampleRange(0, count))))

        tokenizer = self.data.tokenizer if self.context.is_first_rank else None
        return Validation(self.recipe, self.valid, loss_of, tokenizer)

    def save(self) -> None:
        """Begin a checkpoint of the present step, unless there is one.

        None is made while steps are refused: the weights may be why.
        """
        if self.saver.newest is not None and self.saver.newest[0] == self.steps_done:
            return
        if self.skipped_in_a_row:
            log.warning("warning: step %d is not saved while steps are being refused", self.steps_done)
            return
        tokenizer = None if self.data.tokenizer is None else self.data.tokenizer.describe()
        attached = {}
        if self.data.tokenizer is not None and tokenizer is not None and "file" in tokenizer:
            attached[tokenizer["file"]] = self.data.tokenizer.model
        if self._source is not None:
            attached[SOURCE] = self._source
        self.saver.save(self.steps_done, self._state(tokenizer).model_dump(), attached)

    def save_now(self) -> Path:
        """The checkpoint of the present step, once it is on disk.

        Raises:
            TrainingError: it cannot be written.
        """
        self.saver.wait()
        self.save()
        self.saver.wait()
        step, path = self.saver.newest or (-1, Path())
        if step != self.steps_done:
            raise TrainingError(f"step {self.steps_done} was not saved, see the warning above; start again to go on")
        return path

    def save_last(self, stopped: str | None) -> Path | None:
        """The checkpoint with which this start of the run ends.

        Args:
            stopped: what ended it before its last step; None at its end.

        Raises:
            NonFiniteError: the last steps of a run that was not stopped were refused; nothing is saved.
        """
        steps = self.recipe.train.steps
        if not self.skipped_in_a_row:
            checkpoint = self.save_now()
            if stopped is not None:
                log.warning("%s: saved step %d of %d; start again to go on", stopped, self.steps_done, steps)
            return checkpoint
        self.saver.wait()
        num = self.skipped_in_a_row
        last = "the last step was" if num == 1 else f"the last {num} steps were"
        refused = f"{last} refused, so nothing was saved; {self.saver.what_there_is()}"
        if stopped is None:
            advice = "guard.nonfinite=rollback would pass over their samples"
            raise NonFiniteError(f"step {self.steps_done} of {steps} is done, but {refused}; {advice}")
        log.warning("%s: %s", stopped, refused)
        return None if self.saver.newest is None else self.saver.newest[1]

    def protect_checkpoints(self, step: int | None) -> None:
        """Keep those up to the first step that was ever refused, if one was: they may be the last good ones."""
        self.first_refused = self.saver.protected = step

    def digest_of(self, checkpoint: Path | None) -> str:
        """``weights_digest``, read by the first rank: a network file system shows it to the others later."""

        def digest() -> str:
            return "" if checkpoint is None or not self.context.is_first_rank else weights_digest(checkpoint)

        return run_on_all_ranks(digest, self.context.control)[0]

    def _state(self, tokenizer: dict[str, str] | None) -> RunState:
        return RunState(
            samples=self.samples_done,
            skipped_in_a_row=self.skipped_in_a_row,
            first_refused=self.first_refused,
            train_loss=self.train_loss,
            engine=self.engine.state(),
            recipe=self.recipe.model_dump(exclude_none=True),
            data=self.data.digest,
            split=self._split,
            tokenizer=tokenizer,
            kernels=self.engine.assembled.kernel_choices,
            guard=self.guard.state(),
            versions=versions_of_run(self.recipe.engine.name),
        )

    def _resume(self, fallback: bool) -> None:
        """Take over the newest whole checkpoint of the output folder, if there is one; else the initial weights."""
        root, control = self.output / "checkpoints", self.context.control
        with progress_bar("verifying the checkpoint", None, of_bytes=True) as bar:
            checkpoint = open_newest(root, control, fallback=fallback, progress=bar.advance)
        if checkpoint is None:
            self._start_from_weights()
        else:
            self._go_on_from(checkpoint)
            self.guard.decided_before(run_on_all_ranks(lambda: read_decided(self.output), control)[0])

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        state = self._all_or_raise(lambda: state_of(checkpoint.folder, checkpoint.state))
        self._all_or_raise(lambda: check_same_run(checkpoint, state, self.recipe, self.data, data_name(self.recipe)))
        self._all_or_raise(lambda: self.engine.load(checkpoint, state.engine))
        self._source = self._all_or_raise(checkpoint.source)
        if state.split == "documents":  # a run that an older version has begun goes on with the samples that it had
            self._split = state.split
            opened = self._all_or_raise(lambda: open_samples(self.data, self.recipe, whole_documents=True))
            (self.samples, self.valid), self.loader = opened, self._loader(opened[0])
        self.steps_done, self.samples_done = checkpoint.step, state.samples
        self.skipped_in_a_row, self.train_loss = state.skipped_in_a_row, state.train_loss
        self.guard = GuardRecord(state.guard)
        self.protect_checkpoints(state.first_refused)
        self._all_or_raise(lambda: self.engine.check_finite(f"{checkpoint.folder}: "))
        self.saver.newest = (checkpoint.step, checkpoint.folder)
        word = "finished " if self.is_finished else "resumed  "
        log.info("%s %s: step %d of %d", word, checkpoint.folder, self.steps_done, self.recipe.train.steps)
        if jump := lr_jump(self.steps_done, recipe_of(checkpoint.folder, state), self.recipe):
            log.warning("warning: %s", jump)

    def roll_back(self, passed: SampleRange | None) -> None:
        """Go back to the newest checkpoint, which is there, and pass over some samples from there on. Collective."""
        self.saver.abandon()
        before, root = self.guard, self.output / "checkpoints"
        self._steps_here = 0  # nothing is read ahead
        checkpoint = open_newest(root, self.context.control, fallback=self._fallback)
        if checkpoint is None:
            raise CheckpointError(f"{root}: the checkpoints that the run was to go back to are gone")
        self._go_on_from(checkpoint)
        self.guard.went_back(before, passed)

    def _start_from_weights(self) -> None:
        """At step 0: those of train.initial_weights, if it is set."""
        if self.recipe.train.initial_weights is None:
            return
        tokenizer = None if self.data.tokenizer is None else self.data.tokenizer.describe()
        checkpoint = open_weights(self.recipe, tokenizer, self.context.control)
        self._all_or_raise(lambda: self.engine.load_weights(checkpoint))
        self._source = self._all_or_raise(checkpoint.source)
        self._all_or_raise(lambda: self.engine.check_finite(f"train.initial_weights={checkpoint.folder}: "))
        log.info("weights   %s", checkpoint.folder)

    def _prepare_output(self) -> None:
        files = {"recipe.yaml": dump_recipe(self.recipe)} | engine_files(self.recipe, self.engine.assembled)
        files |= {} if self.steps_done else {DECIDED: None}
        keep, drill = self.recipe.checkpoint.keep, self.recipe.drill is not None
        self.folder.prepare(files, self.engine.tensors, keep, drill=drill)

    def _read(self, work: Callable[[], T]) -> T:
        """As ``_all_or_raise``, also while something is being saved."""
        return all_or_raise(work, self.context.world, self.device)

    def _all_or_raise(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, if it fails on no rank; between steps, when nothing is being saved."""
        return all_or_raise(work, self.context.control)
