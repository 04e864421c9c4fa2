"""What a recipe will take: parameters, operations, tokens, epochs, memory. Nothing is built, and no GPU is needed."""

from dataclasses import dataclass

import torch

from megaresnorm.activation_memory import Segments
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.data.inspect import Draw, draws_of
from megaresnorm.data.training_data import open_data, open_samples, resolve_vocab
from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.fp8.product import kind_of
from megaresnorm.kernels.registry import check_backend
from megaresnorm.layout import check_execution, check_layout, ranks_without_samples, split_stages
from megaresnorm.memory import RESERVE, MemoryPerRank, memory_of_stages
from megaresnorm.model.cost import training_flops
from megaresnorm.model.lint import check
from megaresnorm.model.parameters import parameter_table
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_auto import budget_in_bytes, describe_recompute, plan_recompute
from megaresnorm.recompute_plan import segments_of
from megaresnorm.resilience.host import host_memory
from megaresnorm.schedule import samples_before
from megaresnorm.telemetry.describe import describe_engine
from megaresnorm.telemetry.log import large
from megaresnorm.telemetry.throughput import PEAK_HALF

EPOCHS = 4  # more repetitions of the same data than these are worth much less (arXiv:2305.16264)
SHARE_OF_PEAK = 0.4  # assumed where a time is told
GPU = "H100"  # whose peak is taken for it


@dataclass(frozen=True)
class Estimate:
    """What one recipe takes on so many ranks.

    Attributes:
        recipe: resolved against the data, where they were read.
        flops: floating-point operations of a token, forward and backward.
        tokens: that the run draws.
        draws: what it draws from each source; None without data.
        segments: which blocks are recomputed how, by stage; None where policy auto has no budget to know it from.
        stages: memory by pp rank.
        room: bytes of device memory that a rank has, or of host memory that all ranks have; None where unknown.
        on_gpus: whether ``stages`` and ``room`` are of GPUs.
        warnings: what the linter finds.
    """

    recipe: Recipe
    sizes: Sizes
    parameters: int
    flops: int
    tokens: int
    draws: list[Draw] | None
    segments: Segments | None
    stages: list[MemoryPerRank]
    room: int | None
    on_gpus: bool
    warnings: list[str]

    def fits(self, *, likely: bool = False) -> bool | None:
        """Whether it fits into the memory there is; None where that is unknown.

        Args:
            likely: with the estimate of the activations, and on a GPU a reserve for CUDA and fragmentation; otherwise
                what is allocated for certain.
        """
        if self.room is None:
            return None
        kind = "likely" if likely else "certain"
        if self.on_gpus:
            return max(getattr(memory.device, kind) for memory in self.stages) <= self.room - likely * RESERVE
        ranks_per_stage = self.sizes.num_ranks // self.sizes.pp
        return sum(ranks_per_stage * getattr(memory.host, kind) for memory in self.stages) <= self.room

    def describe(self) -> list[str]:
        """Lines for the console."""
        model, train = self.recipe.model, self.recipe.train
        lines = [
            f"model      {model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, "
            f"{self.parameters:,} parameters, {large(self.flops)}FLOP a token forward and backward",
            f"ranks      {self._ranks()}",
            *([] if (engine := describe_engine(self.recipe)) is None else [f"engine     {engine}"]),
            *self._recompute(),
            *self._memory(),
            *self._data(),
            f"run        {train.steps:,} steps of up to {train.global_batch * model.seq_len:,} tokens, "
            f"{large(self.tokens)} tokens, {large(self.flops * self.tokens)}FLOP{self._time()}",
        ]
        return [
            *lines,
            *(f"warning    {line}" for line in self.warnings),
            "not read   the output folder and what is in it; loggers, GPUs and packages of the machine that will train",
        ]

    def _ranks(self) -> str:
        data_ranks = self.sizes.dp_replicate * self.sizes.dp_shard
        micro = self.recipe.train.micro_batch_of(data_ranks, self.sizes.pp)
        passes = -(-self.recipe.train.global_batch // (data_ranks * micro))
        stages = [len(stage.blocks) for stage in split_stages(self.recipe.model, self.recipe.parallel)]
        count = f"{self.sizes.num_ranks}{f' = {self.sizes.product}' if self.sizes.product else ''}"
        split = f"; blocks of the stages {stages}" if self.sizes.pp > 1 else ""
        return f"{count}; micro batch {micro}, {passes} microbatch{'es' if passes > 1 else ''} a step{split}"

    def _recompute(self) -> list[str]:
        if self.segments is None:
            lines = ["auto: chosen where it will run, by its memory; --memory 80GB plans for GPUs of that size"]
        else:
            device_type = "cuda" if self.on_gpus else "cpu"
            lines = describe_recompute(self.recipe, self.sizes, self.segments, device_type)
        return [f"{'recompute' if i == 0 else '':10} {line}" for i, line in enumerate(lines)]

    def _memory(self) -> list[str]:
        largest = max(self.stages, key=lambda memory: (memory.device if self.on_gpus else memory.host).likely)
        need = largest.device if self.on_gpus else largest.host
        where = "GPU memory" if self.on_gpus else "host memory"
        lines = [
            f"memory     a rank: {human_bytes(need.likely)} of {where}; {human_bytes(need.certain)} of it for certain, "
            "the rest is an estimate of the activations",
            f"           by kind, each at its fullest moment: {largest.describe('device' if self.on_gpus else 'all')}",
        ]
        if self.on_gpus:
            host = f"{human_bytes(largest.host.likely)} ({largest.describe('host')})"
            lines.append(f"           host memory of a rank: {host}")
        if self.room is None:
            return [*lines, "           the machines: not known here; --memory 80GB compares with GPUs of that size"]
        who = "a rank's GPU" if self.on_gpus else "this machine, for all ranks (--memory plans for GPUs),"
        verdict = "fits" if self.fits(likely=True) else "may not fit" if self.fits() else "does NOT fit"
        return [*lines, f"           {who} has {human_bytes(self.room)}: {verdict}"]

    def _data(self) -> list[str]:
        if self.draws is None:
            return ["data       not read"]
        most = max(self.draws, key=lambda draw: draw.epochs)
        of = f" (of {most.path})" if len(self.draws) > 1 else ""
        there = sum(draw.tokens for draw in self.draws)
        lines = [f"data       {large(there)} tokens to train on, {most.epochs:.3g} epochs{of}"]
        if most.epochs > EPOCHS:
            lines.append(f"warning    more than {EPOCHS} epochs: tokens teach less each time (arXiv:2305.16264)")
        return lines

    def _time(self) -> str:
        if not self.on_gpus or self.recipe.precision.compute not in ("bf16", "fp16"):
            return ""
        seconds = self.flops * self.tokens / (self.sizes.num_ranks * PEAK_HALF[GPU] * 1e12 * SHARE_OF_PEAK)
        days = f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} hours"
        return f"; at {SHARE_OF_PEAK:.0%} of {PEAK_HALF[GPU]:g} TFLOP/s a GPU (a guess, not measured) {days}"


def estimate(
    recipe: Recipe, *, ranks: int | None = None, device_memory: int | None = None, with_data: bool = True
) -> Estimate:
    """Check a recipe, and add up what it takes.

    Args:
        ranks: None for the fewest that the layout needs.
        device_memory: bytes of a GPU that the ranks are to fit into; None: those of this machine, or its host memory.
        with_data: whether to open the data. Without them model.vocab_size must be set.

    Raises:
        ConfigError, DataError: the recipe cannot be used; one line.
    """
    draws = None
    warnings = [finding.message for finding in check(recipe)]
    if with_data:
        data = open_data(recipe.data)
        recipe = resolve_vocab(recipe, data)
        samples, _ = open_samples(data, recipe)
        draws = draws_of(recipe, samples, samples_before(recipe.train.steps, recipe.train))
    elif recipe.model.vocab_size is None:
        raise ConfigError("model.vocab_size is missing, which the data would tell; set model.vocab_size=32000, say")
    parallel = recipe.parallel
    needed = parallel.pp * parallel.dp_shard * parallel.tp * (parallel.dp_replicate or 1)
    sizes = check_layout(recipe, ranks or needed)
    check_execution(recipe, sizes, "cpu" if recipe.train.device == "cpu" else "cuda")  # the plan may be for elsewhere
    warnings += [idle] if (idle := ranks_without_samples(recipe, sizes)) else []
    load_backends()
    for op, backend in recipe.kernels.model_dump().items():  # whether they can run depends on the machine
        check_backend(op, backend)
    if recipe.precision.compute == "fp8":
        fp8 = recipe.precision.fp8
        kind = kind_of(fp8.recipe, fp8.gradients)
        check_backend("fp8_product", fp8.backend, "precision.fp8.backend", kind)
    on_gpus, room = _room(recipe, device_memory)
    segments = _segments(recipe, sizes, room, on_gpus=on_gpus)
    device_type = "cuda" if on_gpus else "cpu"
    return Estimate(
        recipe=recipe,
        sizes=sizes,
        parameters=sum(spec.num_elements for spec in parameter_table(recipe.model).values()),
        flops=training_flops(recipe.model),
        tokens=samples_before(recipe.train.steps, recipe.train) * recipe.model.seq_len,
        draws=draws,
        segments=segments,
        stages=memory_of_stages(recipe, sizes, device_type=device_type, segments=segments),
        room=room,
        on_gpus=on_gpus,
        warnings=warnings,
    )


def _segments(recipe: Recipe, sizes: Sizes, room: int | None, *, on_gpus: bool) -> Segments | None:
    """Those of the recipe; under policy auto chosen by the memory of a rank, None where a share of it is not known."""
    recompute = recipe.recompute
    if recompute.policy != "auto":
        stages = split_stages(recipe.model, recipe.parallel)
        return {number: segments_of(recompute, stage.blocks) for number, stage in enumerate(stages)}
    if room is None and not isinstance(recompute.budget, str) and (recompute.budget or 0) <= 1:
        return None
    memory = room if on_gpus or room is None else room // sizes.num_ranks
    budget = budget_in_bytes(recipe, memory, on_gpu=on_gpus)
    return plan_recompute(recipe, sizes, budget, device_type="cuda" if on_gpus else "cpu")


def _room(recipe: Recipe, device_memory: int | None) -> tuple[bool, int | None]:
    """Whether the ranks are on GPUs, and the memory of one, or that of this machine for all ranks."""
    here = torch.cuda.is_available() and recipe.train.device != "cpu"
    if device_memory is not None or here or recipe.train.device == "cuda":
        return True, torch.cuda.mem_get_info()[1] if device_memory is None and here else device_memory
    host = host_memory()
    return False, None if host is None else host.total
