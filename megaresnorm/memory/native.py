"""States of the native engine: FSDP2's shards, or whole parameters with DistributedDataParallel's buckets."""

from dataclasses import replace

from megaresnorm.activation_memory import ActivationMemory
from megaresnorm.memory.kinds import MemoryPerRank, Need
from megaresnorm.memory.parameters import ParameterMemory, Unit
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.optim import ALIGNED, SMALL, AdamW
from megaresnorm.parallel.data_parallel import PREFETCHED
from megaresnorm.parallel.replicas import BUCKET
from megaresnorm.recompute_budget import Held


class NativeMemory:
    """See ``States``."""

    def __init__(self, activations: ActivationMemory) -> None:
        self._activations = of = activations
        self._recipe, self._sizes, self._stages, self._on_cpu = of.recipe, of.sizes, of.stages, of.on_cpu
        self._parameters = ParameterMemory(of)
        self._word = self._parameters.word
        self._num_microbatches = of.num_microbatches
        self._own_messages = of.recipe.precision.weights == "bf16" and of.sizes.dp_replicate > 1  # parallel/replicas.py

    def of_rank(self, rank: int) -> MemoryPerRank:
        """See ``States``."""
        parameters, sharded = self._parameters, self._sizes.dp_shard > 1
        stages = {number: self._stages[number] for number in self._activations.stages_of(rank)}
        units = [unit for stage in stages.values() for unit in parameters.units(stage)]
        elements = parameters.sum(units, parameters.held)
        has_head = any(stage.has_head for stage in stages.values())
        in_buckets = self._sizes.dp_replicate > 1 and not sharded and not self._own_messages
        return MemoryPerRank(
            weights=parameters.weights(units),
            gradients=self._word * elements,
            packed=0 if sharded else self._word * parameters.sum(units, self._small),
            optimizer=len(AdamW.names) * self._word * elements,
            copies=parameters.copies(units, has_head),
            gathered=self._gathered(units) if sharded else 0,
            unsharded=self._unsharded(units) if sharded else 0,
            buckets=self._word * elements if in_buckets else 0,
            received=sum(self._activations.received(number) for number in stages),
            logits=self._activations.logits() if has_head else 0,
            checkpoint=parameters.checkpoint(units, stages.values()),
            building=parameters.building(units),
            passing=self._passing(units),
        )

    def added_up(self, memory: MemoryPerRank, held: Held, offloaded: int) -> MemoryPerRank:
        """See ``States``."""
        kept, peak = held.kept - offloaded, held.peak - offloaded
        memory = replace(memory, activations=peak, offloaded=offloaded)
        checkpoint, every = memory.checkpoint, self._recipe.checkpoint.every
        # A run that saves only at its end has its copy when gradients and activations are gone.
        early = checkpoint if 0 < every < self._recipe.train.steps else 0
        standing = memory.weights + memory.optimizer + memory.copies + memory.packed
        standing += memory.buckets + memory.received
        in_backward = standing + self._gradients_at_loss(memory)
        at_loss = in_backward + memory.logits
        at_end = standing + (0 if memory.buckets else self._gradients_at_end(memory))  # those of DDP are in its buckets
        # The loss, the fullest backward pass of the last block's, and that of the first block, with all gradients.
        most = max(at_loss + kept, in_backward + peak, at_end + peak - kept) + memory.passing
        if not self._on_cpu:
            device = Need(max(at_loss, at_end), most)
            host = memory.process + max(memory.building, checkpoint)
            return replace(memory, device=device, host=Need(host, host + offloaded))
        others = max(memory.weights + memory.building, memory.weights + memory.optimizer + memory.copies + checkpoint)
        certain = max(at_loss + early, at_end + early, others)
        return replace(memory, host=Need(memory.process + certain, memory.process + max(most + early, certain)))

    def _small(self, spec: ParameterSpec) -> int:
        """Elements that the optimizer packs with others (optim.py)."""
        held = self._parameters.held(spec)
        return -(-held // ALIGNED) * ALIGNED if held <= SMALL else 0

    def _whole(self, spec: ParameterSpec) -> int:
        """Elements once FSDP2 has gathered them."""
        return self._parameters.held(spec) * self._sizes.dp_shard

    @property
    def _keeps_gathered(self) -> bool:
        return not self._recipe.parallel.reshard_after_forward or len(self._stages) > 1

    @property
    def _keeps_unsharded(self) -> bool:
        return self._recipe.parallel.accumulate == "unsharded" and self._num_microbatches > 1

    def _largest(self, units: list[Unit]) -> int:
        return max(self._parameters.sum([unit._replace(times=1)], self._whole) for unit in units)

    def _gathered(self, units: list[Unit]) -> int:
        """Of matrices in FP8 codes, and in the first step an FP32 tensor of their size, too."""
        codes = self._parameters.codes
        sizes = [self._word * self._largest([unit]) + codes(unit, self._whole) for unit in units]
        return sum(unit.times * n for unit, n in zip(units, sizes, strict=True)) if self._keeps_gathered else max(sizes)

    def _unsharded(self, units: list[Unit]) -> int:
        whole = self._parameters.sum(units, self._whole) if self._keeps_unsharded else self._largest(units)
        return self._word * whole

    def _gradients_at_loss(self, memory: MemoryPerRank) -> int:
        """Gradients and gathered weights that exist with the logits of the last microbatch.

        With gpipe no backward pass has begun by then.
        """
        gathered = memory.gathered if self._keeps_gathered else 0
        if self._num_microbatches == 1 or (self._sizes.pp > 1 and self._recipe.parallel.pipeline == "gpipe"):
            return gathered
        return gathered + (memory.unsharded if self._keeps_unsharded else memory.gradients)

    def _gradients_at_end(self, memory: MemoryPerRank) -> int:
        """Gradients in the last backward pass: sharded ones of all earlier passes, and those of a gathered unit."""
        if self._keeps_unsharded or self._num_microbatches == 1:
            return max(memory.gradients, memory.unsharded)
        return memory.gradients + memory.unsharded

    def _passing(self, units: list[Unit]) -> int:
        """The largest new gradient; of FSDP2 a unit as it was gathered, one as it is sent, and on GPUs those ahead."""
        parameters = self._parameters
        gradient = self._word * max(self._whole(spec) for unit in units for spec in unit.specs)
        if self._sizes.dp_shard == 1:
            sent = min(BUCKET, self._word * parameters.sum(units, parameters.held)) if self._own_messages else 0
            return gradient + sent
        smallest = min(self._largest([unit]) for unit in units if any(len(spec.shape) > 1 for spec in unit.specs))
        ahead = 0
        if not self._on_cpu and smallest < PREFETCHED:
            ahead = min(PREFETCHED, parameters.sum(units, self._whole))
        return gradient + 2 * self._word * self._largest(units) + min(parameters.compute, self._word) * ahead
