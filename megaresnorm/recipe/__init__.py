"""Every setting of a run, one typed field each, documented where it stands.

A recipe is frozen, refuses unknown keys, NaN and Inf, and never converts types: ``dim: "64"`` is an error. Relations
between fields are checked here; relations with data, topology or hardware where those are known.
"""

from pydantic import model_validator
from typing_extensions import Self

from megaresnorm.recipe.drill import DrillRecipe, FaultRecipe
from megaresnorm.recipe.engine import EngineRecipe, check_engine
from megaresnorm.recipe.execution import KernelRecipe, ParallelRecipe, WatchdogRecipe
from megaresnorm.recipe.guard import GuardRecipe
from megaresnorm.recipe.model import InitRecipe, ModelRecipe, RopeScaling, TopologyOptions
from megaresnorm.recipe.precision import FP8_MULTIPLE, Fp8Recipe, PrecisionRecipe
from megaresnorm.recipe.recompute import RecomputeBlocks, RecomputeRecipe
from megaresnorm.recipe.section import Section, divisors, refuse_ignored
from megaresnorm.recipe.telemetry import TelemetryRecipe
from megaresnorm.recipe.training import (
    BatchRamp,
    BlendSource,
    CheckpointRecipe,
    DataRecipe,
    OptimRecipe,
    ScheduleRecipe,
    TrainRecipe,
)

__all__ = [
    "BatchRamp",
    "BlendSource",
    "CheckpointRecipe",
    "DataRecipe",
    "DrillRecipe",
    "EngineRecipe",
    "FaultRecipe",
    "Fp8Recipe",
    "GuardRecipe",
    "InitRecipe",
    "KernelRecipe",
    "ModelRecipe",
    "OptimRecipe",
    "ParallelRecipe",
    "PrecisionRecipe",
    "Recipe",
    "RecomputeBlocks",
    "RecomputeRecipe",
    "RopeScaling",
    "ScheduleRecipe",
    "TelemetryRecipe",
    "TopologyOptions",
    "TrainRecipe",
    "WatchdogRecipe",
    "divisors",
]


class Recipe(Section):
    """One training run."""

    model: ModelRecipe
    """The transformer."""
    data: DataRecipe
    """The token files."""
    train: TrainRecipe
    """The run."""
    optim: OptimRecipe = OptimRecipe()
    """AdamW and gradient clipping."""
    schedule: ScheduleRecipe = ScheduleRecipe()
    """The learning rate over the run."""
    precision: PrecisionRecipe = PrecisionRecipe()
    """Number formats."""
    kernels: KernelRecipe = KernelRecipe()
    """Backends of the kernels."""
    parallel: ParallelRecipe = ParallelRecipe()
    """How many ranks share the work, and how."""
    recompute: RecomputeRecipe = RecomputeRecipe()
    """Less memory for more work in backward."""
    engine: EngineRecipe = EngineRecipe()
    """What makes the optimizer steps."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    """Saving the run."""
    watchdog: WatchdogRecipe = WatchdogRecipe()
    """How long a rank may make no progress."""
    guard: GuardRecipe = GuardRecipe()
    """NaN, spikes, and replicas that differ."""
    telemetry: TelemetryRecipe = TelemetryRecipe()
    """What is recorded beside the metrics of every step."""
    drill: DrillRecipe | None = None
    """Faults that are injected on purpose; unset: none."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        train, schedule = self.train, self.schedule
        micro = train.batch_multiple
        if train.batch_ramp and train.micro_batch is None and train.batch_ramp.start % micro:
            raise ValueError(
                f"train.batch_ramp grows in multiples of train.micro_batch, which is not set; set it to a divisor of "
                f"start={train.batch_ramp.start} and train.global_batch={train.global_batch}"
            )
        if train.global_batch % micro:
            raise ValueError(
                f"train.micro_batch={micro} must divide train.global_batch={train.global_batch}; "
                f"try micro_batch in {divisors(train.global_batch, micro)}"
            )
        if train.batch_ramp and (train.batch_ramp.start % micro or train.batch_ramp.start > train.global_batch):
            raise ValueError(
                f"train.batch_ramp.start={train.batch_ramp.start} must be a multiple of train.micro_batch={micro} "
                f"and at most train.global_batch={train.global_batch}"
            )
        warmup, decay = schedule.warmup(train.steps), (schedule.decay_steps or 0) if schedule.kind == "wsd" else 0
        if decay and warmup + decay > train.steps:  # without a decay a run may end while it warms up
            raise ValueError(
                f"{warmup} steps of warm-up and schedule.decay_steps={decay} do not fit into train.steps={train.steps}"
            )
        if schedule.min_lr is not None and schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr={schedule.min_lr} must be at most optim.lr={self.optim.lr}, the peak")
        return self

    @model_validator(mode="after")
    def _model_can_be_shared(self) -> Self:
        model, parallel = self.model, self.parallel
        shared = {
            "model.num_heads": model.num_heads,
            "model.num_kv_heads": model.kv_heads,
            "model.ffn_dim": model.ffn_width,
        }
        if parallel.tensor_layout == "columns":
            shared["model.dim"] = model.dim
        for key, size in shared.items():
            if size % parallel.tp:
                raise ValueError(
                    f"parallel.tp={parallel.tp} must divide {key}={size}; "
                    f"try parallel.tp in {divisors(size, parallel.tp)}"
                )
        if parallel.tensor_layout == "full":
            refuse_ignored(self.recompute, "recompute", "parallel.tensor_layout=full", "gathered")
        if parallel.columns_norm == "gather" and self.precision.stream != self.precision.branches:
            raise ValueError(
                f"parallel.columns_norm=gather needs precision.residual_dtype={self.precision.branches}, the type of "
                f"branches, not {self.precision.stream}; set it, or use columns_norm auto or merge"
            )
        if parallel.num_stages > model.num_blocks:
            raise ValueError(
                f"parallel.pp={parallel.pp} makes {parallel.num_stages} pipeline stages of "
                f"model.num_blocks={model.num_blocks}; wanted at most one a block"
            )
        blocks = parallel.stage_blocks
        if blocks is not None and sum(blocks) != model.num_blocks:
            raise ValueError(
                f"parallel.stage_blocks={blocks} hold {sum(blocks)} blocks, model.num_blocks={model.num_blocks}; "
                "every block must be in a stage"
            )
        if blocks is not None and 0 in blocks[1:-1]:
            raise ValueError(f"parallel.stage_blocks={blocks}: only the first and the last stage can be without blocks")
        return self

    @model_validator(mode="after")
    def _deepspeed_can_run_it(self) -> Self:
        if self.engine.name == "deepspeed":
            check_engine(self.engine, self.parallel, self.precision, self.recompute, self.train)
        return self

    @model_validator(mode="after")
    def _gradients_of_bf16_weights_stay_fp32(self) -> Self:
        if self.precision.weights != "bf16":
            return self
        if self.parallel.dp_shard > 1:
            raise ValueError(
                f"precision.weights=bf16 with parallel.dp_shard={self.parallel.dp_shard}: FSDP2 has one type for all "
                "weights of a block, and rounds their reduced gradients to it; use parallel.dp_replicate, or "
                "precision.weights=fp32"
            )
        if self.train.compile in ("blocks", "cuda_graphs"):
            raise ValueError(
                f"precision.weights=bf16 with train.compile={self.train.compile}: torch.compile rounds the gradients "
                "of BF16 weights to BF16; use train.compile=none, or precision.weights=fp32"
            )
        return self

    @model_validator(mode="after")
    def _some_blocks_are_in_fp8(self) -> Self:
        fp8, num_blocks = self.precision.fp8, self.model.num_blocks
        outer = fp8.bf16_first_blocks + fp8.bf16_last_blocks
        if self.precision.compute == "fp8" and outer >= num_blocks:
            raise ValueError(
                f"precision.fp8.bf16_first_blocks={fp8.bf16_first_blocks} and bf16_last_blocks={fp8.bf16_last_blocks} "
                f"leave none of model.num_blocks={num_blocks} in FP8; lower them, or set precision.compute=bf16"
            )
        return self

    @model_validator(mode="after")
    def _fp8_products_fit(self) -> Self:
        """GPUs multiply FP8 in multiples of 16; refused on every device, so that what trains on a CPU does on a GPU."""
        if self.precision.compute != "fp8":
            return self
        model, tp, by = self.model, self.parallel.tp, FP8_MULTIPLE
        head = f"of model.head_dim={model.head_width}"
        widths = {  # what decides on the columns of matrices -> how many there are, and a multiple of what they must be
            f"model.dim={model.dim}": (model.dim, by),
            f"model.ffn_dim={model.ffn_width}": (model.ffn_width, by * tp),
            f"model.num_heads={model.num_heads} {head}": (model.num_heads * model.head_width, by * tp),
            f"model.num_kv_heads={model.kv_heads} {head}": (model.kv_heads * model.head_width, by * tp // 2),
        }
        for key, (columns, multiple) in widths.items():
            if columns % multiple:
                raise ValueError(
                    f"{key}: precision.compute=fp8 needs columns in a multiple of {multiple} with parallel.tp={tp}, as "
                    f"GPUs multiply FP8, not {columns}; use {-(-columns // multiple) * multiple}, or "
                    "precision.compute=bf16"
                )
        return self

    @model_validator(mode="after")
    def _blocks_can_be_watched(self) -> Self:
        telemetry, mode = self.telemetry, self.train.compile
        for key, every in (("every", telemetry.every), ("probe_every", telemetry.probe_every)):
            if every and mode != "none":
                raise ValueError(
                    f"telemetry.{key}={every} does not go with train.compile={mode}: what compiled blocks read is not "
                    "seen; set train.compile=none, or remove it"
                )
        if telemetry.probe_every and self.engine.name != "native":
            raise ValueError(
                f"telemetry.probe_every={telemetry.probe_every} does not go with engine.name={self.engine.name}, which "
                "runs no passes beside its steps; set engine.name=native, or remove it (telemetry.every works)"
            )
        return self

    @model_validator(mode="after")
    def _steps_can_be_replayed(self) -> Self:
        others = {
            f"engine.name={self.engine.name}": self.engine.name != "native",
            f"parallel.pp={self.parallel.pp}": self.parallel.pp > 1,
            f"parallel.dp_shard={self.parallel.dp_shard}": self.parallel.dp_shard > 1,
            "precision.compute=fp8": self.precision.compute == "fp8",
            f"train.compile={self.train.compile}": self.train.compile != "none",
        }
        found = next((key for key, has in others.items() if has), None)
        if self.guard.replay_every and found is not None:
            raise ValueError(
                f"guard.replay_every={self.guard.replay_every} does not go with {found}, where one rank's gradients "
                "are not made again exactly and alone; set guard.replay_every=0 (guard.digest_every works)"
            )
        return self

    @model_validator(mode="after")
    def _recomputed_blocks_exist(self) -> Self:
        recompute, num_blocks = self.recompute, self.model.num_blocks
        if (recompute.every or 0) > num_blocks:
            raise ValueError(
                f"recompute.every={recompute.every} is more than model.num_blocks={num_blocks}; use at most that, and "
                f"{max(1, round(num_blocks**0.5 / 4))} for the least memory"
            )
        beyond = next((some for some in recompute.blocks if some.last >= num_blocks), None)
        if beyond is not None:
            raise ValueError(
                f"recompute.blocks: {beyond.first}-{beyond.last} is not within the blocks 0-{num_blocks - 1} of "
                f"model.num_blocks={num_blocks}"
            )
        named = sum(some.last - some.first + 1 for some in recompute.blocks)
        if named == num_blocks and recompute.policy != "none":
            raise ValueError(
                f"recompute.policy={recompute.policy} has no effect: recompute.blocks has another policy for all "
                f"{num_blocks} blocks; remove one of the two"
            )
        if recompute.offload and self.train.compile == "cuda_graphs":
            raise ValueError(
                "recompute.offload=true does not go with train.compile=cuda_graphs, which records one stream; use "
                "train.compile=blocks"
            )
        return self
