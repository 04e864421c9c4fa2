"""The stages of gpu_campaign.py, each run as a process of its own: ``campaign_stages.py STAGE FILE [--smoke]``.

campaign_report.py says what a stage writes into FILE.
"""

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from campaign_engines import DEEP, DENSE, engine_of, ours, race, tokens
from campaign_kernels import backends_of_packages, bandwidths
from campaign_layers import layers, prepared
from campaign_report import DEVICE, SMOKE, attempt, emit, row, seconds, wait
from torch import Tensor

ROOT = Path(__file__).parents[1]
if SMOKE:  # graphs are made as on a GPU, but code for them takes longer than the whole smoke run
    torch.compile = functools.partial(torch.compile, backend="eager")


# --- machine ----------------------------------------------------------------------------------------------------------


def machine() -> None:
    facts: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if DEVICE.type == "cuda":
        properties = torch.cuda.get_device_properties(DEVICE)
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts |= {
            "device": properties.name, "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count, "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            "driver": subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip(),
        }  # fmt: skip
    else:
        facts["device"] = f"{platform.machine()}, {os.cpu_count()} CPUs"
    for name in (
        "triton",
        "transformers",
        "liger_kernel",
        "transformer_engine_torch",
        "quack",
        "fused_layer_norm_cuda",
    ):
        facts[name] = _version(name)
    row("machine", **facts)
    size = 1 << (20 if SMOKE else 29)  # elements of BF16
    a, b = (torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    row("copy", name=f"copy of {a.nbytes >> 20} MiB", gb_s=round(4 * size / seconds(lambda: b.copy_(a)) / 1e9, 1))
    _products()
    _attention_backends()


def _version(module: str) -> str:
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec(module) is None:
        return "no"
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "yes"


def _products() -> None:
    """The matrix products of the models below: the ceiling of everything."""
    tokens = 64 if SMOKE else 8192
    shapes = [(tokens, 64, 96)] if SMOKE else [
        (tokens, 2048, 6144), (tokens, 2048, 2048), (tokens, 2048, 11264), (tokens, 5632, 2048), (tokens, 2048, 50304),
        (4096, 1024, 3072), (4096, 1024, 1024), (4096, 1024, 5632), (4096, 2816, 1024), (4096, 1024, 32768),
    ]  # fmt: skip
    for t, k, n in shapes:
        with attempt("products", f"{t} x {k} x {n}"):
            cells = _three_products(t, k, n)
            flops = 2e-12 * t * k * n
            row("products", name=f"{t} x {k} x {n}", **{f"{c}, TFLOP/s": round(flops / s, 2) for c, s in cells.items()})


def _three_products(t: int, k: int, n: int) -> dict[str, float]:
    x, w, dy = (torch.randn(size, device=DEVICE).bfloat16() for size in ((t, k), (n, k), (t, n)))
    products: dict[str, Callable[[], Tensor]] = {
        "y = x W^T": lambda: x @ w.t(),
        "dx = dy W": lambda: dy @ w,
        "dW = dy^T x": lambda: dy.t() @ x,
    }
    if DEVICE.type == "cuda":
        products["dW in FP32"] = lambda: torch.mm(dy.t(), x, out_dtype=torch.float32)
    return {name: seconds(product, 0.1) for name, product in products.items()}


def _attention_backends() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, heads, seq, width = (1, 2, 32, 16) if SMOKE else (4, 16, 2048, 128)
    kinds = ["MATH"] if DEVICE.type == "cpu" else ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"]
    q = torch.randn(batch, heads, seq, width, device=DEVICE).bfloat16().requires_grad_()
    for kind in kinds:
        with attempt("attention", kind), sdpa_kernel(getattr(SDPBackend, kind)):

            def both() -> None:
                torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()

            tflops = 7e-12 * batch * heads * seq * seq * width  # two products forward, five backward, half masked
            row("attention", name=kind, tflop_s=round(tflops / seconds(both, 0.1), 2))


# --- tests and kernels ------------------------------------------------------------------------------------------------


def tests() -> None:
    """The gpu tests with workers; beside them one process compiles what later stages use."""
    if DEVICE.type == "cuda":
        process = subprocess.Popen([sys.executable, __file__, "warm", os.devnull])
    workers = ["-n", "8"] if _version("xdist") != "no" else []
    chosen = ["tests/test_graphs.py", "-k", "copied"] if SMOKE else ["tests", "-m", "gpu", *workers]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--no-header", "--tb=line", *chosen]
    passed = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pytest:
        assert pytest.stdout is not None
        for line in pytest.stdout:  # as they come: a stage that is ended has told of those before
            passed += "PASSED" in line
            if "PASSED" in line and passed % 20 == 0:
                emit(note=f"{passed} tests have passed")
            if any(word in line for word in ("FAILED", "ERROR")):
                row("tests that fail", name=line.strip()[:300])
    row("tests", name=" ".join(chosen), rc=pytest.returncode, summary=line.strip())
    if DEVICE.type == "cuda":
        emit(note=f"compile warm-up beside the tests ended with {process.wait()}")


def warm() -> None:
    """Compile the blocks of the models below: equal blocks share code, so two of them are enough."""
    for settings in (DENSE, DEEP):
        with attempt("warm", str(settings["dim"])):
            step = ours({**settings, "num_blocks": 2}, "blocks")
            step(*tokens(settings, 1))
            del step


def kernels() -> None:
    backends_of_packages()
    bandwidths()
    from bench_kernels import load_backends, measure

    load_backends()
    torch.set_num_threads(1)
    rounds, rows_ = (2, 64) if SMOKE else (5, 8192)
    cases = [(1024, "bf16"), (4096, "bf16"), (2048, "bf16"), (8192, "bf16"), (4096, "fp32")]
    cases += [(4096, "fp8-row"), (4096, "fp8-block"), (4096, "fp8-mx"), (4096, "fp8-tensor"), (8192, "fp8-row")]
    for columns, precision in [(32, "fp32"), (32, "fp8-row")] if SMOKE else cases:
        for kind in ("rmsnorm",) if precision.startswith("fp8") else ("rmsnorm", "layernorm"):
            with attempt("kernels", f"{columns} {kind} {precision}"):
                for found in measure(DEVICE, rows_, columns, precision, kind, rounds, 1 << (16 if SMOKE else 28)):
                    row(
                        "kernels", name=f"{columns} {kind} {precision}: {found['name']}",
                        **{"forward GB/s": round(found["forward_gb_s"], 1),
                           "forward / copy": round(found["forward_of_copy"], 3),
                           "backward / copy": round(found["backward_of_copy"], 3),
                           "forward and backward, us": round(1e3 * found["both_ms"], 1)},
                    )  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


def dense() -> None:
    contenders = [
        "ours none",
        "Transformers eager",
        "ours cuda_graphs",
        "plain compiled",
        "ours blocks",
        "Transformers compiled",
    ]
    race("dense", DENSE, contenders, [1, 4])


def deep() -> None:
    race("deep", DEEP, ["ours cuda_graphs", "ours none", "Transformers eager", "ours blocks"], [1])


def profile() -> None:
    """One step of the deep model: what runs on the GPU, how long it has nothing to do, how often the host waits."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    for mode in ("none", "cuda_graphs"):
        with attempt("profile", mode):
            _profile(mode, activities, profiler)


def _profile(mode: str, activities: list, profiler: Any) -> None:
    step, data = ours(DEEP, engine_of(DEEP, mode)), tokens(DEEP, 1)
    for _ in range(5):
        step(*data)
    wait()
    with profiler(activities=activities) as trace:
        start = time.perf_counter()
        step(*data)
        wait()
        wall = time.perf_counter() - start
    _report_profile(mode, trace.key_averages(), wall)


def kernels_of(events: Any) -> tuple[list, Callable[[Any], float]]:
    """Of a profile what ran on the GPU, and its microseconds; where nothing did, the operators on the CPU.

    Operators of the CPU have the time of the kernels that they have launched: counted together each would count twice.
    """
    on_gpu = [e for e in events if str(e.device_type).endswith("CUDA") and not getattr(e, "is_user_annotation", False)]
    if on_gpu:
        return on_gpu, lambda event: event.self_device_time_total
    return list(events), lambda event: event.self_cpu_time_total


def _report_profile(mode: str, events: Any, wall: float) -> None:
    kernels, spent = kernels_of(events)

    def count(*names: str) -> int:
        return sum(event.count for event in events if event.key in names)

    busy = sum(map(spent, kernels)) / 1e6 if DEVICE.type == "cuda" else 0.0
    cells = {
        "step, ms": round(1e3 * wall, 2),
        "idle share": round(max(0.0, 1 - busy / wall), 3),
        "launches": count("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx"),
        "graphs": count("cudaGraphLaunch"),
        "waits": count("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
    }
    row("profile", name=f"ours {mode}", **cells)
    for event in sorted(kernels, key=spent, reverse=True)[:12]:
        ms = round(spent(event) / 1e3, 3)
        row(f"kernels of a step, ours {mode}", name=event.key[:100], ms=ms, calls=event.count)


def trainer() -> None:
    """A run of ``python -m megaresnorm.job`` on text of this repository: data, loop, checkpoint, resume."""
    with prepared() as folder:
        steps, size = (4, "model.dim=32 model.num_blocks=2 model.num_heads=2 model.seq_len=32") if SMOKE else (
            60, "model.dim=512 model.num_blocks=24 model.num_heads=8 model.seq_len=512")  # fmt: skip
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(RECIPE.format(folder=folder, steps=steps))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        mode = "none" if DEVICE.type == "cpu" else "cuda_graphs"
        for what, end in (("half of a run", steps // 2), ("resumed", steps)):
            command = [sys.executable, "-m", "megaresnorm.job", str(recipe), *size.split(), f"train.compile={mode}"]
            command += [f"train.device={DEVICE.type}", f"train.steps={end}", "schedule.kind=constant"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            lines = done.stdout.splitlines() + done.stderr.splitlines()
            shown = [line for line in lines if line.lstrip().startswith("step")] or lines or [""]
            row(
                "trainer",
                name=what,
                rc=done.returncode,
                seconds=round(time.perf_counter() - start, 1),
                last=shown[-1][:200],
            )


RECIPE = """
model: {{topology: deepnorm, dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}}
data: {{path: {folder}/bytes}}
train: {{output: {folder}/run, steps: {steps}, global_batch: 8, micro_batch: 4, loggers: [], sample_tokens: 0}}
precision: {{compute: bf16}}
"""


# --- for the tests of the campaign itself -----------------------------------------------------------------------------


def fails() -> None:
    row("fails", name="before the error")
    raise RuntimeError("this stage is made to fail")


def hangs() -> None:
    row("hangs", name="before it hangs")
    time.sleep(3600)


STAGES = {f.__name__: f for f in (machine, tests, warm, kernels, dense, deep, profile, layers, trainer, fails, hangs)}

if __name__ == "__main__":
    STAGES[sys.argv[1]]()
