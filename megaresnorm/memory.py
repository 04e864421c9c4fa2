"""Memory that a recipe takes on each rank, computed before anything is built.

Everything here is arithmetic on the recipe and the ranks: no tensor is made. What is allocated for certain is counted
as the code allocates it; activations are an estimate. Units are bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Literal, NamedTuple

from megaresnorm.activation_memory import ActivationMemory, Segments
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.layout import check_layout
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import IN_BRANCHES, ParameterSpec
from megaresnorm.model.transformer import Stage
from megaresnorm.optim import ALIGNED, SMALL, AdamW
from megaresnorm.parallel.data_parallel import PREFETCHED
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.parallel.replicas import BUCKET
from megaresnorm.precision.dtypes import half_dtype, stored_dtypes, weight_dtype
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_budget import Held, Plan, TooSmall, solve
from megaresnorm.recompute_plan import segments_of

# Private memory of Python, torch and this package once a model is built; the libraries' code is shared.
PROCESS = 250_000_000
RESERVE = 2 * 10**9  # bytes of a GPU for CUDA, libraries and fragments
_ON_HOST = ("checkpoint", "building", "offloaded", "process")  # also where the rest is on a GPU
_LINEAR_ROLES = (*IN_BRANCHES, "head")  # the first parts of matrices that linear layers multiply by


class Need(NamedTuple):
    """Bytes of device or host memory.

    Attributes:
        certain: allocated in any case.
        likely: with the estimate of the activations.
    """

    certain: int = 0
    likely: int = 0


NOTHING = Need()


@dataclass(frozen=True, kw_only=True)
class MemoryPerRank:
    """Bytes of one rank by kind, each at its own fullest moment, and their sum at the fullest moment of all.

    Attributes:
        weights: this rank's part of the parameters.
        gradients: of the same.
        packed: gradients of small parameters once more, side by side, as the optimizer takes them.
        optimizer: two moments of each parameter.
        copies: 16-bit copies of the matrices.
        gathered: weights that FSDP2 has gathered.
        unsharded: gradients of whole FSDP2 units before they are reduced and scattered.
        buckets: DistributedDataParallel's messages, of which gradients become views in the step's last microbatch.
        received: receive buffers of pipeline stages.
        logits: of the microbatches whose loss exists at once, with what softcap and slicing keep beside them.
        checkpoint: the copy in host memory that a thread writes.
        building: a whole tensor, drawn in host memory before it is sharded.
        activations: kept for the backward passes of all microbatches under way, and at most what one backward pass
            takes beside them, such as activations that are made again. An estimate.
        offloaded: activations in host memory instead of a GPU's.
        passing: a gradient before it is added to that of earlier microbatches, and FSDP2's messages. An estimate.
        process: the interpreter and its libraries, in host memory.
        device, host: sums of the kinds; on CPUs all is in host memory.
    """

    weights: int = 0
    gradients: int = 0
    packed: int = 0
    optimizer: int = 0
    copies: int = 0
    gathered: int = 0
    unsharded: int = 0
    buckets: int = 0
    received: int = 0
    logits: int = 0
    checkpoint: int = 0
    building: int = 0
    activations: int = 0
    offloaded: int = 0
    passing: int = 0
    process: int = PROCESS
    device: Need = NOTHING
    host: Need = NOTHING

    @property
    def needed(self) -> int:
        """Bytes that are allocated for certain, in device and host memory."""
        return self.device.certain + self.host.certain

    @property
    def total(self) -> int:
        """``needed`` with the estimate of the activations."""
        return self.device.likely + self.host.likely

    def describe(self, where: Literal["all", "device", "host"] = "all") -> str:
        """The kinds that are not zero, in one line, largest first: all, or those that are on a GPU, or beside it."""
        kinds = [(size, name) for name, size in asdict(self).items() if isinstance(size, int) and size]
        wanted = [(size, name) for size, name in kinds if where == "all" or (name in _ON_HOST) == (where == "host")]
        return ", ".join(f"{name} {human_bytes(size)}" for size, name in sorted(wanted, reverse=True))


def memory_per_rank(recipe: Recipe, ranks: int | Sizes, *, device_type: str = "cpu") -> MemoryPerRank:
    """Memory of the rank that needs most. ``recipe`` must be resolved: model.vocab_size is set.

    Raises:
        ConfigError: the layout does not fit the number of ranks.
    """
    return max(memory_of_stages(recipe, ranks, device_type=device_type), key=lambda memory: memory.needed)


def memory_of_stages(
    recipe: Recipe, ranks: int | Sizes, *, device_type: str = "cpu", segments: Segments | None = None
) -> list[MemoryPerRank]:
    """Memory by pp rank. Along the other axes it is that of the first rank, which needs most.

    Args:
        segments: of every stage; None: as the recipe names them, for policy auto those that need least.
    """
    sizes = check_layout(recipe, ranks) if isinstance(ranks, int) else ranks
    return MemoryAccounts(recipe, sizes, device_type).of_ranks(segments)


class _Unit(NamedTuple):
    """``times`` equal groups of parameters, each of which FSDP2 gathers and frees as a whole."""

    specs: Sequence[ParameterSpec]
    times: int = 1
    in_fp8: bool = False


class MemoryAccounts:
    """Sums for one recipe in one layout."""

    def __init__(self, recipe: Recipe, sizes: Sizes, device_type: str) -> None:
        self.recipe, self.sizes, self.model = recipe, sizes, recipe.model
        self.on_cpu = device_type == "cpu"
        self.word = weight_dtype(recipe.precision.compute).itemsize  # of a gradient, or of a moment
        self.dtypes = stored_dtypes(recipe.precision)
        self.own_messages = recipe.precision.weights == "bf16" and sizes.dp_replicate > 1  # parallel/replicas.py
        self.activations = of = ActivationMemory(recipe, sizes, device_type)
        self.compute, self.stages = of.compute, of.stages
        self.kinds, self.num_microbatches = of.kinds, of.num_microbatches
        self.examples = {kind: block for block, kind in reversed([*enumerate(self.kinds)])}
        layout = recipe.parallel.tensor_layout if sizes.tp > 1 else "full"
        self.table = parameter_table(recipe.model, layout, sorted(self.examples.values()))

    def of_ranks(self, segments: Segments | None) -> list[MemoryPerRank]:
        """Memory by pp rank."""
        return [self.of_rank(rank, segments or self._named_segments(rank)) for rank in range(self.sizes.pp)]

    def of_rank(self, rank: int, segments: Segments) -> MemoryPerRank:
        """Memory of a pp rank whose stages recompute as ``segments`` say."""
        held, offloaded = self.activations.of_rank(rank, segments)
        return self._added_up(self._but_activations(rank), held, offloaded)

    def plan(self, rank: int, budget: int) -> Plan:
        """A choice of recomputation for the stages of a pp rank.

        Raises:
            TooSmall: a rank needs more in any case.
        """
        others, costs = self._but_activations(rank), [*map(self.activations.stage, self.activations.stages_of(rank))]

        def need(held: Held) -> int:
            memory = self._added_up(others, held, 0)
            return (memory.host if self.on_cpu else memory.device).likely

        return solve(costs, need, budget)

    def _named_segments(self, rank: int) -> Segments:
        recompute = self.recipe.recompute
        if recompute.policy != "auto":
            return {n: segments_of(recompute, self.stages[n].blocks) for n in self.activations.stages_of(rank)}
        try:
            least = self.plan(rank, 0)
        except TooSmall as e:
            least = e.plan
        return self.activations.segments(rank, least)

    def _but_activations(self, rank: int) -> MemoryPerRank:
        stages = {number: self.stages[number] for number in self.activations.stages_of(rank)}
        units = [unit for stage in stages.values() for unit in self._units(stage)]
        elements = self._sum(units, self._held)
        has_head = any(stage.has_head for stage in stages.values())
        sharded = self.sizes.dp_shard > 1
        return MemoryPerRank(
            weights=self._sum(units, lambda spec: self.dtypes.of(spec).itemsize * self._held(spec)),
            gradients=self.word * elements,
            packed=0 if sharded else self.word * self._sum(units, self._small),
            optimizer=len(AdamW.names) * self.word * elements,
            copies=self._copies(units, has_head),
            gathered=self._gathered(units) if sharded else 0,
            unsharded=self._unsharded(units) if sharded else 0,
            buckets=self.word * elements
            if self.sizes.dp_replicate > 1 and not sharded and not self.own_messages
            else 0,
            received=sum(self.activations.received(number) for number in stages),
            logits=self.activations.logits() if has_head else 0,
            checkpoint=self._checkpoint(units, stages) if self.recipe.checkpoint.asynchronous else 0,
            building=self._building(units),
            passing=self._passing(units),
        )

    def _added_up(self, memory: MemoryPerRank, held: Held, offloaded: int) -> MemoryPerRank:
        """Add activations, and what device and host need, as the largest sum over a few moments of what exists then."""
        kept, peak = held.kept - offloaded, held.peak - offloaded
        memory = replace(memory, activations=peak, offloaded=offloaded)
        checkpoint, every = memory.checkpoint, self.recipe.checkpoint.every
        # A run that saves only at its end has its copy when gradients and activations are gone.
        early = checkpoint if 0 < every < self.recipe.train.steps else 0
        standing = memory.weights + memory.optimizer + memory.copies + memory.packed
        standing += memory.buckets + memory.received
        in_backward = standing + self._gradients_at_loss(memory)
        at_loss = in_backward + memory.logits
        at_end = standing + (0 if memory.buckets else self._gradients_at_end(memory))  # those of DDP are in its buckets
        # The loss, the fullest backward pass of the last block's, and that of the first block, with all gradients.
        most = max(at_loss + kept, in_backward + peak, at_end + peak - kept) + memory.passing
        if not self.on_cpu:
            device = Need(max(at_loss, at_end), most)
            host = memory.process + max(memory.building, checkpoint)
            return replace(memory, device=device, host=Need(host, host + offloaded))
        others = max(memory.weights + memory.building, memory.weights + memory.optimizer + memory.copies + checkpoint)
        certain = max(at_loss + early, at_end + early, others)
        return replace(memory, host=Need(memory.process + certain, memory.process + max(most + early, certain)))

    def _units(self, stage: Stage) -> list[_Unit]:
        """FSDP2 units of a stage, as in Transformer.parts: its blocks, embedding and head (one if tied), the rest."""
        blocks = Counter(self.kinds[block] for block in stage.blocks)
        units = [
            _Unit(self._named(f"blocks.{self.examples[kind]}."), count, kind.in_fp8) for kind, count in blocks.items()
        ]
        tied = self.model.tied_embeddings
        ends = self._named("embedding.") if stage.has_embedding or (tied and stage.has_head) else []
        head = self._named("head.") if stage.has_head else []
        rest = self._named("positions.", "embedding_norm.") if stage.has_embedding else []
        rest += self._named("final_norm.") if stage.has_head else []
        groups = [ends + rest] if tied else [ends, head, rest]
        return units + [_Unit(group) for group in groups if group]

    def _named(self, *prefixes: str) -> list[ParameterSpec]:
        return [spec for name, spec in self.table.items() if name.startswith(prefixes)]

    def _sum(self, units: Iterable[_Unit], size: Callable[[ParameterSpec], int]) -> int:
        return sum(unit.times * sum(map(size, unit.specs)) for unit in units)

    def _rows(self, spec: ParameterSpec) -> tuple[int, int]:
        """Rows that a tp rank has, and elements of each."""
        rows = spec.shape[0] // (self.sizes.tp if spec.split == 0 else 1)
        return rows, spec.num_elements // spec.shape[0] // (self.sizes.tp if spec.split else 1)

    def _held(self, spec: ParameterSpec) -> int:
        """Elements that a rank has: FSDP2 shards rows, and pads every rank to as many as the first has."""
        rows, width = self._rows(spec)
        return ceil(rows / self.sizes.dp_shard) * width

    def _small(self, spec: ParameterSpec) -> int:
        """Elements that the optimizer packs with others (optim.py)."""
        return -(-self._held(spec) // ALIGNED) * ALIGNED if self._held(spec) <= SMALL else 0

    def _whole(self, spec: ParameterSpec) -> int:
        """Elements once FSDP2 has gathered them."""
        return self._held(spec) * self.sizes.dp_shard

    def _copies(self, units: list[_Unit], has_head: bool) -> int:
        """Copies (precision/copies.py) of matrices, and of a tied embedding that makes logits; under FSDP2 of FP8."""
        if half_dtype(self.recipe.precision) is None:
            return 0
        tied, sharded = self.model.tied_embeddings and has_head, self.sizes.dp_shard > 1

        def size(spec: ParameterSpec) -> int:
            linear = spec.parts[0].role in _LINEAR_ROLES or (tied and spec.name == "embedding.weight")
            return self.compute * self._held(spec) if linear and len(spec.shape) == 2 and not sharded else 0

        codes = sum(unit.times * self._codes(unit, self._held) for unit in units)
        return codes + self._sum((unit for unit in units if not unit.in_fp8), size)

    def _codes(self, unit: _Unit, elements: Callable[[ParameterSpec], int]) -> int:
        """Codes of the matrices of one unit that are in FP8."""
        read = (spec for spec in unit.specs if spec.matrix and spec.parts[0].role in _LINEAR_ROLES)
        return sum(map(elements, read)) if unit.in_fp8 else 0

    @property
    def _keeps_gathered(self) -> bool:
        return not self.recipe.parallel.reshard_after_forward or len(self.stages) > 1

    @property
    def _keeps_unsharded(self) -> bool:
        return self.recipe.parallel.accumulate == "unsharded" and self.num_microbatches > 1

    def _largest(self, units: list[_Unit]) -> int:
        return max(self._sum([unit._replace(times=1)], self._whole) for unit in units)

    def _gathered(self, units: list[_Unit]) -> int:
        """Of matrices in FP8 codes, and in the first step an FP32 tensor of their size, too."""
        sizes = [self.word * self._largest([unit]) + self._codes(unit, self._whole) for unit in units]
        return sum(unit.times * n for unit, n in zip(units, sizes, strict=True)) if self._keeps_gathered else max(sizes)

    def _unsharded(self, units: list[_Unit]) -> int:
        return self.word * (self._sum(units, self._whole) if self._keeps_unsharded else self._largest(units))

    def _gradients_at_loss(self, memory: MemoryPerRank) -> int:
        """Gradients and gathered weights that exist with the logits of the last microbatch.

        With gpipe no backward pass has begun by then.
        """
        gathered = memory.gathered if self._keeps_gathered else 0
        if self.num_microbatches == 1 or (self.sizes.pp > 1 and self.recipe.parallel.pipeline == "gpipe"):
            return gathered
        return gathered + (memory.unsharded if self._keeps_unsharded else memory.gradients)

    def _gradients_at_end(self, memory: MemoryPerRank) -> int:
        """Gradients in the last backward pass: sharded ones of all earlier passes, and those of a gathered unit."""
        if self._keeps_unsharded or self.num_microbatches == 1:
            return max(memory.gradients, memory.unsharded)
        return memory.gradients + memory.unsharded

    def _passing(self, units: list[_Unit]) -> int:
        """The largest new gradient; of FSDP2 a unit as it was gathered, one as it is sent, and on GPUs those ahead."""
        gradient = self.word * max(self._whole(spec) for unit in units for spec in unit.specs)
        if self.sizes.dp_shard == 1:
            return gradient + (min(BUCKET, self.word * self._sum(units, self._held)) if self.own_messages else 0)
        smallest = min(self._largest([unit]) for unit in units if any(len(spec.shape) > 1 for spec in unit.specs))
        ahead = 0 if self.on_cpu or smallest >= PREFETCHED else min(PREFETCHED, self._sum(units, self._whole))
        return gradient + 2 * self.word * self._largest(units) + min(self.compute, self.word) * ahead

    def _checkpoint(self, units: list[_Unit], stages: dict[int, Stage]) -> int:
        """Weights and moments that this rank writes; replicated ones are shared out evenly (engines/state.py)."""
        copy = self.model.tied_embeddings and not any(stage.has_embedding for stage in stages.values())

        def size(spec: ParameterSpec) -> int:
            held = 0 if copy and spec.name == "embedding.weight" else self._held(spec)
            return held * (self.sizes.tp if spec.split is not None else 1) * (self.dtypes.of(spec).itemsize + moments)

        moments, shares = len(AdamW.names) * self.word, self.sizes.tp * self.sizes.dp_replicate
        return self._sum(units, size) // shares

    def _building(self, units: list[_Unit]) -> int:
        """Whole FP32 tensors that model/init.py draws of what is sharded or rounded, one after the other."""
        specs = (spec for unit in units for spec in unit.specs)
        drawn = (s for s in specs if self._held(s) < s.num_elements or self.dtypes.of(s).itemsize < 4)
        return 4 * max((spec.num_elements for spec in drawn), default=0)
