#!/usr/bin/env python3
"""CPU time of steps that depth telemetry watches, beside that of steps it does not: pairs in turn, one thread, medians.

python tools/bench_depth.py --num-blocks 100 --dim 64 --seq-len 64 --batch 8
"""

import argparse
import statistics
import time

import torch

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.recipe.load import build_recipe
from megaresnorm.telemetry.depth.watch import DepthWatch

LR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"num-blocks": 100, "dim": 64, "seq-len": 64, "batch": 8, "pairs": 20, "every": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--topology", default="pre")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = {"dim": args.dim, "num_blocks": args.num_blocks, "num_heads": max(1, args.dim // 32)}
    model |= {"seq_len": args.seq_len, "vocab_size": 256, "topology": args.topology}
    train = {"output": "none", "steps": 1, "global_batch": args.batch, "micro_batch": args.batch}
    recipe = build_recipe({"model": model, "data": {"path": "none"}, "train": train})
    engine = NativeEngine(recipe)
    watch = DepthWatch(recipe.model, engine.assembled, TensorNorms(engine, recipe.optim))
    rows = torch.randint(256, (args.batch, args.seq_len + 1))
    batch = StepBatch.of([Batch(rows[:, :-1], rows[:, 1:], torch.arange(args.batch))])
    plain, watched = [], []
    for pair in range(args.pairs + 2):
        start = time.process_time()
        engine.step(batch, LR)
        middle = time.process_time()
        with watch.watching(LR):
            engine.step(batch, LR)
        if pair > 1:  # the first ones choose kernels and make buffers
            plain.append(middle - start)
            watched.append(time.process_time() - middle)
    step = statistics.median(plain)
    more = statistics.median(b - a for a, b in zip(plain, watched, strict=True))
    print(f"a step {1e3 * step:.1f} ms, watched {1e3 * more:.1f} ms more ({100 * more / step:.1f} %)")
    print(f"every {args.every}-th: {100 * more / step / args.every:.2f} % of the CPU time")


if __name__ == "__main__":
    main()
