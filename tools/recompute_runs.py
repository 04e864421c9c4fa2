"""What bench_recompute.py measures: a model in training under one recompute policy, its memory, its time, its numbers.

A step is the forward and backward pass of one sequence. Gradients are allocated before and added to; the optimizer is
left out, whose cost no policy changes.
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read once: without it the profiler writes two lines for each use

import gc
import resource
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.garbage import no_garbage_collection
from megaresnorm.engines.native import NativeEngine
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.model.topology import beside_others
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe

VOCAB_SIZE = 512  # small, so that logits do not hide the blocks
AFTER_FORWARD = "after the forward pass"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Case(NamedTuple):
    """A model on a device.

    Attributes:
        compute: fp32 or bf16.
        device: cpu or cuda.
        deterministic: as train.deterministic.
    """

    topology: str
    compute: str
    blocks: int
    dim: int
    seq_len: int
    device: str = "cpu"
    deterministic: bool = False


class Memory(NamedTuple):
    """Bytes of tensors beyond those that were there before the step.

    Attributes:
        kept: after the forward pass.
        peak: at most.
        left: after the backward pass.
    """

    kept: int
    peak: int
    left: int


class Seconds(NamedTuple):
    """Time of a call.

    Attributes:
        all: on a CPU user and system time of the process, on a GPU between two events.
        user: without the system's, in which memory is mapped that the allocator or the system had taken away before;
            on a GPU the same as ``all``.
    """

    all: float
    user: float


def section(policy: str) -> dict[str, Any]:
    """The recipe's section ``recompute`` of a policy's name: ``branch``, ``every 10``, ``block, offload``."""
    name, *options = policy.split(", ")
    words = name.split()
    found: dict[str, Any] = {"policy": words[0]}
    if len(words) > 1:
        found["every"] = int(words[1])
    return found | ({"offload": True} if "offload" in options else {})


def recipe_of(case: Case, recompute: dict[str, Any]) -> Recipe:
    """A recipe of one sequence a step.

    Raises:
        ConfigError: the case or the policy cannot be used.
    """
    return build_recipe(
        {
            "model": {
                "topology": case.topology, **beside_others(case.topology), "num_blocks": case.blocks, "dim": case.dim,
                "num_heads": max(1, case.dim // 64), "seq_len": case.seq_len, "vocab_size": VOCAB_SIZE,
            },
            "data": {"path": "none"},
            "train": {
                "output": "none", "steps": 100, "global_batch": 1, "device": case.device,
                "deterministic": case.deterministic,
            },
            "precision": {"compute": case.compute},
            "checkpoint": {"asynchronous": False},
            "recompute": recompute,
        }
    )  # fmt: skip


def random_batches(case: Case, count: int) -> list[StepBatch]:
    """Batches of one random sequence, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCAB_SIZE, (count, 1, case.seq_len + 1), generator=generator).to(case.device)
    return [StepBatch.of([Batch(row[:, :-1], row[:, 1:], torch.arange(1, device=case.device))]) for row in rows]


class Trained:
    """A model under one policy.

    Args:
        like: another, of the same case: their weights and gradients share its memory.
    """

    def __init__(self, case: Case, recompute: dict[str, Any], like: "Trained | None" = None) -> None:
        self.device = torch.device(case.device)
        self.engine = NativeEngine(recipe_of(case, recompute), device=self.device)
        self.model, self.parameters = self.engine.model, list(self.engine.model.parameters())
        ((self.batch,),) = (step.microbatches for step in random_batches(case, 1))
        if like is None:
            self.fresh_gradients()
            return
        for own, other in zip(self.parameters, like.parameters, strict=True):
            own.data, own.grad = other.data, other.grad

    def fresh_gradients(self) -> None:
        """Allocate the gradients, with zeros."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and the objective."""
        return self.model(self.batch.tokens, labels_BS=self.batch.labels)

    def step(self) -> None:
        """One forward and backward pass."""
        differentiate(self.forward()[1])

    def outcome(self) -> list[Tensor]:
        """Loss, objective and all gradients of one step; the gradients are those of the parameters themselves."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_zero_(gradients)
        losses = self.forward()
        differentiate(losses[1])
        return [*(loss.detach() for loss in losses), *gradients]

    def memory(self) -> Memory:
        """Memory of a step."""
        gc.collect()
        with no_garbage_collection():
            return self._memory_on_gpu() if self.device.type == "cuda" else self._memory_on_cpu()

    def _memory_on_gpu(self) -> Memory:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        objective = self.forward()[1]
        kept = torch.cuda.memory_allocated() - before
        differentiate(objective)
        del objective
        torch.cuda.synchronize()
        return Memory(kept, torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)

    def _memory_on_cpu(self) -> Memory:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            objective = self.forward()[1]
            with record_function(AFTER_FORWARD):
                pass
            differentiate(objective)
            del objective
        results = profiled.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in results if e.name() == "[memory]")
        (after,) = (e.start_ns() for e in results if e.name() == AFTER_FORWARD)
        kept = now = peak = 0
        for moment, change in changes:
            now += change
            peak = max(peak, now)
            kept = now if moment <= after else kept
        return Memory(kept, peak, now)

    def seconds(self, run: Callable[[], object] | None = None) -> Seconds:
        """Time of a call, of a step without one."""
        run = run or self.step
        if self.device.type == "cpu":
            before = resource.getrusage(resource.RUSAGE_SELF)
            run()
            after = resource.getrusage(resource.RUSAGE_SELF)
            user = after.ru_utime - before.ru_utime
            return Seconds(user + after.ru_stime - before.ru_stime, user)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return Seconds(*[begin.elapsed_time(end) / 1e3] * 2)


class Times(NamedTuple):
    """Of pairs in turn.

    Attributes:
        ratio: median of the pairs' ratios.
        low, high: their quartiles.
        user_ratio: of the pairs' user time in all, since the kernel only samples what part of a step that is.
        seconds: median of a step of the first.
    """

    ratio: float
    low: float
    high: float
    user_ratio: float
    seconds: float


def race(one: Trained, other: Trained, rounds: int) -> Times:
    """Time of ``one`` over that of ``other``, which follow each other in pairs, each first in every second pair."""
    pairs = []
    gc.collect()
    with no_garbage_collection():
        for turn in range(rounds):
            first, second = (trained.seconds() for trained in ((one, other) if turn % 2 else (other, one)))
            pairs.append((first, second) if turn % 2 else (second, first))
    ratios = [a.all / b.all for a, b in pairs]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else 3 * ratios
    user = sum(a.user for a, _ in pairs) / max(sum(b.user for _, b in pairs), 1e-9)
    return Times(ratio, low, high, user, statistics.median(a.all for a, _ in pairs))


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all tensors have the same bits."""
    return all(
        torch.equal(a.view(BITS[a.itemsize]), b.view(BITS[b.itemsize])) for a, b in zip(some, others, strict=True)
    )
