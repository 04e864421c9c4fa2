#!/usr/bin/env python3
"""Tokens per CPU second of FP32, of BF16 with weights cast once a step, and of autocast. One thread, in turn, medians.

python tools/bench_precision.py --num-blocks 12 --dim 256 --seq-len 256 --batch 4 --vocab-size 8192
"""

import argparse
import statistics
import time

import torch

from megaresnorm.assemble import Assembled, build_model
from megaresnorm.precision.half import HalfCopies
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe


def step_seconds(
    assembled: Assembled,
    copies: HalfCopies | None,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    *,
    autocast: bool,
    microbatches: int,
) -> float:
    """CPU seconds of the forward and backward passes of one step, with the casts that belong to it."""
    start = time.process_time()
    for _ in range(microbatches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = assembled.model(tokens)
        (assembled.cross_entropy(logits, labels)[1] / labels.numel()).backward()
    if copies is not None:
        copies.refresh()
    assembled.model.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("num-blocks", 12),
        ("dim", 256),
        ("num-heads", 4),
        ("seq-len", 256),
        ("batch", 4),
        ("vocab-size", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"[{default}]")
    parser.add_argument("--microbatches", type=int, default=1, help="microbatches in a step [1]")
    parser.add_argument("--rounds", type=int, default=8, help="measurements of each, in turn [8]")
    a = parser.parse_args()
    torch.set_num_threads(1)
    recipe = ModelRecipe(
        dim=a.dim, num_blocks=a.num_blocks, num_heads=a.num_heads, seq_len=a.seq_len, vocab_size=a.vocab_size
    )
    fp32, cast_once = (build_model(recipe, PrecisionRecipe(compute=compute)) for compute in ("fp32", "bf16"))
    tokens, labels = torch.randint(a.vocab_size, (2, a.batch, a.seq_len))
    copies = HalfCopies(cast_once.model, torch.bfloat16)
    variants = {
        "fp32": (fp32, None, False), "bf16, cast once": (cast_once, copies, False), "autocast": (fp32, None, True),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(a.rounds):
        for name, (assembled, kept, autocast) in variants.items():
            seconds[name].append(
                step_seconds(assembled, kept, tokens, labels.flatten(), autocast=autocast, microbatches=a.microbatches)
            )
    for name, times in seconds.items():
        rate = a.microbatches * a.batch * a.seq_len / statistics.median(times)
        print(f"{name:16} {rate:8,.0f} tokens per CPU second")


if __name__ == "__main__":
    main()
