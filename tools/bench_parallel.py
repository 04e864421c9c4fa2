#!/usr/bin/env python3
"""What parallelism costs: a block in every tensor layout, collectives behind compute, pipeline bubbles, memory.

python tools/bench_parallel.py blocks      milliseconds a block, forward and backward, two ranks and one, in turn
python tools/bench_parallel.py overlap     how long each collective was on its way before it was waited for, and how
                                           long it was waited for; with --trace FILE a trace for chrome://tracing too
python tools/bench_parallel.py bubble      share of a step in which ranks wait, beside the formula; stages sleep, so
                                           that any number of ranks fits on any number of cores
python tools/bench_parallel.py memory      peak of what 1F1B and GPipe keep for backward, and of building a rank's part

Every rank is a process of one thread.
"""

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.layout import check_layout
from megaresnorm.model.stream import Stream
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.parallel.pipeline import Pipeline
from megaresnorm.parallel.shared_memory import SharedMemory
from megaresnorm.parallel.stages import bubble
from megaresnorm.recipe import Recipe, RecomputeRecipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks

TENSOR_LAYOUTS: dict[str, dict] = {
    "full": {"tp": 2},
    "tokens": {"tp": 2, "tensor_layout": "tokens"},
    "columns, merge": {"tp": 2, "tensor_layout": "columns", "columns_norm": "merge"},
    "columns, gather": {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather"},
}
KEEP = {f"{name}, keep": parallel for name, parallel in TENSOR_LAYOUTS.items() if name != "full"}
CHUNKS = {f"columns, merge in {n}": TENSOR_LAYOUTS["columns, merge"] | {"merge_chunks": n} for n in (2, 4)}
FORWARD, BACKWARD = 0.03, 0.06  # seconds that a rank's stages sleep together for a microbatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["blocks", "overlap", "bubble", "memory"])
    parser.add_argument("--rounds", type=int, default=9, help="of blocks: measurements of each, in turn [9]")
    parser.add_argument(
        "--trace", metavar="FILE", help="of overlap: write the trace of a block, one file a layout: full-FILE, ..."
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "blocks":
        print_blocks(arguments.rounds)
    elif arguments.what == "overlap":
        print_overlap(arguments.trace)
    elif arguments.what == "bubble":
        print_bubbles()
    else:
        print_memory()


def make_recipe(dim: int, seq_len: int, num_blocks: int, parallel: dict, **train: int) -> Recipe:
    heads = max(2, dim // 64)
    return build_recipe(
        {
            "model": {
                "dim": dim, "num_blocks": num_blocks, "num_heads": heads, "seq_len": seq_len, "vocab_size": 512,
                "topology": "pre", "norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True,
            },
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1, "global_batch": 4} | train,
            "parallel": parallel,
        }
    )  # fmt: skip


def assemble(recipe: Recipe, num_ranks: int | None = None) -> NativeEngine:
    return NativeEngine(recipe, ParallelContext.create(check_layout(recipe, num_ranks or dist.get_world_size()), "cpu"))


# --- a block in every tensor layout -----------------------------------------------------------------------------------


def print_blocks(rounds: int) -> None:
    print("milliseconds a block, forward and backward (medians): one rank, then two in each layout")
    for dim, seq_len, num_blocks in ((64, 128, 12), (256, 1024, 6), (1024, 1024, 2)):
        found = run_ranks(2, block_milliseconds, dim, seq_len, num_blocks, rounds)[0]
        print(f"D {dim:5}, T {seq_len:5}:  " + "   ".join(f"{name} {ms:.2f}" for name, ms in found.items()))


def block_milliseconds(rank: int, dim: int, seq_len: int, num_blocks: int, rounds: int) -> dict[str, float]:
    """Of one sequence; all ranks start together."""
    runs = {"one rank": block_runner(dim, seq_len, num_blocks, {}, 1)}
    for name, parallel in (TENSOR_LAYOUTS | KEEP | CHUNKS).items():
        runs[name] = block_runner(dim, seq_len, num_blocks, parallel, 2, keeps=name in KEEP)
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            if name != "one rank" or rank == 0:
                run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) / num_blocks for name, values in seconds.items()}


def block_runner(
    dim: int, seq_len: int, num_blocks: int, parallel: dict, num_ranks: int, *, keeps: bool = False
) -> Callable[[], None]:
    recipe = make_recipe(dim, seq_len, num_blocks, parallel)
    if keeps:
        recipe = recipe.model_copy(update={"recompute": RecomputeRecipe(gathered="keep")})
    assembled = assemble(recipe, num_ranks).assembled
    model, layout = assembled.model, assembled.layout
    rows = model.rows(torch.zeros((1, seq_len), dtype=torch.int64))
    x = torch.randn(layout.tokens(torch.zeros(seq_len)).shape[0], layout.width(dim)).requires_grad_()
    dx = torch.randn_like(x)

    def run() -> None:
        model.add_norm.trunk(model.run_blocks(Stream(x), rows)).backward(dx)

    return run


# --- collectives behind compute ---------------------------------------------------------------------------------------


def print_overlap(trace: str | None) -> None:
    print(
        "D 256, T 1024, a block forward and backward: collectives by bytes, the time each had before it was waited for,"
    )
    print("and the time it was then waited for (medians, microseconds)")
    for name in ("full", "tokens", "columns, merge", "columns, gather"):
        for (phase, nbytes), (count, hidden, waited) in run_ranks(2, overlap, name, trace)[0].items():
            print(f"{name:16} {phase:9} {nbytes:9,} bytes  x {count}   {hidden:7.0f} {waited:7.0f}")


def overlap(rank: int, layout: str, trace: str | None) -> dict[tuple[str, int], tuple[int, float, float]]:
    seen: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    now = ["forward"]
    start = SharedMemory.start

    def timed(self: SharedMemory, x: Tensor) -> Callable[[], Tensor]:
        wait, begun, phase = start(self, x), time.perf_counter(), now[0]

        def waited() -> Tensor:
            asked = time.perf_counter()
            with torch.profiler.record_function(f"waiting for {x.nbytes} bytes"):
                out = wait()
            seen[phase, x.nbytes].append((asked - begun, time.perf_counter() - asked))
            return out

        return waited

    SharedMemory.start = timed  # type: ignore[method-assign]
    run, repeats = block_runner(256, 1024, 1, TENSOR_LAYOUTS[layout], 2), 40
    backward = Tensor.backward
    Tensor.backward = lambda *a, **k: (now.__setitem__(0, "backward"), backward(*a, **k))[1]  # type: ignore[assignment]
    for _ in range(repeats):
        now[0] = "forward"
        run()
    if trace and rank == 0:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run()
        path = Path(trace)
        profile.export_chrome_trace(str(path.with_name(f"{layout.replace(', ', '-')}-{path.name}")))
    elif trace:
        run()
    return {
        key: (len(v) // repeats, *(1e6 * statistics.median(pair[i] for pair in v) for i in (0, 1)))
        for key, v in seen.items()
    }


# --- pipeline bubbles -------------------------------------------------------------------------------------------------


def print_bubbles() -> None:
    print("idle share of a step, measured and by the formula (p - 1) / (v m + p - 1)")
    for schedule, pp, v in (("gpipe", 2, 1), ("1f1b", 2, 1), ("gpipe", 4, 1), ("1f1b", 4, 1), ("interleaved", 4, 2)):
        for count in (4, 8, 16):
            measured = max(run_ranks(pp, idle_share, schedule, v, count))
            print(f"{schedule:12} p {pp}  v {v}  m {count:2}:  {measured:.3f}  {bubble(pp, count, v):.3f}")


def idle_share(rank: int, schedule: str, stages_per_rank: int, num_microbatches: int) -> float:
    """Of stages that sleep: 1 - what a rank sleeps / the step's time, the median of three."""
    pp = dist.get_world_size()
    context = ParallelContext.create(Sizes(pp=pp), "cpu")
    modules: dict[int, nn.Module] = {rank + i * pp: SleepingStage(stages_per_rank) for i in range(stages_per_rank)}
    pipeline = Pipeline(modules, pp * stages_per_rank, context.pp, schedule, sleeping_wire, torch.device("cpu"))
    tokens, shares = torch.zeros((num_microbatches, 1), dtype=torch.int64), []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        pipeline.run(tokens, tokens, num_microbatches, lambda y: y.sum(), backward=True)
        dist.barrier()
        shares.append(1 - num_microbatches * (FORWARD + BACKWARD) / (time.perf_counter() - start))
    return statistics.median(shares[1:])


def sleeping_wire(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (torch.empty((batch, 4), device="meta"),)


class SleepingStage(nn.Module):
    """Takes its time, and nothing of a core."""

    def __init__(self, stages_per_rank: int) -> None:
        super().__init__()
        self.share, self.weight = 1 / stages_per_rank, nn.Parameter(torch.zeros(4))

    def forward(self, received: Tensor, *, tokens_BS: Tensor, labels_BS: Tensor) -> Tensor:
        x = received if received.is_floating_point() else torch.zeros(len(received), 4)
        return _Sleep.apply(x + self.weight, self.share)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        time.sleep(FORWARD * share)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        time.sleep(BACKWARD * ctx.share)
        return grads[0], None


# --- memory -----------------------------------------------------------------------------------------------------------


def print_memory() -> None:
    print("peak of tensors kept for backward on each of four stages, 8 microbatches, in MiB")
    for schedule in ("gpipe", "1f1b"):
        print(
            f"{schedule:6} ", "  ".join(f"{peak / 2**20:7.2f}" for peak in run_ranks(4, activation_peak, schedule, 8))
        )
    print("kept by one block for backward, D 256, T 1024, in units of T D elements; and of these whole rows [T, D]")
    for name, parallel in (TENSOR_LAYOUTS | KEEP).items():
        kept, whole = run_ranks(2, kept_by_block, parallel, name in KEEP)[0]
        print(f"{name:22} {kept:7.3f} {whole:3}")
    print(
        "building a rank's part of a model: resident memory grown at most, its own parameters, "
        "the largest whole tensor, in MiB"
    )
    for name, parallel in {**BUILT, "one rank": {}}.items():
        grown, own, largest = run_ranks(2 if parallel else 1, building_peak, parallel)[0]
        print(f"{name:16} {grown / 2**20:7.1f} {own / 2**20:7.1f} {largest / 2**20:7.1f}")


def kept_by_block(rank: int, parallel: dict, keeps: bool) -> tuple[float, int]:
    """Elements that autograd keeps of a block, over T D, without parameters; and how many tensors [T, D] among them."""
    rows, dim = 1024, 256
    run = block_runner(dim, rows, 1, parallel, 2, keeps=keeps)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Without weights: matrices are parameters, and vectors [D] count for nothing here.
        if tensor.dim() > 1 and not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    widths = [tuple(tensor.shape) for tensor in kept.values()]
    elements = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())
    return elements / (rows * dim), widths.count((rows, dim))


BUILT: dict[str, dict] = {"tp 2": {"tp": 2}, "pp 2": {"pp": 2}, "dp_shard 2": {"dp_shard": 2}}


def activation_peak(rank: int, schedule: str, num_microbatches: int) -> int:
    """Bytes that autograd keeps at most during a step of a pipeline of all ranks, parameters not counted."""
    pp = dist.get_world_size()
    recipe = make_recipe(64, 64, 2 * pp, {"pp": pp, "pipeline": schedule}, global_batch=num_microbatches, micro_batch=1)
    engine = assemble(recipe)
    tokens = torch.zeros((1, 64), dtype=torch.int64)
    microbatches = [Batch(tokens, tokens, torch.tensor([i])) for i in range(num_microbatches)]
    batch = StepBatch.of(microbatches, engine.stack)
    engine.gradients(batch)
    with kept_for_backward({p.data_ptr() for p in engine.assembled.parameters().values()}) as peak:
        engine.gradients(batch)
    return peak[0]


@contextmanager
def kept_for_backward(parameters: set[int]) -> Iterator[list[int]]:
    """[0] is the most bytes that were kept at one time."""
    now, peak = [0], [0]

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.nbytes = tensor, 0 if tensor.data_ptr() in parameters else tensor.nbytes
            now[0] += self.nbytes
            peak[0] = max(peak[0], now[0])

        def __del__(self) -> None:
            now[0] -= self.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield peak


def building_peak(rank: int, parallel: dict) -> tuple[int, int, int]:
    """Peak growth of resident memory while a rank's part is built, bytes of its parameters and of the largest one."""
    dim, num_blocks = 512, 16
    recipe = make_recipe(dim, 8, num_blocks, parallel)
    small = make_recipe(16, 8, 2, parallel)
    size = dist.get_world_size()
    for what in (small, recipe):
        context = ParallelContext.create(check_layout(what, size), "cpu")
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before = resident("VmRSS")
        model = what.model.model_copy(update={"vocab_size": 25600 if what is recipe else 512})
        assembled = NativeEngine(what.model_copy(update={"model": model}), context).assembled
        grown = resident("VmHWM") - before
    own = sum(getattr(p, "_local_tensor", p).numel() * 4 for p in assembled.parameters().values())
    largest = max(4 * spec.num_elements for spec in assembled.table.values())
    return grown, own, largest


def resident(name: str) -> int:
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith(name))) * 1024


if __name__ == "__main__":
    main()
