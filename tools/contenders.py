"""The processes that bench_train.py races: a model in training, on one rank or several, asked over pipes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peers import PEERS, Place, Shape
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.layout import check_layout
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe.load import build_recipe

OURS = "megaresnorm"
REFERENCE = f"{OURS}, reference kernels"
AUTO = f"{OURS}, compile auto"
COMPILED = ", layers compiled"
REFERENCE_KERNELS = {
    "add_norm": "reference",
    "attention": "sdpa",
    "activation": "reference",
    "rotary": "reference",
    "cross_entropy": "reference",
}
# Ranks, and the section `parallel` of our recipe; with -keep linears keep the rows that they have gathered.
LAYOUTS: dict[str, tuple[int, dict]] = {
    "1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2-tokens": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2-gather": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather"}),
    "tp2-merge": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "merge"}),
    "tp2-tokens-keep": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2-gather-keep": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather"}),
    "tp2-merge-keep": (2, {"tp": 2, "tensor_layout": "columns", "columns_norm": "merge"}),
    "pp2": (2, {"pp": 2}),
    "pp2-interleaved": (2, {"pp": 2, "pipeline": "interleaved"}),
    "dp2": (2, {}),
    "fsdp2": (2, {"dp_shard": 2}),
}
# Chunks above 32 MiB would be mapped, touched and unmapped anew in every step. Large pages where the kernel has them.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CHECK_STEPS = {OURS: 10, REFERENCE: 10, AUTO: 10}  # a peer: 3
LOGIT_TOLERANCE = {"fp32": 2e-4, "autocast": 0.25, "bf16": 0.25}  # of logits with a deviation of about 1
LOSS_TOLERANCE = {"fp32": 1e-3, "autocast": 0.05, "bf16": 0.05}
CLASSES = {  # of an operator by what its name contains, the first that fits
    "attention": ("scaled_dot_product", "bmm", "aten::_softmax", "attention"),
    "matmul": ("aten::mm", "addmm", "matmul"),
    "norm + residual": ("layer_norm", "rms_norm", "rsqrt", "aten::pow", "PowBackward", "aten::mean", "MeanBackward",
                        "aten::add", "add_norm", "RMSNorm"),
    "activation": ("gelu", "silu", "activation"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy", "logsumexp", "CrossEntropy", "aten::exp", "scatter"),
    "optimizer": ("adamw", "AdamW", "_norm", "foreach", "clamp", "zero_grad"),
}  # fmt: skip


@dataclass
class Contender:
    """Processes that train one model in one layout: ``bench_train.py --worker``, one for each rank, of one thread."""

    name: str
    mode: str
    shape: Shape
    folder: str
    malloc: str
    layout: str = "1"

    def __post_init__(self) -> None:
        self.label = self.name if self.name.startswith(OURS) else f"{self.name}, {self.mode}"
        if self.shape.microbatches > 1:
            self.label = f"{self.name} {self.layout}"
        self._processes = [self._start(rank) for rank in range(LAYOUTS[self.layout][0])]
        self.checks = self._answers()[0]

    def _start(self, rank: int) -> subprocess.Popen:
        setting = {
            "name": self.name, "mode": self.mode, "shape": asdict(self.shape), "folder": self.folder,
            "layout": self.layout, "rank": rank,
        }  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1"}
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("bench_train.py")), "--worker", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, **(MALLOC if self.malloc == "tuned" else {})},
        )

    def ask(self, what: str, steps: int) -> list[dict]:
        """Every rank's answer."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps({"what": what, "steps": steps}) + "\n")
            process.stdin.flush()
        return self._answers()

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait()

    def _answers(self) -> list[dict]:
        answers = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                self.close()
                raise SystemExit(
                    f"bench_train: {self.label} ended with exit code {process.returncode}; see its error above"
                )
            answers.append(json.loads(line))
        return answers


def compare(ours: Contender, other: Contender) -> float:
    """Refuse to time what does not compute what we compute on one rank; returns the largest difference of a loss."""
    if "logits" in other.checks:
        a, b = (load_file(c.checks["logits"])["logits"].float() for c in (ours, other))
        difference = (a - b).abs().max().item()
        if difference > LOGIT_TOLERANCE[other.mode]:
            raise SystemExit(f"bench_train: logits of {other.label} differ from ours by {difference:.2e}")
    losses = list(zip(ours.checks["losses"], other.checks["losses"], strict=False))  # a peer makes fewer steps
    for step, (x, y) in enumerate(losses):
        if abs(x - y) > LOSS_TOLERANCE[other.mode]:
            raise SystemExit(f"bench_train: at step {step + 1} the loss of {other.label} is {y:.5f}, ours {x:.5f}")
    return max(abs(x - y) for x, y in losses)


# --- in a contender's own processes -----------------------------------------------------------------------------------


def serve(name: str, mode: str, shape: dict, folder: str, layout: str, rank: int) -> None:
    """Build, report what the parent checks, then time or profile steps until the pipe closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    torch.set_num_threads(1)
    made = Shape(**shape)
    num_ranks, parallel = LAYOUTS[layout]
    if num_ranks > 1:
        store = dist.FileStore(str(Path(folder, f"store-{name}-{layout}")), num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    weights_file = Path(folder, "weights.safetensors")
    step: Callable[[Tensor, Tensor], float]
    if name.startswith(OURS):
        kernels = REFERENCE_KERNELS if name == REFERENCE else {}
        engine = build_ours(made, mode, kernels, layout, num_ranks, "auto" if name == AUTO else "none")
        if num_ranks == 1 and not weights_file.exists():
            save_file({n: t.clone() for n, t in engine.full_state().items()}, weights_file)
        logits = engine.model if num_ranks == 1 else None
        step = lambda tokens, labels: ours_step(engine, made, tokens, labels)  # noqa: E731
    else:
        place = Place(rank, parallel.get("tp", 1), parallel.get("pp", 1))
        peer = PEERS[made.architecture][name.removesuffix(COMPILED)](made, load_file(weights_file), mode, place)
        if name.endswith(COMPILED):
            compile_layers(peer.model)
        logits, step = peer.logits if num_ranks == 1 else None, peer.step
    data = batches(made)
    answer: dict = {}
    if logits is not None:
        answer["logits"] = str(Path(folder, f"{name}-{mode}.safetensors".replace(" ", "-").replace(",", "")))
        with torch.no_grad():
            found = logits(data[0][0][: made.batch]).float().reshape(-1, made.vocab_size).contiguous()
        save_file({"logits": found}, answer["logits"])
    answer["losses"] = [step(*data[i % len(data)]) for i in range(CHECK_STEPS.get(name, 3))]
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        steps = request["steps"]
        answer = timed(step, data, steps) if request["what"] == "time" else profiled(step, data, steps)


def compile_layers(model: nn.Module) -> None:
    """torch.compile every layer of a peer: of the longest list of modules that it has."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in max(lists, key=len):
        layer.compile(dynamic=False)


def build_ours(
    shape: Shape, mode: str, kernels: dict[str, str], layout: str, num_ranks: int, compiled: str = "none"
) -> NativeEngine:
    wiring = (
        {"norm": "layernorm", "positions": "learned", "ffn": "gelu", "bias": True}
        if shape.architecture == "gpt2"
        else {"norm": "rmsnorm", "positions": "rope", "ffn": "swiglu"}
    )
    sizes = {k: v for k, v in asdict(shape).items() if k not in ("architecture", "batch", "microbatches")}
    batch = {"global_batch": shape.batch * shape.microbatches, "micro_batch": shape.batch}
    recipe = build_recipe(
        {
            "model": {"topology": "pre", **sizes, **wiring},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 1, **batch, "compile": compiled},
            "precision": {"compute": mode},
            "kernels": kernels,
            "parallel": LAYOUTS[layout][1],
            "recompute": {"gathered": "keep"} if layout.endswith("-keep") else {},
        }
    )
    context = ParallelContext.create(check_layout(recipe, num_ranks), "cpu")
    return NativeEngine(recipe, context)


def ours_step(engine: NativeEngine, shape: Shape, tokens: Tensor, labels: Tensor) -> float:
    data = engine.context.dp
    mine = torch.arange(data.rank, len(tokens), data.size)
    microbatches = [Batch(tokens[i], labels[i], i) for i in mine.split(shape.batch)]
    return engine.step(StepBatch.of(microbatches, engine.stack), 1e-3).loss


def batches(shape: Shape, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """The same random tokens for every contender."""
    generator = torch.Generator().manual_seed(0)
    samples = shape.batch * shape.microbatches
    rows = torch.randint(shape.vocab_size, (count, samples, shape.seq_len + 1), generator=generator)
    return [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]


def timed(step: Callable, data: list, steps: int) -> dict:
    if dist.is_initialized():
        dist.barrier()
    start, wall = time.process_time(), time.perf_counter()
    for i in range(steps):
        step(*data[i % len(data)])
    return {"cpu_seconds": time.process_time() - start, "wall_seconds": time.perf_counter() - wall}


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
