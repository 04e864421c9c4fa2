#!/usr/bin/env python3
"""How long saving and loading take: MegaResNorm beside torch.distributed.checkpoint, in turn, in the same run.

python tools/bench_checkpoint.py                        a model of 100 million parameters with AdamW's state, 1.2 GB
python tools/bench_checkpoint.py --dim 256 --rounds 3   a smaller one

stall is how long training stands still for a save, until is when the checkpoint is on disk. A plain copy of the same
tensors into memory that is there already is what no asynchronous save can beat.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.saver import Saver
from megaresnorm.checkpoint.writer import bytes_of
from megaresnorm.engines.native import NativeEngine
from megaresnorm.parallel.mesh import Axis
from megaresnorm.recipe.load import build_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512, help="width [512]")
    parser.add_argument("--blocks", type=int, default=32, help="blocks [32]")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each [5]")
    parser.add_argument("--folder", type=Path, help="where to write [a temporary folder]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = make_engine(arguments.dim, arguments.blocks)
    tensors = {f"{g}.{n}": s.local for g, members in engine.tensors.items() for n, s in members.items()}
    parameters = sum(s.local.numel() for s in engine.tensors["weights"].values())
    print(
        f"{parameters:,} parameters, {len(tensors):,} tensors, {bytes_of(engine.tensors) / 1e9:.2f} GB, "
        "one process of one thread"
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        figures = measure(engine, tensors, Path(folder), arguments.rounds)
        dist.destroy_process_group()
    print_figures(figures)


def make_engine(dim: int, blocks: int) -> NativeEngine:
    recipe = build_recipe(
        {
            "model": {"dim": dim, "num_blocks": blocks, "num_heads": dim // 64, "seq_len": 128, "vocab_size": 1024,
                      "ffn": "gelu", "norm": "layernorm"},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1},
        }
    )  # fmt: skip
    return NativeEngine(recipe)


def measure(engine: NativeEngine, tensors: dict[str, Tensor], folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of everything, one round after the other. The very first, which allocates its memory, is kept apart."""
    copies = [torch.zeros_like(t) for t in tensors.values()]
    savers = {
        mode: make_saver(engine, folder / mode, mode == "asynchronous") for mode in ("synchronous", "asynchronous")
    }
    figures: dict[str, list[float]] = defaultdict(list)

    def timed(what: str, work: Callable[..., object], *arguments: object, **options: object) -> None:
        start = time.perf_counter()
        work(*arguments, **options)
        figures[what].append(time.perf_counter() - start)

    for step in range(rounds + 1):
        timed("plain copy", lambda: [c.copy_(t) for c, t in zip(copies, tensors.values(), strict=True)])
        timed("plain copy, new memory", lambda: [t.clone() for t in tensors.values()])
        for mode, saver in savers.items():
            start = time.perf_counter()
            saver.save(step, {}, {})
            figures[f"megaresnorm {mode}: stall"].append(time.perf_counter() - start)
            saver.wait()
            figures[f"megaresnorm {mode}: until"].append(time.perf_counter() - start)
        sync, later = folder / f"dcp-{step}", folder / f"dcp-async-{step}"
        start = time.perf_counter()
        dcp.save(tensors, checkpoint_id=sync)
        for when in ("stall", "until"):
            figures[f"dcp synchronous: {when}"].append(time.perf_counter() - start)
        start = time.perf_counter()
        future = dcp.async_save(tensors, checkpoint_id=later)
        figures["dcp asynchronous: stall"].append(time.perf_counter() - start)
        future.result()
        figures["dcp asynchronous: until"].append(time.perf_counter() - start)
        newest = savers["synchronous"].newest
        assert newest is not None
        timed("megaresnorm: verify and load", load, engine, newest[1])
        timed("dcp: load", dcp.load, tensors, checkpoint_id=sync)
        shutil.rmtree(sync)
        shutil.rmtree(later)
    return figures


def make_saver(engine: NativeEngine, root: Path, asynchronous: bool) -> Saver:
    return Saver(
        root, engine.tensors, Axis("control"), lambda flag: flag,
        retention=Retention(), asynchronous=asynchronous, skip_when_busy=False, max_failures=1,
    )  # fmt: skip


def load(engine: NativeEngine, path: Path) -> None:
    checkpoint = Checkpoint(path)
    for group, members in engine.tensors.items():
        checkpoint.load(group, members)


def print_figures(figures: dict[str, list[float]]) -> None:
    copy = statistics.median(figures["plain copy"][1:])
    print(f"{'':36} {'median':>8} {'x copy':>7}   {'all, the first with new memory'}")
    for what, seconds in figures.items():
        median = statistics.median(seconds[1:])
        print(f"{what:36} {median:8.3f} {median / copy:7.2f}   {' '.join(f'{s:.3f}' for s in seconds)}")


if __name__ == "__main__":
    main()
