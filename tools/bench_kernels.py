#!/usr/bin/env python3
"""Bandwidth of add_norm beside its peers, as a share of a copy measured in the same run.

python tools/bench_kernels.py --out kernels
python tools/bench_kernels.py --device cpu --rows 8192 --columns 1024 --malloc tuned

A call reads and writes what the table of bytes below says; a peer that reads its sum once more, or writes it, takes
longer for the same bytes. Every call gets other buffers, more of them together than the last cache holds. Contenders
take turns; figures are medians. On a GPU times are those of CUDA graphs, on a CPU of one thread's processor time.
Gradients go through autograd and come with the allocation of every result, for all contenders alike.

fp8-row, fp8-block, fp8-mx and fp8-tensor are BF16 inputs whose branch input is written in FP8; the scale of a tensor is
known before. Beside each is add_norm in BF16 with a kernel behind it that quantizes, which moves 11 bytes where one
pass moves 7, and the peers' BF16, which nobody has quantized.

"megaresnorm liger" and the like are our backends by other packages, with our types and weights in FP32; "Liger" and
"quack" are called as their own users call them. Backends that cannot run are named with the reason before the tables.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from bench_train import machine
from contenders import MALLOC
from norm_contenders import calls

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm.spec import FORMS
from megaresnorm.kernels.registry import backends

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Bytes an element, x and delta of the same type: forward reads x and delta, writes the sum and the output; backward
# reads the gradients of both and the sum, and writes one gradient, which is that of x and of delta.
BYTES = {"fp32": (16, 16), "bf16": (8, 8), **{f"fp8-{form}": (7, 8) for form in FORMS}}
Step = Callable[[int], object]  # with the number of the buffers to use; returns what it has made
CALLS, SPIN = (
    20,
    2_000_000,
)  # calls in a graph at least; cycles that a GPU waits before it, so that its launch is hidden


def main() -> None:
    arguments = parse()
    if arguments.malloc == "tuned" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    load_backends()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    results = []
    for kernel in backends("add_norm"):
        if reason := kernel.requires(device, torch.bfloat16):
            print(f"{kernel.backend}: {reason}")
    for columns in arguments.columns:
        for precision in arguments.precisions:
            for kind in arguments.norms:
                results += measure(device, arguments.rows, columns, precision, kind, arguments.rounds)
                print(
                    markdown([r for r in results if same(r, results[-1])]),
                    flush=True,
                )
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{machine()}; one thread; malloc {arguments.malloc}"
    )
    report = {"machine": where, "torch": torch.__version__, "rows": arguments.rows, "results": results}
    if arguments.out:
        Path(f"{arguments.out}.json").write_text(json.dumps(report, indent=1) + "\n")
        draw(results, where, Path(f"{arguments.out}.png"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu", help="[cuda if there is one]")
    add("--rows", type=int, default=8192, help="[8192]")
    add(
        "--columns",
        type=lambda text: [int(part) for part in text.split(",")],
        help="A,B [GPU 1024,2048,4096,8192; CPU 256,1024]",
    )
    add(
        "--precisions",
        type=lambda text: words(text, BYTES),
        default=["bf16", "fp32"] + (["fp8-row", "fp8-block", "fp8-tensor"] if gpu else []),
        help="bf16, fp32, fp8-row, fp8-block, fp8-mx, fp8-tensor",
    )
    add(
        "--norms",
        type=lambda text: words(text, ("rmsnorm", "layernorm")),
        default=["rmsnorm", "layernorm"],
        help="[rmsnorm,layernorm]",
    )
    add("--rounds", type=int, default=9, help="measurements of each, in turn [9]")
    add(
        "--malloc",
        choices=["default", "tuned"],
        default="tuned",
        help="allocator settings on a CPU [tuned: nothing is unmapped]",
    )
    add("--out", help="write OUT.json and OUT.png")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU here")
    arguments.columns = arguments.columns or ([1024, 2048, 4096, 8192] if arguments.device == "cuda" else [256, 1024])
    return arguments


def words(text: str, known: Iterable[str]) -> list[str]:
    """Words with commas between them, each one of ``known``."""
    for word in text.split(","):
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
    return text.split(",")


def same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("columns", "precision", "norm"))


def measure(
    device: torch.device, rows: int, columns: int, precision: str, kind: str, rounds: int, working_set: int = 256 << 20
) -> list[dict]:
    """Forward and backward of every contender, and the copy that they are compared with.

    Args:
        working_set: bytes of all buffers together, well above the last cache.
    """
    dtype = DTYPES.get(precision, torch.bfloat16)
    size = rows * columns * dtype.itemsize
    count = max(2, -(-working_set // (4 * size)))  # sets of buffers
    x, delta, d_sum, d_out = (
        [torch.randn(rows, columns, device=device).to(dtype) for _ in range(count)] for _ in range(4)
    )
    weight, bias = torch.randn(columns, device=device), torch.randn(columns, device=device)
    contenders = {}
    for name, function in calls(device, dtype, precision, kind, weight, bias).items():
        steps = both(function, x, delta, d_sum, d_out)
        try:
            steps[1](0)
        except Exception as e:  # noqa: BLE001  (one contender's failure is its own)
            print(f"{name} fails: {(str(e) or type(e).__name__).splitlines()[0][:200]}", file=sys.stderr)
            continue
        contenders[name] = steps
    target = [torch.empty_like(t) for t in x]
    copies = lambda i: target[i].copy_(x[i])  # noqa: E731
    timer = Timer(device, count)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    copy: list[float] = []
    for turn in range(rounds):
        names = list(contenders)
        copy.append(timer.seconds(copies))
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            forward, whole = (timer.seconds(step) for step in contenders[name])
            times[name].append((forward, whole))
    rate = 2 * size / statistics.median(copy)
    out = []
    for name, measured in times.items():
        forward = statistics.median(m[0] for m in measured)
        whole = statistics.median(m[1] for m in measured)
        moved = [part * rows * columns for part in BYTES[precision]]
        out.append(
            {
                "columns": columns, "precision": precision, "norm": kind, "name": name, "copy_gb_s": rate / 1e9,
                "forward_ms": 1e3 * forward, "both_ms": 1e3 * whole,
                "forward_gb_s": moved[0] / forward / 1e9, "both_gb_s": sum(moved) / whole / 1e9,
                "forward_of_copy": moved[0] / forward / rate, "both_of_copy": sum(moved) / whole / rate,
                "backward_of_copy": moved[1] / max(whole - forward, 1e-9) / rate,
            }
        )  # fmt: skip
    eager = next(r["both_ms"] for r in out if r["name"] == "eager")
    return [{**r, "eager_over_this": eager / r["both_ms"]} for r in out]


class Timer:
    """Median seconds of a step: of a CUDA graph's replays, or of this thread's processor time."""

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self.count = device, count
        self.calls = -(-CALLS // count) * count
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.graphs: dict[Step, torch.cuda.CUDAGraph] = {}

    def seconds(self, step: Step) -> float:
        if self.device.type == "cuda":
            return self._graph(step)
        step(0)
        start = time.thread_time()
        for i in range(self.count):
            step(i)
        return (time.thread_time() - start) / self.count

    def _graph(self, step: Step) -> float:
        if step not in self.graphs:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(3):
                    step(i % self.count)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # one for all: nobody reads what an earlier one has made
                # Kept until the end of the recording: otherwise every call would write the same memory, which stays
                # in the last cache.
                kept = [step(i % self.count) for i in range(self.calls)]
            del kept
            self.graphs[step] = graph
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SPIN)
        begin.record()
        self.graphs[step].replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.calls


def both(function: Callable, x: list, delta: list, d_sum: list, d_out: list) -> tuple[Step, Step]:
    """(forward alone, forward and backward)."""

    def forward(i: int) -> object:
        with torch.no_grad():
            return function(x[i], delta[i])

    def whole(i: int) -> object:
        a, b = x[i].detach().requires_grad_(), delta[i].detach().requires_grad_()
        z, y, *codes = function(a, b)
        return z, y, codes, torch.autograd.grad((z, y), (a, b), (d_sum[i], d_out[i]))

    return forward, whole


def markdown(results: list[dict]) -> str:
    first = results[0]
    lines = [
        f"**{first['columns']} columns, {first['norm']}, {first['precision']}**: copy {first['copy_gb_s']:.1f} GB/s",
        "",
        "| | forward, ms | with backward, ms | forward / copy | backward / copy | eager / this |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results, key=lambda r: r["both_ms"]):
        lines.append(
            f"| {r['name']} | {r['forward_ms']:.2f} | {r['both_ms']:.2f} | {r['forward_of_copy']:.0%} | "
            f"{r['backward_of_copy']:.0%} | {r['eager_over_this']:.2f}x |"
        )
    return "\n".join([*lines, ""])


def draw(results: list[dict], where: str, path: Path) -> None:
    """GB/s of forward and backward together, one panel for each precision and norm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r["precision"], r["norm"]) for r in results})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axis, (precision, norm) in zip(axes[0], panels, strict=True):
        here = [r for r in results if (r["precision"], r["norm"]) == (precision, norm)]
        columns = sorted({r["columns"] for r in here})
        names = list(dict.fromkeys(r["name"] for r in here))
        for k, name in enumerate(names):
            heights = [next(r["both_gb_s"] for r in here if r["columns"] == c and r["name"] == name) for c in columns]
            axis.bar([i + k / (len(names) + 1) for i in range(len(columns))], heights, 1 / (len(names) + 1), label=name)
        copies = [next(r["copy_gb_s"] for r in here if r["columns"] == c) for c in columns]
        axis.plot([i + 0.4 for i in range(len(columns))], copies, "k_", markersize=26, label="copy")
        axis.set_xticks([i + 0.4 for i in range(len(columns))], [str(c) for c in columns])
        axis.set_title(f"{norm}, {precision}")
        axis.set_xlabel("columns")
    axes[0][0].set_ylabel("GB/s, forward and backward")
    handles = dict(zip(*(list(reversed(x)) for x in axes[0][-1].get_legend_handles_labels()), strict=True))
    figure.legend(handles, handles.values(), loc="lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(where, fontsize=8)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
