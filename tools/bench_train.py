#!/usr/bin/env python3
"""Training speed beside the peers: the same weights, batches and optimizer, one thread, in turn.

python tools/bench_train.py --out bench
python tools/bench_train.py --shapes 200x64 --architectures gpt2 --precisions fp32 --rounds 7

Every contender is a process of its own with one thread and the same malloc settings. Before anything is timed, its logits
and the losses of its first steps are compared with ours. A round gives each contender the same number of steps in turn,
the order changing from round to round; rates are tokens per CPU second, medians over the rounds, and a ratio is the median of the
rounds' ratios. In BF16 a peer runs under autocast and with BF16 weights, and the faster one counts. We run a second time with
the reference kernels, which shows what the others give.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peers import PEERS, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaresnorm.assemble import build_model
from megaresnorm.config import build_recipe
from megaresnorm.data.loader import Batch
from megaresnorm.engines.native import Decision, NativeEngine

OURS = "megaresnorm"
REFERENCE = f"{OURS}, reference kernels"
REFERENCE_KERNELS = {
    "add_norm": "reference",
    "attention": "sdpa",
    "activation": "reference",
    "cross_entropy": "reference",
}
# Chunks above 32 MiB would be mapped, touched and unmapped anew in every step; and large pages where the kernel has them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CHECK_STEPS = {OURS: 10, REFERENCE: 10}  # a peer: 3
LOGIT_TOLERANCE = {"fp32": 2e-4, "autocast": 0.25, "bf16": 0.25}  # of logits with a deviation of about 1
LOSS_TOLERANCE = {"fp32": 1e-3, "autocast": 0.05, "bf16": 0.05}
CLASSES = {  # of an operator by what its name contains, the first that fits
    "attention": ("scaled_dot_product", "bmm", "aten::_softmax", "attention"),
    "matmul": ("aten::mm", "addmm", "matmul"),
    "norm + residual": ("layer_norm", "rms_norm", "rsqrt", "aten::pow", "PowBackward", "aten::mean", "MeanBackward", "aten::add",
                        "add_norm", "RMSNorm"),
    "activation": ("gelu", "silu", "activation"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "logsumexp", "CrossEntropy", "aten::exp", "scatter"),
    "optimizer": ("adamw", "AdamW", "_norm", "foreach", "clamp", "zero_grad"),
}  # fmt: skip


def main() -> None:
    arguments = parse()
    if arguments.worker:
        serve(**json.loads(arguments.worker))
        return
    results = []
    for shape in arguments.shapes:
        for architecture in arguments.architectures:
            for precision in arguments.precisions:
                results.append(race(parse_shape(shape, architecture, arguments.vocab_size), precision, arguments))
    report = {"machine": machine(), "malloc": MALLOC if arguments.malloc == "tuned" else {}, "results": results}
    text = markdown(report)
    print(text)
    if arguments.out:
        Path(f"{arguments.out}.json").write_text(json.dumps(report, indent=1))
        Path(f"{arguments.out}.md").write_text(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"type": lambda text: text.split(",")}
    parser.add_argument(
        "--shapes", **names, default=["12x256", "200x64"], help="BLOCKSxDIM, A,B; the sequence is 256 tokens and the batch 4 "
        "from width 128 on, else 128 and 2 [12x256,200x64]"
    )  # fmt: skip
    parser.add_argument("--architectures", **names, default=list(PEERS), help=f"[{','.join(PEERS)}]")
    parser.add_argument("--precisions", **names, default=["fp32", "bf16"], help="[fp32,bf16]")
    parser.add_argument("--vocab-size", type=int, default=8192, help="[8192]")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, in turn [5]")
    parser.add_argument("--steps", type=int, default=4, help="steps in one measurement [4]")
    parser.add_argument(
        "--malloc", choices=["default", "tuned"], default="default", help="allocator settings of all [default]"
    )
    parser.add_argument("--out", help="write OUT.json and OUT.md as well")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def parse_shape(text: str, architecture: str, vocab_size: int) -> Shape:
    num_blocks, dim = (int(part) for part in text.split("x"))
    wide = dim >= 128
    ffn_dim = 4 * dim if architecture == "gpt2" else -(-8 * dim // 3 // 16) * 16
    heads = max(2, dim // 64)
    return Shape(architecture, num_blocks, dim, heads, 256 if wide else 128, 4 if wide else 2, vocab_size, ffn_dim)


# --- the race ---------------------------------------------------------------------------------------------------------


def race(shape: Shape, precision: str, arguments: argparse.Namespace) -> dict:
    """All contenders of one shape and precision, checked and then timed in turn."""
    modes = ["fp32"] if precision == "fp32" else ["autocast", "bf16"]
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(OURS, precision, shape, folder, arguments.malloc)]  # writes the weights that peers load
        try:
            contenders += [
                Contender(name, mode, shape, folder, arguments.malloc)
                for name in PEERS[shape.architecture]
                for mode in modes
            ]
            for peer in contenders[1:]:
                compare(contenders[0], peer)
            contenders.append(Contender(REFERENCE, precision, shape, folder, arguments.malloc))
            drift = compare(contenders[0], contenders[-1])
            rates: dict[str, list[float]] = {c.label: [] for c in contenders}
            for turn in range(arguments.rounds):
                shift = turn % len(contenders)
                for contender in contenders[shift:] + contenders[:shift]:
                    seconds = contender.ask("time", arguments.steps)["cpu_seconds"]
                    rates[contender.label].append(arguments.steps * shape.batch * shape.seq_len / seconds)
            ends = {c.label: c.ask("profile", arguments.steps) for c in contenders}
        finally:
            for contender in contenders:
                contender.close()
    ours = contenders[0].label
    rows = [
        {
            "name": label,
            "tokens_per_cpu_second": statistics.median(values),
            "ours_over_this": statistics.median(a / b for a, b in zip(rates[ours], values, strict=True)),
            "all_rates": values,
            **ends[label],
        }
        for label, values in rates.items()
    ]
    best = max((row for row in rows if not row["name"].startswith(OURS)), key=lambda row: row["tokens_per_cpu_second"])
    print(
        f"{shape.num_blocks}x{shape.dim} {shape.architecture} {precision}: {best['ours_over_this']:.2f}x {best['name']}",
        file=sys.stderr,
    )
    return {
        "shape": asdict(shape),
        "precision": precision,
        "best_peer": best["name"],
        "ratio": best["ours_over_this"],
        "loss_difference_of_kernels": drift,
        "rows": rows,
    }


@dataclass
class Contender:
    """A process that trains one model, asked over a pipe."""

    name: str
    mode: str
    shape: Shape
    folder: str
    malloc: str

    def __post_init__(self) -> None:
        self.label = self.name if self.name.startswith(OURS) else f"{self.name}, {self.mode}"
        setting = {"name": self.name, "mode": self.mode, "shape": asdict(self.shape), "folder": self.folder}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **(MALLOC if self.malloc == "tuned" else {})},
        )
        self.checks = self._answer()

    def ask(self, what: str, steps: int) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "steps": steps}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"bench_train: {self.label} ended with exit code {self._process.wait()}; see its error above"
            )
        return json.loads(line)


def compare(ours: Contender, peer: Contender) -> float:
    """Refuse to time what does not compute what we compute; returns the largest difference of a loss."""
    a, b = (load_file(c.checks["logits"])["logits"].float() for c in (ours, peer))
    difference = (a - b).abs().max().item()
    if difference > LOGIT_TOLERANCE[peer.mode]:
        raise SystemExit(f"bench_train: logits of {peer.label} differ from ours by {difference:.2e}")
    losses = list(zip(ours.checks["losses"], peer.checks["losses"], strict=False))  # a peer makes fewer steps
    for step, (x, y) in enumerate(losses):
        if abs(x - y) > LOSS_TOLERANCE[peer.mode]:
            raise SystemExit(f"bench_train: at step {step + 1} the loss of {peer.label} is {y:.5f}, ours {x:.5f}")
    return max(abs(x - y) for x, y in losses)


# --- a contender's own process ----------------------------------------------------------------------------------------


def serve(name: str, mode: str, shape: dict, folder: str) -> None:
    """Build, report what the parent checks, then time or profile steps until the pipe closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    torch.set_num_threads(1)
    made = Shape(**shape)
    weights_file = Path(folder, "weights.safetensors")
    step: Callable[[Tensor, Tensor], float]
    if name.startswith(OURS):
        engine = build_ours(made, mode, {} if name == OURS else REFERENCE_KERNELS)
        if name == OURS:
            save_file({n: t.clone() for n, t in engine.tensors()["weights"].items()}, weights_file)
        logits, step = engine.model, lambda tokens, labels: ours_step(engine, tokens, labels)
    else:
        peer = PEERS[made.architecture][name](made, load_file(weights_file), mode)
        logits, step = peer.logits, peer.step
    data = batches(made)
    file = Path(folder, f"{name}-{mode}.safetensors".replace(" ", "-").replace(",", ""))
    with torch.no_grad():
        save_file({"logits": logits(data[0][0]).float().reshape(-1, made.vocab_size).contiguous()}, file)
    losses = [step(*data[i % len(data)]) for i in range(CHECK_STEPS.get(name, 3))]
    answer = {"logits": str(file), "losses": losses}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        steps = request["steps"]
        answer = timed(step, data, steps) if request["what"] == "time" else profiled(step, data, steps)


def build_ours(shape: Shape, mode: str, kernels: dict[str, str]) -> NativeEngine:
    wiring = (
        {"norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True}
        if shape.architecture == "gpt2"
        else {"norm": "rmsnorm", "positions": "rope", "ffn": "swiglu"}
    )
    sizes = {k: v for k, v in asdict(shape).items() if k not in ("architecture", "batch")}
    recipe = build_recipe(
        {
            "model": {"topology": "pre", **sizes, **wiring},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1, "global_batch": shape.batch},
            "precision": {"compute": mode},
            "kernels": kernels,
        }
    )
    return NativeEngine(build_model(recipe.model, recipe.precision, recipe.kernels), recipe)


def ours_step(engine: NativeEngine, tokens: Tensor, labels: Tensor) -> float:
    batch = Batch(tokens, labels, torch.arange(len(tokens)))
    return engine.step([batch], 1e-3, lambda stats: Decision.APPLY).loss


def batches(shape: Shape, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same random tokens for every contender."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(shape.vocab_size, (count, shape.batch, shape.seq_len + 1), generator=generator)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def timed(step: Callable, data: list, steps: int) -> dict:
    start = time.process_time()
    for i in range(steps):
        step(*data[i % len(data)])
    return {"cpu_seconds": time.process_time() - start}


def profiled(step: Callable, data: list, steps: int) -> dict:
    """Milliseconds a step by class of operation, and the process's peak memory (before the profiler adds its own)."""
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        timed(step, data, steps)
    milliseconds = dict.fromkeys([*CLASSES, "rest"], 0.0)
    for operator in trace.key_averages():
        kind = next((k for k, parts in CLASSES.items() if any(p in operator.key for p in parts)), "rest")
        milliseconds[kind] += operator.self_cpu_time_total / 1e3 / steps
    return {"peak_mib": int(peak.split()[1]) // 1024, "milliseconds": milliseconds}


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"


def markdown(report: dict) -> str:
    lines = [f"{report['machine']}; one thread; malloc {'tuned' if report['malloc'] else 'default'}.", ""]
    for result in report["results"]:
        shape = result["shape"]
        lines += [
            f"**{shape['num_blocks']} blocks x {shape['dim']}, {shape['architecture']}, {result['precision']}** (sequence "
            f"{shape['seq_len']}, batch {shape['batch']}, vocabulary {shape['vocab_size']}): "
            f"{result['ratio']:.2f}x the best peer, {result['best_peer']}; over ten steps losses differ from those "
            f"of the reference kernels by at most {result['loss_difference_of_kernels']:.1e}",
            "",
            f"| | tokens per CPU second | ours is | peak MiB | {' | '.join(f'{c}, ms' for c in [*CLASSES, 'rest'])} |",
            "| --- " * (4 + len(CLASSES) + 1) + "|",
        ]
        for row in result["rows"]:
            cells = [f"{row['milliseconds'][c]:.0f}" for c in [*CLASSES, "rest"]]
            ratio = "" if row["name"] == OURS else f"{row['ours_over_this']:.2f}x"
            lines.append(
                f"| {row['name']} | {row['tokens_per_cpu_second']:,.0f} | {ratio} | {row['peak_mib']:,} | {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
