#!/usr/bin/env python3
"""Tokens a second and memory a rank of the engines: native DDP and FSDP2, DeepSpeed's ZeRO 0 to 3, in one run.

Every measurement is a start of its own, on ranks that are new processes; the engines take turns, and medians of the
rounds are shown. All must have the same losses.

python tools/bench_engines.py --num-blocks 32 --dim 128 --rounds 5
python tools/bench_engines.py --compute bf16 --only "fsdp2,zero 3"
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench_parallel import resident

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines import make_engine
from megaresnorm.layout import check_layout
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks

NATIVE = {"ddp": {}, "fsdp2": {"dp_shard": 2}}  # the section parallel
ZERO: dict[str, dict] = {f"zero {stage}": {"zero_stage": stage} for stage in range(4)}  # the section engine
# At its defaults ZeRO-3 keeps gathered weights that are used again within 1e9 elements: all, here.
ZERO["zero 3 + nothing kept"] = {
    "zero_stage": 3,
    "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}},
}
OFFLOADED = {
    "zero 2 + optimizer on the host": {"zero_stage": 2, "offload": "optimizer"},
    "zero 3 + weights on the host": {"zero_stage": 3, "offload": "parameters"},
}
RANKS, WARM_UP = 2, 2
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}  # relative, of losses


def recipe_of(a: argparse.Namespace, name: str) -> Recipe:
    """The recipe of a contender."""
    zero = (ZERO | OFFLOADED).get(name)
    sections: dict = {"parallel": NATIVE.get(name, {})}
    if zero is not None:
        sections["engine"] = {"name": "deepspeed", **zero}
    model = {"dim": a.dim, "num_blocks": a.num_blocks, "num_heads": a.num_heads, "seq_len": a.seq_len}
    train = {"output": "none", "steps": a.steps, "global_batch": RANKS * a.micro_batch * a.microbatches}
    return build_recipe(
        {
            "model": model | {"topology": "deepnorm", "vocab_size": a.vocab_size},
            "data": {"path": "none"},
            "train": train | {"micro_batch": a.micro_batch},
            "precision": {"compute": a.compute},
            **sections,
        }
    )


def measured(rank: int, a: argparse.Namespace, name: str) -> dict[str, float | list[float]]:
    """Seconds a step, and by how much this rank has grown: when it stands ready, and at most, packages left out."""
    recipe = recipe_of(a, name)
    if recipe.engine.name == "deepspeed":
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401 - its own memory is no engine's
    from torch.distributed import fsdp  # noqa: F401 - likewise

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    context = ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu")
    engine = make_engine(recipe, context, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    shape = (a.micro_batch, a.seq_len)
    losses, seconds, cpu = [], [], []
    for step in range(WARM_UP + a.steps):
        if step == WARM_UP:
            standing = resident("VmRSS")
        parts = [torch.randint(a.vocab_size, shape, generator=generator) for _ in range(a.microbatches)]
        batch = StepBatch.of([Batch(part, part.roll(-1, 1), torch.arange(len(part))) for part in parts])
        start, start_cpu = time.perf_counter(), time.process_time()
        losses.append(engine.step(batch, 1e-3).loss or 0.0)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "cpu": statistics.median(cpu[WARM_UP:]),
        "standing": standing - before,
        "peak": resident("VmHWM") - before,
        "losses": losses,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default, what in (
        ("num-blocks", 32, "blocks of the model"),
        ("dim", 128, "its width"),
        ("num-heads", 4, "its heads"),
        ("seq-len", 64, "tokens of a sequence"),
        ("vocab-size", 1024, "tokens there are"),
        ("micro-batch", 1, "sequences of a microbatch"),
        ("microbatches", 4, "microbatches of a rank in a step"),
        ("steps", 6, "measured steps of a start"),
        ("rounds", 3, "starts of each engine, in turn"),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{what} [{default}]")
    parser.add_argument("--compute", choices=list(TOLERANCE), default="fp32", help="precision.compute [fp32]")
    parser.add_argument("--offload", action="store_true", help="also with the optimizer, or the weights, on the host")
    parser.add_argument("--only", default="", help='engines, as in "ddp,zero 2"; unset: all')
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    a = arguments()
    names = [*NATIVE, *ZERO, *(OFFLOADED if a.offload else ())]
    if a.only:
        asked = [name.strip() for name in a.only.split(",")]
        if unknown := [name for name in asked if name not in (*NATIVE, *ZERO, *OFFLOADED)]:
            print(f"--only {unknown[0]!r} is no engine; wanted some of {', '.join(NATIVE | ZERO | OFFLOADED)}")
            return 2
        names = asked
    rounds: dict[str, list[list[dict]]] = {name: [] for name in names}
    for _ in range(a.rounds):
        for name in names:
            rounds[name].append(run_ranks(RANKS, measured, a, name, timeout=600))
    tokens = RANKS * a.microbatches * a.micro_batch * a.seq_len
    wanted = rounds[names[0]][0][0]["losses"]
    found = {}
    for name, starts in rounds.items():
        ranks = [rank for start in starts for rank in start]
        worst = max(abs(x - y) / y for rank in ranks for x, y in zip(rank["losses"], wanted, strict=True))
        found[name] = {
            "tokens_per_second": tokens / statistics.median(rank["seconds"] for rank in ranks),
            "tokens_per_cpu_second": tokens / RANKS / statistics.median(rank["cpu"] for rank in ranks),
            "standing_bytes": statistics.median(rank["standing"] for rank in ranks),
            "peak_bytes": statistics.median(rank["peak"] for rank in ranks),
            "loss_difference": worst,
        }
    print(json.dumps(found, indent=1) if a.json else table(found))
    odd = [name for name, one in found.items() if one["loss_difference"] > TOLERANCE[a.compute]]
    if odd:
        print(f"{odd[0]} has other losses than {names[0]}: they do not do the same work", file=sys.stderr)
    return 1 if odd else 0


def table(found: dict[str, dict[str, float]]) -> str:
    """For people."""
    lines = [f"{'engine':30} {'tokens/s':>9} {'/CPU s':>8} {'standing MB':>12} {'peak MB':>8} {'losses':>8}"]
    for name, one in found.items():
        lines.append(
            f"{name:30} {one['tokens_per_second']:9,.0f} {one['tokens_per_cpu_second']:8,.0f} "
            f"{one['standing_bytes'] / 1e6:12.1f} {one['peak_bytes'] / 1e6:8.1f} {one['loss_difference']:8.0e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    import torch._dynamo  # once, before ranks are forked

    sys.exit(main())
