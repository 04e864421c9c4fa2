"""States of DeepSpeed's engine under ZeRO's stages, and the sizes of its buffers that follow from the model's.

All parameters and gradients are FP32. Stages 1 and 2 lay all parameters of an optimizer's group into one flat tensor,
of which a rank updates a partition, in a copy. Stage 3 partitions every parameter by itself; gathered weights are not
freed where they are used again before so many elements.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import ceil
from typing import NamedTuple

from megaresnorm.activation_memory import ActivationMemory
from megaresnorm.memory.kinds import PROCESS_WITH_DEEPSPEED, MemoryPerRank, Need
from megaresnorm.memory.parameters import ParameterMemory
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.optim import AdamW, Settings, settings_of
from megaresnorm.precision.dtypes import half_dtype
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_budget import Held

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, and that of stage 0, which no setting changes
LEAST_BUCKET = 1 << 23  # from there on larger messages are no faster
PERSISTENT = 100_000  # elements: DeepSpeed's stage3_param_persistence_threshold
# Modules of a block that count its elements against stage3_max_reuse_distance before its backward pass: the block and
# its layers, in forward and in backward.
COUNTED = 2


def buffer_sizes(recipe: Recipe, specs: Iterable[ParameterSpec] | None = None) -> dict[str, int]:
    """Settings of ``zero_optimization`` that follow from the model's size, unless ``engine.deepspeed`` has others.

    A bucket of gradients is an eighth of the model, not 2 GB as DeepSpeed has it; of small models all. In stage 3 only
    norms, biases and gates stay gathered from step to step, not all matrices of a narrow model.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        specs: of all parameters, where they are known.
    """
    elements, vector = 0, 1
    for spec in specs or parameter_table(recipe.model).values():
        elements += spec.num_elements
        vector = max(vector, spec.num_elements if len(spec.shape) == 1 else 0)
    bucket = min(BUCKET, max(LEAST_BUCKET, elements // recipe.parallel.tp // 8))
    persistent = {"stage3_param_persistence_threshold": min(PERSISTENT, vector)}
    return {"reduce_bucket_size": bucket} | (persistent if recipe.engine.zero_stage == 3 else {})


class _Updated(NamedTuple):
    """Elements of what a rank updates.

    Attributes:
        all: with the padding, the same on every rank.
        largest: of one of the optimizer's groups.
        touched: of all parameters of which it updates some, whole; of the rank with the most.
    """

    all: int
    largest: int
    touched: int


def _flat_partitions(groups: Iterable[list[int]], ranks: int) -> _Updated:
    """Of stages 1 and 2: groups of consecutive parameters, each padded to twice as many elements as there are ranks."""
    sizes, touched = [], [0] * ranks
    for group in groups:
        size, start = 2 * ceil(sum(group) / (2 * ranks)), 0
        sizes.append(size)
        for elements in group:
            for rank in range(start // size, -(-(start + elements) // size)):
                touched[rank] += elements
            start += elements
    return _Updated(sum(sizes), max(sizes), max(touched))


def _partitions_of_each(groups: Iterable[list[int]], ranks: int) -> _Updated:
    """Of stage 3: of every parameter a partition, padded."""
    sizes = [sum(ceil(elements / ranks) for elements in group) for group in groups]
    return _Updated(sum(sizes), max(sizes), sum(sizes))


class _Moments(NamedTuple):
    """Elements of gradients, messages and gathered weights beside what always stands, at moments of a step.

    Attributes:
        loss: with the logits of the last microbatch.
        backward: in its backward pass, when a bucket is sent, or at the end.
        sent: when all gradients of the step are sent at last, without activations.
        update: of one of the optimizer's groups.
    """

    loss: int
    backward: int
    sent: int
    update: int


class ZeroMemory:
    """See ``States``. There is one pp rank."""

    def __init__(self, activations: ActivationMemory) -> None:
        self._activations = of = activations
        self._recipe, self._on_cpu, (self._whole,) = of.recipe, of.on_cpu, of.stages
        self._stage, self._on_host = of.recipe.engine.zero_stage, of.recipe.engine.offload
        self._ranks, self._several = of.sizes.dp_replicate, of.num_microbatches > 1
        self._parameters = ParameterMemory(of)
        self._word = self._parameters.word
        self._units = self._parameters.units(self._whole)
        specs = [*self._parameters.in_order()]
        self._sizes = [self._parameters.held(spec) for spec in specs]
        self._elements, self._largest = sum(self._sizes), max(self._sizes)
        groups: dict[Settings, list[int]] = defaultdict(list)
        for spec, size in zip(specs, self._sizes, strict=True):
            groups[settings_of(spec, of.recipe.optim)].append(size)
        partitions = _partitions_of_each if self._stage == 3 else _flat_partitions
        self._own = partitions(groups.values(), self._ranks)
        self._settings = _settings(of.recipe, specs)

    def of_rank(self, rank: int) -> MemoryPerRank:
        """See ``States``."""
        word, own, stage, on_device = self._word, self._own, self._stage, self._on_host == "none"
        parts = [self._elements, own.all * self._ranks, own.all * self._ranks, own.all]
        return MemoryPerRank(
            weights=word * parts[stage] * (self._on_host != "parameters"),
            gradients=word * self._gradients(),
            packed=word * own.largest * (on_device and stage > 0),
            masters=word * own.all * (on_device and stage in (1, 2)),
            optimizer=len(AdamW.names) * word * (own.all if stage else self._elements) * on_device,
            copies=self._parameters.copies(self._units, has_head=True) if stage < 3 else 0,
            gathered=word * (self._gathered() + self._in_transit()) if stage == 3 else 0,
            buckets=word * (self._waiting() + self._message() * self._bucket),
            logits=self._activations.logits(),
            checkpoint=self._parameters.checkpoint(self._units, [self._whole]),
            building=self._parameters.building(self._units),
            starting=word * self._starting(),
            host_states=0 if on_device else word * self._states_on_host(),
            passing=self._passing(),
            process=PROCESS_WITH_DEEPSPEED,
        )

    def added_up(self, memory: MemoryPerRank, held: Held, offloaded: int) -> MemoryPerRank:
        """See ``States``."""
        kept, peak = held.kept - offloaded, held.peak - offloaded
        memory = replace(memory, activations=peak, offloaded=offloaded)
        standing = memory.weights + memory.masters + memory.optimizer + memory.copies + self._standing_gradients(memory)
        certain, likely = (self._in_bytes(moments) for moments in (self._least(), self._most()))
        # When a bucket is full, the activations of so many blocks are gone; stages 0 and 1 send when all are.
        gone = kept * self._bucket // self._elements if self._stage > 1 else kept
        passes = max(likely.loss + memory.logits + kept, likely.loss + peak, likely.backward + peak - gone)
        most = standing + max(passes + memory.passing, likely.sent, likely.update)
        least = standing + max(certain.loss + memory.logits, certain.backward, certain.sent, certain.update)
        return self._on_machine(memory, standing, max(least, memory.starting), max(most, memory.starting))

    def _on_machine(self, memory: MemoryPerRank, standing: int, certain: int, most: int) -> MemoryPerRank:
        """Sums of a device and its host, or of a host alone."""
        checkpoint, every = memory.checkpoint, self._recipe.checkpoint.every
        beside = memory.process + memory.host_states
        if not self._on_cpu:
            host = beside + max(memory.building, checkpoint)
            return replace(memory, device=Need(certain, most), host=Need(host, host + memory.offloaded))
        early = checkpoint if 0 < every < self._recipe.train.steps else 0
        certain = max(certain + early, memory.weights + memory.building, standing + checkpoint)
        return replace(memory, host=Need(beside + certain, beside + max(most + early, certain)))

    def _most(self) -> _Moments:
        n, own, bucket, sent = self._elements, self._own, self._bucket, self._message() * self._bucket
        if self._stage < 2:
            return _Moments(n * self._several, n, n + self._waiting() + sent, self._at_update())
        if self._stage == 2:
            kept = own.touched if self._on_host == "none" else 0
            # Of the gradients that wait some are this rank's, and stay.
            waiting = self._waiting() if self._on_host != "none" else min(kept + bucket, n)
            return _Moments(0, waiting + sent, 0, self._at_update())
        gathered = self._gathered()
        # Blocks are freed as their gradients come, which are as large.
        waiting = min(gathered + bucket, n + max(self._parts()))
        return _Moments(gathered + self._in_transit(), waiting + sent, 0, self._at_update())

    def _least(self) -> _Moments:
        """As ``_most``, but what is allocated in any case: a bucket is sent when the next parameter does not fit."""
        n, bucket = self._elements, self._bucket
        bucket = bucket if bucket == n else max(0, bucket - self._largest)
        if self._stage < 2:
            return _Moments(n * self._several, n, n + bucket, self._at_update())
        gathered = self._always_gathered() if self._stage == 3 else 0
        return _Moments(gathered, max(gathered, 2 * bucket), 0, self._at_update())

    def _in_bytes(self, moments: _Moments) -> _Moments:
        return _Moments(*(self._word * elements for elements in moments))

    def _gradients(self) -> int:
        """Elements that are accumulated; of stage 2 with those of the last microbatch, before they are added."""
        if self._stage < 2:
            return self._elements
        if self._on_host != "none":
            return 0
        return self._own.all if self._stage == 3 else self._own.touched * (1 + self._several)

    def _standing_gradients(self, memory: MemoryPerRank) -> int:
        """Bytes of gradients that are there throughout a step: all of stage 3, those of earlier microbatches."""
        if self._stage == 3:
            return memory.gradients
        return self._word * self._own.touched if memory.gradients and self._stage == 2 and self._several else 0

    def _at_update(self) -> int:
        """Elements beside the standing gradients: this rank's gradients, and those of a group once more."""
        if self._on_host != "none" or self._stage == 0:
            return self._elements if self._stage < 2 else 0
        owned = self._own.touched if self._stage == 1 or (self._stage == 2 and not self._several) else 0
        return owned + self._own.largest

    @property
    def _bucket(self) -> int:
        """Elements of a full bucket at most."""
        size = BUCKET + self._largest if self._stage == 0 else max(self._settings["reduce_bucket_size"], self._largest)
        return min(self._elements, size)

    def _message(self) -> int:
        """How many tensors of a bucket's size it takes to send it: gloo's reduce-scatter makes one more."""
        return 2 if self._stage == 3 and self._on_cpu else 1

    def _waiting(self) -> int:
        """Elements of gradients that wait to be sent where they are not accumulated anyway."""
        if self._on_host != "none" and self._stage < 3:  # in a tensor that DeepSpeed makes of the setting's size
            return self._settings["reduce_bucket_size"]
        return self._bucket if self._stage > 1 else 0

    def _parts(self) -> list[int]:
        """Elements of what ZeRO-3 gathers together."""
        return [self._parameters.sum([unit._replace(times=1)], self._parameters.held) for unit in self._units]

    def _always_gathered(self) -> int:
        """Elements of whole weights that there are for certain: what stays gathered, and the largest part."""
        least = self._settings["stage3_param_persistence_threshold"]
        return min(self._elements, sum(size for size in self._sizes if size <= least) + max(self._parts()))

    def _gathered(self) -> int:
        """Elements of whole weights: also what is used again soon enough to be kept, and what is gathered ahead."""
        kept = self._settings["stage3_max_reuse_distance"] // COUNTED
        return min(self._elements, self._always_gathered() + kept + self._ahead())

    def _in_transit(self) -> int:
        """Elements of a message in which weights are gathered."""
        return max(self._ahead(), *self._parts())

    def _ahead(self) -> int:
        settings = self._settings
        return min(self._elements, settings["stage3_prefetch_bucket_size"], settings["stage3_max_live_parameters"])

    def _starting(self) -> int:
        """Elements while DeepSpeed takes the weights over: stages 1 and 2 lay them into flat tensors; stage 3 on CPUs
        copies them into masters, and makes moments and gradients before the copies can go."""
        own, stage = self._own, self._stage
        if stage in (1, 2):
            return self._elements + own.largest * self._ranks
        return (3 + len(AdamW.names)) * own.all if stage == 3 and self._on_cpu and self._on_host == "none" else 0

    def _states_on_host(self) -> int:
        """Elements: masters, moments and gradients. Stages 1 and 2: updated weights on their way back, one gradient,
        and those of earlier microbatches; stage 3: gradients as they are accumulated."""
        own = self._own
        states = (2 + len(AdamW.names)) * own.all
        if self._stage == 3:
            return states + own.all + (own.all if self._on_host == "parameters" else 0)
        return states + own.all + self._largest + (own.touched if self._several else 0)

    def _passing(self) -> int:
        """The largest new gradient; on its way to the host once more; of ZeRO-3 also a matrix in 16 bits."""
        size = self._word * self._largest * (2 if self._on_host != "none" and self._stage < 3 else 1)
        if self._stage == 3 and half_dtype(self._recipe.precision) is not None:
            size += self._parameters.compute * self._largest
        return size


def _settings(recipe: Recipe, specs: Iterable[ParameterSpec]) -> dict[str, int]:
    """Sizes as DeepSpeed will have them."""
    own = recipe.engine.passed_on.get("zero_optimization", {})
    defaults = {
        "stage3_max_reuse_distance": 10**9,
        "stage3_prefetch_bucket_size": 5 * 10**7,
        "stage3_max_live_parameters": 10**9,
    }
    return {name: int(own.get(name, size)) for name, size in (defaults | buffer_sizes(recipe, specs)).items()}
