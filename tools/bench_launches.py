#!/usr/bin/env python3
"""What a block costs the host on a GPU's way: launches and microseconds, beside Transformers and megatron-core.

python tools/bench_launches.py

No GPU is needed. Blocks are 16 wide, so that arithmetic takes nothing, and what is timed is Python, autograd and the
dispatch of operators, in this thread's processor time, forward and backward. Ours take the kernels that a GPU takes;
Triton's are compiled for sm_90 and bound to their arguments as there, and their launch is only counted. For all others
an operator that computes something is counted as one launch; views and allocations are none. The cost of one block is
the difference between models of 6 and of 18, so that what a model has once does not count. BF16 products on FP32
weights for all: the peers under autocast. A recorded microbatch (train.compile=cuda_graphs) is one launch in all.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._inductor.config
from contenders import build_ours
from peers import MEGATRON, PEERS, Place, Shape
from torch.profiler import ProfilerActivity, profile

import megaresnorm.assemble
from megaresnorm.kernels import load_backends, registry
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.model.compiled import CompiledBlocks
from megaresnorm.precision.half import HalfLinear

FEW, MANY = 6, 18
NO_LAUNCH = {  # operators that compute nothing
    "aten::" + name
    for name in (
        "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "expand_as", "select", "slice",
        "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "as_strided", "detach", "detach_",
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "alias", "flatten",
        "unflatten", "view_as", "narrow", "result_type", "is_nonzero", "item", "_local_scalar_dense", "lift_fresh",
        "to", "contiguous", "set_", "movedim", "_reshape_alias", "resolve_conj", "resolve_neg", "set_data", "numpy_T",
    )
}  # fmt: skip
GPU = {"add_norm": "triton", "attention": "sdpa", "activation": "reference", "cross_entropy": "chunked"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each, in turn [15]")
    parser.add_argument("--architectures", default="gpt2,llama", help="[gpt2,llama]")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    be_on_a_gpu()
    for architecture in arguments.architectures.split(","):
        print(f"\n| {architecture}, a block | launches | host, us | of the first |\n| --- | --- | --- | --- |")
        contenders = {name: (make(FEW), make(MANY)) for name, make in contenders_of(architecture).items()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(arguments.rounds):
            for name, pair in contenders.items():
                few, many = (timed(step) for step in pair)
                times[name].append(1e6 * (many - few) / (MANY - FEW))
        ours = times[next(iter(times))]
        for name, (few, many) in contenders.items():
            launches = (counted(many) - counted(few)) / (MANY - FEW)
            ratio = statistics.median(these / first for these, first in zip(times[name], ours, strict=True))
            print(f"| {name} | {launches:.1f} | {statistics.median(times[name]):,.0f} | {ratio:.2f}x |", flush=True)


def be_on_a_gpu() -> None:
    """Let models on CPU tensors take the kernels that a GPU takes, Triton's with a driver that only counts."""
    import stub_driver

    stub_driver.install()
    load_backends()
    kernels = registry._KERNELS["add_norm"]
    kernels["triton"] = replace(kernels["triton"], requires=lambda device, dtype: None)
    megaresnorm.assemble.half_linear = lambda dtype, device: HalfLinear()


def contenders_of(architecture: str) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Makers of a step, forward and backward, of so many blocks."""

    def shape(num_blocks: int) -> Shape:
        return Shape(architecture, num_blocks, 16, 2, 8, 1, 64, 64)

    tokens, labels = torch.randint(64, (2, 1, 8), generator=torch.Generator().manual_seed(0))

    def ours(num_blocks: int, compiled: bool = False) -> Callable[[], Any]:
        kernels = {**GPU, "add_norm": "reference"} if compiled else GPU
        model = build_ours(shape(num_blocks), "bf16", kernels, "1", 1).model
        if compiled:
            torch._inductor.config.cpp.enable_kernel_profile = True  # generated kernels are events, too
            blocks = {int(number): block for number, block in model.blocks.items()}
            model.compiled = CompiledBlocks(model.recipe, blocks, per_graph=1)
        return lambda: cross_entropy_sums(model(tokens), labels.flatten())[1].backward()

    def peer(name: str, num_blocks: int) -> Callable[[], Any]:
        weights = {n: t.clone() for n, t in build_ours(shape(num_blocks), "fp32", {}, "1", 1).full_state().items()}
        made = PEERS[architecture][name](shape(num_blocks), weights, "autocast", Place())
        return lambda: made._accumulate(tokens, labels)

    names = [name for name in PEERS[architecture] if name != MEGATRON]
    return {
        "MegaResNorm": ours,
        "MegaResNorm, compiled": lambda num_blocks: ours(num_blocks, compiled=True),
        **{name: lambda num_blocks, name=name: peer(name, num_blocks) for name in names},
        MEGATRON: lambda num_blocks: megatron(peer, num_blocks),
    }


def megatron(peer: Callable, num_blocks: int) -> Callable[[], Any]:
    """megatron-core can be set up once a process: for the second model what the first has set up is taken down."""
    if torch.distributed.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    return peer(MEGATRON, num_blocks)


def timed(step: Callable[[], Any]) -> float:
    step()
    start = time.thread_time()
    for _ in range(3):
        step()
    return (time.thread_time() - start) / 3


def counted(step: Callable[[], Any]) -> int:
    """Launches of a step: operators that compute and have no such operator inside them, and Triton's kernels."""
    import stub_driver

    step()
    stub_driver.launches.clear()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    of_triton = sum(stub_driver.launches.values())
    return of_triton + sum(_launches(event) for event in trace.events() if event.cpu_parent is None)


def _launches(event: Any) -> int:
    inside = sum(_launches(child) for child in event.cpu_children)
    computes = event.name.startswith("aten::") and event.name not in NO_LAUNCH
    generated = "cpp_fused" in event.name
    return inside or int(computes or generated)


if __name__ == "__main__":
    sys.exit(main())
