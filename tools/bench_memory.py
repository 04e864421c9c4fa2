#!/usr/bin/env python3
"""Bytes that a dry run tells of a rank, beside those of a real one: its states, and the peak of two steps.

python tools/bench_memory.py     # eight recipes: one rank, tp 2, pp 2, FSDP2 over 2; FP32 and BF16

States are weights, gradients, moments, BF16 copies and packed gradients, counted tensor by tensor. The peak is that of
the process's resident memory from before the model is built until two optimizer steps are done, on Linux, of the rank
with the most; the interpreter and its libraries are not in it.
"""

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.layout import check_layout
from megaresnorm.memory import memory_of_stages
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one rank": (1, {}),
    "tp 2": (2, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
    "FSDP2 over 2": (2, {"dp_shard": 2}),
}
STATES = ("weights", "gradients", "optimizer", "copies", "packed")
MB = 1e6


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    print("MB a rank          states: told   real  ratio   peak: certain  told   real   real / told")
    for name, (ranks, parallel) in LAYOUTS.items():
        for compute in ("fp32", "bf16"):
            recipe = make_recipe(parallel, compute)
            told = memory_of_stages(recipe, ranks)
            found = [one for group in run_ranks(ranks, measured, recipe) for one in [group]]
            rows = []
            for stage, states, peak in found:
                memory = told[stage]
                expected = sum(getattr(memory, kind) for kind in STATES)
                certain, likely = (getattr(memory.host, kind) - memory.process for kind in ("certain", "likely"))
                rows.append((peak, states, expected, certain, likely))
            peak, states, expected, certain, likely = max(rows)
            print(
                f"{name:13} {compute}      {expected / MB:7.1f} {states / MB:6.1f}  {states / expected:5.3f}          "
                f"{certain / MB:6.1f} {likely / MB:6.1f} {peak / MB:6.1f}   {peak / likely:5.2f}"
            )


def make_recipe(parallel: dict, compute: str) -> Recipe:
    return build_recipe(
        {
            "model": {
                "dim": 512, "num_blocks": 8, "num_heads": 8, "seq_len": 256, "vocab_size": 4096, "topology": "deepnorm",
            },
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 2, "global_batch": 4, "micro_batch": 2},
            "precision": {"compute": compute},
            "parallel": parallel,
            "checkpoint": {"asynchronous": False},
        }
    )  # fmt: skip


def measured(rank: int, recipe: Recipe) -> tuple[int, int, int]:
    """Pipeline stage, bytes of the states, and growth of resident memory at its peak."""
    warm_up(recipe)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    engine = NativeEngine(recipe, ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu"))
    batch = batch_of(engine, recipe)
    for _ in range(2):
        assert engine.step(batch, 1e-4).applied
    peak = resident("VmHWM") - before
    engine.gradients(batch)
    return engine.assembled.context.pp.rank, sum(tensor.nbytes for tensor in states_of(engine)), peak


def states_of(engine: NativeEngine) -> list[Tensor]:
    parameters, optimizer = engine.assembled.parameters(), engine._optimizer
    packed = [p.grad for p in optimizer.tensors if p.grad is not None and all(p is not q for q in parameters.values())]
    found = [local(p.detach()) for p in parameters.values()]
    found += [local(p.grad) if p.grad is not None else local(p.detach()) for p in parameters.values()]
    found += [t for p in parameters.values() for t in optimizer.state(p).values()]
    return found + packed + engine.low_precision.copies


def batch_of(engine: NativeEngine, recipe: Recipe) -> StepBatch:
    """This rank's share of a global batch."""
    train, data_ranks = recipe.train, engine.assembled.context.dp.size
    micro = recipe.train.micro_batch_of(data_ranks, engine.assembled.context.pp.size)
    tokens = torch.zeros((micro, recipe.model.seq_len), dtype=torch.int64)
    count = -(-train.global_batch // data_ranks // micro)
    batches = [Batch(tokens, tokens, torch.arange(micro)) for _ in range(count)]
    return StepBatch.of(batches, engine.stack)


def warm_up(recipe: Recipe) -> None:
    """A step of a tiny model: libraries, threads and buffers of messages are there before anything is measured."""
    tiny = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"dim": 16, "num_blocks": 2, "seq_len": 16})}
    )
    engine = NativeEngine(tiny, ParallelContext.create(check_layout(tiny, dist.get_world_size()), "cpu"))
    engine.step(batch_of(engine, tiny), 1e-4)


def resident(name: str) -> int:
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(name))) * 1024


if __name__ == "__main__":
    main()
