#!/usr/bin/env python3
"""Losses of one model whose matrices are stored in FP32, in BF16 with stochastic rounding, and rounded to nearest.

    megaresnorm prepare --corpus stdlib --tokenizer sentencepiece --vocab-size 1024 --out runs/quickstart/data
    python tools/bench_weights.py --data runs/quickstart/data --lr 3e-3,3e-4

Rounding to nearest is no setting of a recipe: an update of less than half of a weight's last place is lost. How many
are is told by the share of elements of matrices that have the value in the end that they were initialized with.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.engines.native import NativeEngine
from megaresnorm.precision import rounded_updates
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer

CONTENDERS = {"FP32": "fp32", "BF16, stochastic": "bf16", "BF16, to nearest": "bf16"}
LAST = 20  # steps whose mean is a loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token files, as `megaresnorm prepare` writes them")
    parser.add_argument("--lr", default="3e-3,3e-4", help="peak learning rates [3e-3,3e-4]")
    for name, default in (("steps", 400), ("num-blocks", 8), ("dim", 128), ("seq-len", 128), ("batch", 8), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    marks = [arguments.steps * part // 4 for part in (1, 2, 3, 4)]
    print(f"| peak lr | weights | {' | '.join(f'step {mark}' for mark in marks)} | validation | never moved |")
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
            "data": {"path": arguments.data},
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
