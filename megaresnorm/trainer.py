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
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch

import megaresnorm
from megaresnorm.assemble import Assembled, build_model, check_layout, choose_device, split_stages
from megaresnorm.checkpoint.format import MANIFEST, folder_name, list_checkpoints
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.config import build_recipe, differences, dump_recipe
from megaresnorm.data.loader import Batch, microbatches
from megaresnorm.data.samples import Samples, open_data, open_samples, resolve_vocab, unigram_entropy
from megaresnorm.engines.native import Decision, GradientStats, NativeEngine
from megaresnorm.errors import CheckpointError, ConfigError, TrainingError, UserError
from megaresnorm.generate import generate
from megaresnorm.model.lint import check
from megaresnorm.parallel.collectives import all_gather_blocks, all_reduce
from megaresnorm.parallel.context import ParallelContext, num_started_ranks, start_process_group
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.schedule import batch_size, learning_rate, total_variation
from megaresnorm.telemetry.log import progress_bar, step_line
from megaresnorm.telemetry.metrics import MetricsWriter

log = logging.getLogger(__name__)
T = TypeVar("T")

# What a resumed run must share with its checkpoint. The folder of the data may move: its content is compared.
FIXED_ON_RESUME = (
    "model.",
    "data.valid_fraction",
    "data.test_fraction",
    "data.seed",
    "data.mask_documents",
    "train.seed",
    "precision.",
)


@dataclass(frozen=True)
class RunSummary:
    """How a run ended. Losses are means a token in nats, None where a signal came before them; exit_code is 0, or 128 + that
    signal."""

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
    run = Run(recipe)
    with StopSignals() as stop:
        return run.train(stop)


class Run:
    """One run: its data, engine, position and output folder. Building it checks all that can be checked before step 0."""

    def __init__(self, recipe: Recipe) -> None:
        for finding in check(recipe):
            log.warning("warning: %s", finding.message)
        num_ranks = num_started_ranks()
        self.data = open_data(recipe.data)
        self.recipe = recipe = resolve_vocab(recipe, self.data)
        self.samples, self.valid = open_samples(self.data, recipe)
        self.output = Path(recipe.train.output)
        self.device = choose_device(recipe.train.device)
        sizes = check_layout(recipe, num_ranks)
        if num_ranks > 1:
            start_process_group(self.device)
        self.context = ParallelContext.create(sizes, self.device.type)
        checkpoints = [path for _, path in list_checkpoints(self.output / "checkpoints")]
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
        self.train_loss: float | None = None
        self._agree_on_start(checkpoints)
        if checkpoints:
            self._resume(self._together(lambda: _open_newest(checkpoints)))
        self._together(self._write_recipe)

    def describe(self) -> list[str]:
        """What this run is, in lines for the console."""
        recipe, model = self.recipe, self.recipe.model
        parameters = sum(spec.num_elements for spec in self.assembled.table.values())
        tokens = recipe.train.global_batch * model.seq_len
        return [
            f"model     {model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, width {model.dim}, "
            f"{parameters:,} parameters",
            *self._describe_ranks(),
            f"precision {recipe.precision.compute}, residual stream {recipe.precision.stream}, {self.device.type}, "
            f"{torch.get_num_threads()} threads",
            *(f"kernel    {choice}" for choice in self.assembled.kernel_choices.values()),
            f"data      {self._data_name}: {self.samples.num_documents:,} documents, "
            f"{self.samples.per_epoch:,} sequences of {model.seq_len} tokens to train on",
            f"schedule  {recipe.train.steps:,} steps of {tokens:,} tokens, {recipe.schedule.kind}, peak lr {recipe.optim.lr:g}, "
            f"total variation of the lr {total_variation(recipe):.3g}",
        ]

    def train(self, stop: StopSignals) -> RunSummary:
        """Steps until the recipe's end or a signal; a checkpoint then, and a text sample at the end."""
        steps = self.recipe.train.steps
        metrics: MetricsWriter | None = None
        if self.context.is_first_rank:
            metrics = MetricsWriter(self.output, first_step=self.steps_done, tensorboard=self.recipe.train.tensorboard)
        try:
            with progress_bar("training", steps, self.steps_done) as progress:
                while self.steps_done < steps and not self._any_rank(stop.received is not None):
                    record = self._step()
                    if metrics is not None:
                        metrics.write(self.steps_done - 1, record)
                    if self.steps_done % self.recipe.train.log_every == 0 or "valid_loss" in record:
                        log.info(step_line(self.steps_done, steps, record))
                    if self._due(self.recipe.train.checkpoint_every):
                        self.save()
                    progress.advance(progress.task_ids[0])
        finally:
            if metrics is not None:
                metrics.close()
        checkpoint = self.save()
        stopped = self._any_rank(stop.received is not None)
        if stopped:
            name = "another rank's signal" if stop.received is None else stop.received.name
            log.warning("%s: saved step %d of %d; start again to go on", name, self.steps_done, steps)
        return RunSummary(
            steps=self.steps_done,
            train_loss=self.train_loss,
            valid_loss=None if stopped else self.evaluate(),
            unigram_entropy=None if stopped else unigram_entropy(self.samples.token_shares()),
            checkpoint=checkpoint,
            weights_digest=self.engine.weights_digest(),
            exit_code=stop.exit_code,
        )

    def sample_text(self) -> str | None:
        """A continuation of train.sample_prompt; None without a tokenizer, when switched off, or with several ranks."""
        train = self.recipe.train
        if self.data.tokenizer is None or not train.sample_tokens or self.context.world.size > 1:
            return None
        return generate(
            self.engine.model, self.data.tokenizer, train.sample_prompt, train.sample_tokens, seed=train.seed
        )

    def evaluate(self) -> float | None:
        """Loss on the first train.eval_samples validation samples, always the same ones; None without a validation split."""
        if self.valid is None:
            return None
        count = min(self.recipe.train.eval_samples, self.valid.per_epoch)
        return self.engine.evaluate(self._batches(self.valid, 0, count))

    def save(self) -> Path:
        """A checkpoint of the present step, unless there is one. The first rank writes what all of them make up."""
        root = self.output / "checkpoints"
        path = root / folder_name(self.steps_done)
        if self._any_rank(self.context.is_first_rank and (path / MANIFEST).is_file()):
            return path
        if not self.context.is_first_rank:
            for group in self.engine.tensors().values():
                for name in group:
                    _ = group[name]
            return path
        tokenizer = None if self.data.tokenizer is None else self.data.tokenizer.describe()
        attached = {}
        if self.data.tokenizer is not None and tokenizer is not None and "file" in tokenizer:
            attached[tokenizer["file"]] = self.data.tokenizer.model
        state = {
            "samples": self.samples_done,
            "skipped_in_a_row": self.skipped_in_a_row,
            "train_loss": self.train_loss,
            "engine": self.engine.state(),
            "recipe": self.recipe.model_dump(exclude_none=True),
            "data": self.data.digest,
            "tokenizer": tokenizer,
            "kernels": self.assembled.kernel_choices,
            "versions": {
                "megaresnorm": megaresnorm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        }
        keep = self.recipe.train.keep_checkpoints
        path = save_checkpoint(root, self.steps_done, self.engine.tensors(), state, keep=keep, attached=attached)
        log.info("saved     %s", path)
        return path

    def _step(self) -> dict[str, float]:
        """One optimizer step, and what is recorded of it."""
        start, step = time.perf_counter(), self.steps_done
        count, lr = batch_size(step, self.recipe.train), learning_rate(step, self.recipe)
        stats = self.engine.step(self._batches(self.samples, self.samples_done, count), lr, self._accept)
        self.steps_done += 1
        self.samples_done += count
        self.train_loss = stats.loss if stats.applied else self.train_loss
        record: dict[str, float] = {
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
        log.warning("step %d refused: loss %g, gradient norm %g", self.steps_done + 1, stats.loss, stats.norm)
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient, up to step {self.steps_done + 1}; "
                f"try a smaller optim.lr, or look at samples {self.samples_done} and before"
            )
        return Decision.SKIP

    def _batches(self, samples: Samples, position: int, count: int) -> Iterator[Batch]:
        micro = self.recipe.train.micro_batch_of(self.context.data.size, self.context.pp.size)
        masked = self.recipe.data.mask_documents
        return microbatches(samples, position, count, micro, self.context, self.device, mask_documents=masked)

    @property
    def _data_name(self) -> str:
        sources = self.recipe.data.sources
        return ", ".join(f"{s.path} x {s.weight:g}" for s in sources) if len(sources) > 1 else sources[0].path

    def _any_rank(self, flag: bool) -> bool:
        """Whether it is true on any rank; all ranks must ask."""
        if self.context.world.size == 1:
            return flag
        return bool(all_reduce(torch.tensor([int(flag)], device=self.device), self.context.world).item())

    def _together(self, work: Callable[[], T]) -> T:
        """What ``work`` returns; where it fails on one rank, no rank goes on alone."""
        error: UserError | None = None
        try:
            result = work()
        except UserError as e:
            error = e
        if self._any_rank(error is not None):
            raise error or TrainingError("another rank cannot start; its error says why")
        return result

    def _agree_on_start(self, checkpoints: list[Path]) -> None:
        """Raises: CheckpointError where ranks do not see the same output folder, ConfigError where their kernels differ."""
        choices = ", ".join(f"{op}: {backend}" for op, backend in self.assembled.backends.items())
        digest = int.from_bytes(sha256(choices.encode()).digest()[:7], "little")
        newest = int(checkpoints[-1].name[5:]) if checkpoints else -1
        mine = torch.tensor([digest, len(checkpoints), newest], device=self.device)
        everyone = all_gather_blocks(mine, self.context.world)
        same = (everyone == everyone[0]).all(0)
        if not same[0]:
            raise ConfigError(
                f"ranks have chosen different kernels, this one {choices}; name them in the recipe, kernels.add_norm and so on"
            )
        if not same[1:].all():
            raise CheckpointError(
                f"train.output={self.output}: ranks see different checkpoints there; it must be a folder that all nodes share"
            )

    def _describe_ranks(self) -> list[str]:
        context, parallel = self.context, self.recipe.parallel
        if context.world.size == 1:
            return []
        axes = (context.pp, context.dp_replicate, context.dp_shard, context.tp)
        split = f", stream in {parallel.tensor_layout}" if context.tp.size > 1 else ""
        stages = [len(stage.blocks) for stage in split_stages(self.recipe.model, parallel)]
        schedule = f", {parallel.pipeline}, blocks of the stages {stages}" if context.pp.size > 1 else ""
        sizes = " * ".join(f"{axis.name} {axis.size}" for axis in axes if axis.size > 1)
        return [f"ranks     {context.world.size} = {sizes}{split}{schedule}"]

    def _due(self, every: int) -> bool:
        return every > 0 and self.steps_done % every == 0

    def _resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint of this run. Raises: CheckpointError if model or data are not the ones it was made with."""
        state = checkpoint.state
        before = build_recipe(state["recipe"])  # settings that are newer than the checkpoint have their defaults
        changed = differences(before.model_dump(exclude_none=True), self.recipe.model_dump(exclude_none=True))
        for key, (old, now) in changed.items():
            if key.startswith(FIXED_ON_RESUME):
                raise CheckpointError(
                    f"{checkpoint.folder}: made with {key}={old}, the recipe has {now}; use another train.output for another run"
                )
            log.warning("warning: %s was %s up to step %d and is %s from now on", key, old, checkpoint.step, now)
        if checkpoint.step > self.recipe.train.steps:
            raise CheckpointError(
                f"{checkpoint.folder}: step {checkpoint.step} is past train.steps={self.recipe.train.steps}; "
                "use another train.output for a shorter run"
            )
        if state["data"] != self.data.digest:
            raise CheckpointError(f"{checkpoint.folder}: {self._data_name} has changed since; use another train.output")
        for group, tensors in self.engine.tensors().items():
            for name, whole in checkpoint.read(group, {name: tensors.shape(name) for name in tensors}):
                tensors.load(name, whole)
        self.engine.load_state(state["engine"])
        self.steps_done, self.samples_done = checkpoint.step, state["samples"]
        self.skipped_in_a_row, self.train_loss = state["skipped_in_a_row"], state["train_loss"]
        log.info("resumed   %s: step %d of %d", checkpoint.folder, self.steps_done, self.recipe.train.steps)

    def _write_recipe(self) -> None:
        if not self.context.is_first_rank:
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            written = self.output / ".recipe.yaml.tmp"
            written.write_text(dump_recipe(self.recipe), encoding="utf-8")
            written.replace(self.output / "recipe.yaml")
            (self.output / "checkpoints").mkdir(exist_ok=True)
        except OSError as e:
            raise TrainingError(f"train.output={self.output}: cannot be written ({e.strerror})") from None


def _open_newest(checkpoints: list[Path]) -> Checkpoint:
    """The newest checkpoint, verified; its error says what to do where an older one is left."""
    try:
        return Checkpoint(checkpoints[-1])
    except CheckpointError as e:
        if len(checkpoints) == 1:
            raise
        raise CheckpointError(f"{e}; remove {checkpoints[-1]} to go on from {checkpoints[-2].name}") from None
