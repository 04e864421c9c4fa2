#!/usr/bin/env python3
"""Losses of one model whose matrices are stored in FP32, in BF16 with stochastic rounding, and rounded to nearest.

    megaresnorm prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 1024 --out runs/quickstart/data
    python tools/bench_weights.py --data runs/quickstart/data --lr 3e-3,3e-4

Rounding to nearest is no setting of a recipe: an update of less than half of a weight's last place is lost. How many
are is told by the share of elements of matrices that have the value in the end that they were initialized with.

    python tools/bench_weights.py --updates

measures the time of updates alone, of matrices that are packed together and of one that is updated by itself, and of
whole steps of the model.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor, nn

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.model.specs import ParameterSpec, Part
from megaresnorm.optim import Optimizer
from megaresnorm.parallel.wide import with_wide_gradient
from megaresnorm.precision import rounded_updates
from megaresnorm.recipe import OptimRecipe, Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer

CONTENDERS = {"FP32": "fp32", "BF16, stochastic": "bf16", "BF16, to nearest": "bf16"}
LAST = 20  # steps whose mean is a loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--data", help="token files, as `megaresnorm prepare` writes them")
    kind.add_argument("--updates", action="store_true", help="measure updates alone")
    parser.add_argument("--lr", default="3e-3,3e-4", help="peak learning rates [3e-3,3e-4]")
    for name, default in (("steps", 400), ("num-blocks", 8), ("dim", 128), ("seq-len", 128), ("batch", 8), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    if arguments.updates:
        print("| matrices | FP32, ns an element | BF16 | ratio |\n| --- | --- | --- | --- |")
        for rows, columns, count in ((128, 128, 256), (1024, 4096, 1)):
            fp32, bf16 = (update_seconds(rows, columns, count, dtype) for dtype in (torch.float32, torch.bfloat16))
            scale = 1e9 / (rows * columns * count)
            print(
                f"| {count} of {rows} x {columns} | {fp32 * scale:.2f} | {bf16 * scale:.2f} | {bf16 / fp32:.0f} |",
                flush=True,
            )
        fp32, bf16 = (step_seconds(arguments, weights) for weights in ("fp32", "bf16"))
        print(f"a step: {fp32:.3f} s with FP32 weights, {bf16:.3f} s with BF16")
        return
    marks = [arguments.steps * part // 4 for part in (1, 2, 3, 4)]
    print(f"| peak lr | weights | {' | '.join(f'step {mark}' for mark in marks)} | validation | unmoved |")
    print("| --- " * (len(marks) + 4) + "|")
    for lr in map(float, arguments.lr.split(",")):
        for name, weights in CONTENDERS.items():
            with tempfile.TemporaryDirectory() as folder, rounding(nearest="nearest" in name):
                recipe = recipe_of(arguments, lr, weights, Path(folder) / "run")
                losses, valid, still = trained(recipe)
            means = " | ".join(f"{mean(losses[max(0, mark - LAST) : mark]):.4f}" for mark in marks)
            print(f"| {lr:g} | {name} | {means} | {valid:.4f} | {still:.1%} |", flush=True)


def recipe_of(arguments: argparse.Namespace, lr: float, weights: str, output: Path) -> Recipe:
    model = {"topology": "pre", "norm": "rmsnorm", "num_heads": 4, "dim": arguments.dim, "seq_len": arguments.seq_len}
    train = {"output": str(output), "steps": arguments.steps, "global_batch": arguments.batch, "seed": arguments.seed}
    return build_recipe(
        {
            "model": model | {"num_blocks": arguments.num_blocks},
            "data": {"path": arguments.data or "none"},
            "train": train | {"eval_every": 0, "sample_tokens": 0, "log_every": arguments.steps},
            "optim": {"lr": lr},
            "schedule": {"kind": "cosine", "warmup_steps": arguments.steps // 20},
            "precision": {"compute": "bf16", "weights": weights},
            "checkpoint": {"every": 0},
        }
    )


def trained(recipe: Recipe) -> tuple[list[float], float, float]:
    """Loss of every step, validation loss, and the share of elements of matrices that have not moved in the end."""
    with StopSignals() as stop, Run(recipe) as run:
        summary = Trainer(run).train(stop)
        started = NativeEngine(run.recipe)
    records = [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]
    assert summary.checkpoint is not None and summary.valid_loss is not None
    checkpoint, table = Checkpoint(summary.checkpoint), started.assembled.table
    still = total = 0
    for name, weight in started.full_state().items():
        if table[name].matrix:
            still += int((checkpoint.read("weights", name) == weight).sum())
            total += weight.numel()
    return [record["loss"] for record in records], summary.valid_loss, still / total


def update_seconds(rows: int, columns: int, count: int, dtype: torch.dtype) -> float:
    """Processor time of one update of all matrices, the median of seven."""
    names = [str(number) for number in range(count)]
    weights = {name: with_wide_gradient(nn.Parameter(torch.ones((rows, columns), dtype=dtype))) for name in names}
    table = {name: ParameterSpec(name, (rows, columns), (Part("q", rows),), True, matrix=True) for name in names}
    box = ((0, rows), (0, columns))
    rounded = {name: rounded_updates.Rounded.of(1, name, [box]) for name in names if dtype == torch.bfloat16}
    optimizer = Optimizer(weights, table, OptimRecipe(), rounded=rounded)
    for weight in weights.values():
        weight.grad = torch.ones((rows, columns))
    optimizer.collect()
    times = []
    for _ in range(8):
        start = time.process_time()
        optimizer.step(1e-3)
        times.append(time.process_time() - start)
    return median(times[1:])


def step_seconds(arguments: argparse.Namespace, weights: str) -> float:
    """Processor time of one step with a vocabulary of 1,024, the median of seven."""
    values = recipe_of(arguments, 1e-3, weights, Path("none")).model_dump(exclude_none=True)
    values["model"]["vocab_size"] = 1024
    engine = NativeEngine(build_recipe(values))
    tokens = torch.randint(1024, (arguments.batch, arguments.seq_len), generator=torch.Generator().manual_seed(0))
    batch = StepBatch.of([Batch(tokens, tokens, torch.arange(len(tokens)))])
    times = []
    for _ in range(8):
        start = time.process_time()
        engine.step(batch, 1e-3)
        times.append(time.process_time() - start)
    return median(times[1:])


@contextmanager
def rounding(*, nearest: bool) -> Iterator[None]:
    """Within, updates are rounded to nearest, or as they are."""
    real = rounded_updates.rounded_at_random

    def to_nearest(x: Tensor, bits: Tensor) -> Tensor:
        return x.to(torch.bfloat16)

    rounded_updates.rounded_at_random = to_nearest if nearest else real
    try:
        yield
    finally:
        rounded_updates.rounded_at_random = real


if __name__ == "__main__":
    main()
