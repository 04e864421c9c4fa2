#!/usr/bin/env python3
"""Time and memory of a step on long sequences whose documents are kept apart, beside one document a row.

python tools/bench_documents.py --seq-len 8192 --document 1024

Each case is a process of its own with one thread: the median of three steps after one, and the largest resident memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.recipe.load import build_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seq-len", 8192), ("document", 1024), ("dim", 128), ("num-blocks", 2), ("num-heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.case:
        print(json.dumps(measure(a, a.case[0], a.case[1] == "documents")))
        return
    print(f"sequence {a.seq_len}, documents of {a.document}, {a.num_blocks} blocks of {a.dim}: seconds a step, MiB")
    for backend in ("auto", "sdpa"):
        for kind in ("one", "documents"):
            command = [sys.executable, *sys.argv, "--case", backend, kind]
            seconds, peak = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            print(f"attention {backend:5} {kind:10} {seconds:7.2f} {peak / 2**20:7.0f}", flush=True)


def measure(a: argparse.Namespace, backend: str, apart: bool) -> tuple[float, int]:
    """Seconds of a step, and bytes."""
    torch.set_num_threads(1)
    recipe = build_recipe(
        {
            "model": {
                "dim": a.dim, "num_blocks": a.num_blocks, "num_heads": a.num_heads, "seq_len": a.seq_len,
                "vocab_size": 257,
            },
            "data": {"path": "none", "mask_documents": apart},
            "train": {"output": "none", "steps": 1},
            "kernels": {"attention": backend},
        }
    )  # fmt: skip
    engine = NativeEngine(recipe)
    tokens = torch.randint(257, (1, a.seq_len), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(a.seq_len).view(1, -1) // a.document if apart else None
    batch = StepBatch.of([Batch(tokens, tokens, torch.zeros(1, dtype=torch.int64), documents)])
    times = []
    for _ in range(4):
        start = time.perf_counter()
        engine.step(batch, 1e-3)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
