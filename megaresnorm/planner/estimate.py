"""What a recipe will take: parameters, operations, tokens, epochs, memory. Nothing is built, and no GPU is needed."""

from dataclasses import dataclass

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.data.training_data import open_data, open_samples, resolve_vocab
from megaresnorm.errors import ConfigError
from megaresnorm.layout import check_layout, split_stages
from megaresnorm.memory import MemoryPerRank, memory_of_stages
from megaresnorm.model.cost import training_flops
from megaresnorm.model.lint import check
from megaresnorm.model.parameters import parameter_table
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.host import host_memory
from megaresnorm.schedule import samples_before
from megaresnorm.telemetry.log import large
from megaresnorm.telemetry.throughput import PEAK_BF16

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
        tokens_there: of the training data; None without data.
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
    tokens_there: int | None
    stages: list[MemoryPerRank]
    room: int | None
    on_gpus: bool
    warnings: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether what is allocated for certain fits into the memory there is; None where that is unknown."""
        if self.room is None:
            return None
        if self.on_gpus:
            return max(memory.device.certain for memory in self.stages) <= self.room
        ranks_per_stage = self.sizes.num_ranks // self.sizes.pp
        return sum(ranks_per_stage * memory.host.certain for memory in self.stages) <= self.room

    def describe(self) -> list[str]:
        """Lines for the console."""
        model, train = self.recipe.model, self.recipe.train
        lines = [
            f"model      {model.topology}, {model.num_blocks} blocks = {2 * model.num_blocks} sub-layers, "
            f"{self.parameters:,} parameters, {large(self.flops)}FLOP a token forward and backward",
            f"ranks      {self._ranks()}",
            *self._memory(),
            *self._data(),
            f"run        {train.steps:,} steps of up to {train.global_batch * model.seq_len:,} tokens, "
            f"{large(self.tokens)} tokens, {large(self.flops * self.tokens)}FLOP{self._time()}",
        ]
        return lines + [f"warning    {line}" for line in self.warnings]

    def _ranks(self) -> str:
        axes = {"pp": self.sizes.pp, "dp_replicate": self.sizes.dp_replicate, "dp_shard": self.sizes.dp_shard,
                "tp": self.sizes.tp}  # fmt: skip
        product = " * ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
        data_ranks = self.sizes.dp_replicate * self.sizes.dp_shard
        micro = self.recipe.train.micro_batch_of(data_ranks, self.sizes.pp)
        passes = -(-self.recipe.train.global_batch // (data_ranks * micro))
        stages = [len(stage.blocks) for stage in split_stages(self.recipe.model, self.recipe.parallel)]
        count = f"{self.sizes.num_ranks}{f' = {product}' if product else ''}"
        split = f"; blocks of the stages {stages}" if self.sizes.pp > 1 else ""
        return f"{count}; micro batch {micro}, {passes} microbatch{'es' if passes > 1 else ''} a step{split}"

    def _memory(self) -> list[str]:
        largest = max(self.stages, key=lambda memory: memory.total)
        need = largest.device if self.on_gpus else largest.host
        where = "GPU memory" if self.on_gpus else "host memory"
        lines = [
            f"memory     a rank: {human_bytes(need.likely)} of {where}; {human_bytes(need.certain)} of it for certain, "
            "the rest is an estimate of the activations",
            f"           by kind, each at its fullest moment: {largest.describe()}",
        ]
        if self.on_gpus:
            lines.append(f"           host memory of a rank, with checkpoints: {human_bytes(largest.host.likely)}")
        if self.room is None:
            return [*lines, "           the machines: not known here; --memory 80GB compares with GPUs of that size"]
        who = "a rank's GPU" if self.on_gpus else "this machine, for all ranks,"
        verdict = "fits" if self._likely_fits() else "may not fit" if self.fits else "does NOT fit"
        return [*lines, f"           {who} has {human_bytes(self.room)}: {verdict}"]

    def _likely_fits(self) -> bool:
        if self.on_gpus:
            return max(memory.device.likely for memory in self.stages) <= (self.room or 0)
        ranks_per_stage = self.sizes.num_ranks // self.sizes.pp
        return sum(ranks_per_stage * memory.host.likely for memory in self.stages) <= (self.room or 0)

    def _data(self) -> list[str]:
        if self.tokens_there is None:
            return ["data       not read"]
        epochs = self.tokens / max(1, self.tokens_there)
        lines = [f"data       {large(self.tokens_there)} tokens to train on, {epochs:.3g} epochs"]
        if epochs > EPOCHS:
            lines.append(f"warning    more than {EPOCHS} epochs: tokens teach less each time (arXiv:2305.16264)")
        return lines

    def _time(self) -> str:
        if not self.on_gpus:
            return ""
        seconds = self.flops * self.tokens / (self.sizes.num_ranks * PEAK_BF16[GPU] * 1e12 * SHARE_OF_PEAK)
        days = f"{seconds / 86400:.1f} days" if seconds > 2 * 86400 else f"{seconds / 3600:.1f} hours"
        return f"; at {SHARE_OF_PEAK:.0%} of {PEAK_BF16[GPU]:g} TFLOP/s a GPU (a guess, not measured) {days}"


def estimate(
    recipe: Recipe, *, ranks: int | None = None, device_memory: int | None = None, with_data: bool = True
) -> Estimate:
    """Check a recipe, and add up what it takes.

    Args:
        ranks: None for the fewest that the layout needs.
        device_memory: bytes of a GPU that the ranks are to fit into; None: the memory of this machine is looked at.
        with_data: whether to open the data. Without them model.vocab_size must be set.

    Raises:
        ConfigError, DataError: the recipe cannot be used; one line.
    """
    tokens_there = None
    warnings = [finding.message for finding in check(recipe)]
    if with_data:
        data = open_data(recipe.data)
        recipe = resolve_vocab(recipe, data)
        samples, _ = open_samples(data, recipe)
        tokens_there = samples.per_epoch * recipe.model.seq_len
    elif recipe.model.vocab_size is None:
        raise ConfigError("model.vocab_size is missing, which the data would tell; set model.vocab_size=32000, say")
    parallel = recipe.parallel
    needed = parallel.pp * parallel.dp_shard * parallel.tp * (parallel.dp_replicate or 1)
    sizes = check_layout(recipe, ranks or needed)
    on_gpus = device_memory is not None or recipe.train.device == "cuda"
    host = None if on_gpus else host_memory()
    return Estimate(
        recipe=recipe,
        sizes=sizes,
        parameters=sum(spec.num_elements for spec in parameter_table(recipe.model).values()),
        flops=training_flops(recipe.model),
        tokens=samples_before(recipe.train.steps, recipe.train) * recipe.model.seq_len,
        tokens_there=tokens_there,
        stages=memory_of_stages(recipe, sizes, device_type="cuda" if on_gpus else "cpu"),
        room=device_memory if on_gpus else None if host is None else host.total,
        on_gpus=on_gpus,
        warnings=warnings,
    )
