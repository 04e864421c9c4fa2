"""Speed and memory of training steps: tokens, floating-point operations, the share of a GPU's peak, peak memory."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megaresnorm.model.cost import training_flops
from megaresnorm.recipe import Recipe

# Dense products in BF16, and FP16 alike, of one GPU in TFLOP/s, from NVIDIA's data sheets, by words of its name; the
# first that fit.
PEAK_HALF = {
    "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.4, "H200 NVL": 835.0, "H200": 989.4, "GH200": 989.4,
    "GB200": 2500.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A10": 125.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
LONGEST_PRODUCT = 0.1  # seconds, of matrices that are multiplied to find a peak
_OTHERS = re.compile(r"\b(MIG|Laptop|RTX 4090 D)\b")  # a share of such a GPU, or another one


def peak_tflops(device: torch.device, compute: str) -> float | None:
    """Peak of one GPU in TFLOP/s for products in BF16 or FP16; None where it is not known.

    Args:
        compute: type of the products, as precision.compute.
    """
    if device.type != "cuda" or compute not in ("bf16", "fp16"):
        return None
    name = torch.cuda.get_device_name(device)
    if _OTHERS.search(name):
        return None
    return next((peak for words, peak in PEAK_HALF.items() if re.search(rf"\b{words}\b", name)), None)


def peak_of(device: torch.device, compute: str) -> tuple[float, str]:
    """A peak in TFLOP/s for products as ``compute`` has them, and what it is.

    It is that of the GPU's data sheet for 16 bits, which FP8 is held against as well; where there is none, products of
    large matrices are timed.

    Args:
        compute: type of the products, as precision.compute.
    """
    known = peak_tflops(device, "bf16" if compute == "fp8" else compute)
    if known is not None:
        return known, "peak: of the GPU's data sheet, for dense products in BF16"
    if device.type == "cuda":
        return product_tflops(device, compute, 4096), "peak: the fastest of some products of 4,096 x 4,096 matrices"
    # Products of 16 bits are slow on many CPUs, where ours then are of FP32.
    fastest = max(product_tflops(device, each, 1024) for each in dict.fromkeys((compute, "fp32")))
    return fastest, "peak: the fastest of some products of 1,024 x 1,024 matrices on this machine"


def product_tflops(device: torch.device, compute: str, size: int) -> float:
    """The fastest of a few products of two square matrices on this device, in TFLOP/s. It takes about a second at most.

    Args:
        compute: type of the products, as precision.compute; FP8 is measured as BF16.
        size: their rows and columns.
    """
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16}.get(compute, torch.bfloat16)
    a = torch.ones(size, size, dtype=dtype, device=device)
    small = a[: size // 4, : size // 4].contiguous()
    if 64 * _seconds_of(lambda: small @ small, device) > LONGEST_PRODUCT:  # of the large ones
        a, size = small, size // 4
    seconds = [_seconds_of(lambda: a @ a, device) for _ in range(8)]
    return 2 * size**3 / min(seconds) / 1e12


def _seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """What a piece of work takes: on a GPU by its own events, without the host's time to begin it."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    work()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has had so far: of tensors on a GPU, or of host memory; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


@dataclass
class Meter:
    """Speed of each step, and the mean since the last line of the log. Evaluations and checkpoints do not count.

    Attributes:
        flops: floating-point operations of a token, forward and backward (model/cost.py).
        num_ranks: over which they are shared.
        peak: of one rank, in TFLOP/s; None where unknown.
    """

    flops: int
    num_ranks: int
    device: torch.device
    peak: float | None = None
    _labels: int = field(default=0, init=False)
    _tokens: int = field(default=0, init=False)
    _seconds: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _peak_bytes: int | None = field(default=None, init=False)
    _look_again: float = field(default=0.0, init=False)

    @classmethod
    def of(cls, recipe: Recipe, num_ranks: int, device: torch.device) -> "Meter":
        """The meter of a run on so many ranks."""
        return cls(training_flops(recipe.model), num_ranks, device, peak_tflops(device, recipe.precision.compute))

    def step(self, labels: int, tokens: int, seconds: float) -> dict[str, float | None]:
        """Figures of one step.

        Args:
            labels: tokens of the global batch that have a loss.
            tokens: all of its tokens.
        """
        self._labels += labels
        self._tokens += tokens
        self._seconds += seconds
        self._steps += 1
        if self._peak_bytes is None or time.monotonic() > self._look_again:  # it takes a tenth of a millisecond
            self._peak_bytes, self._look_again = peak_memory(self.device), time.monotonic() + 1.0
        return self._figures(labels, tokens, seconds, 1) | {"peak_memory": self._peak_bytes}

    def mean(self) -> dict[str, float | None]:
        """Means over the steps since the last call."""
        found = self._figures(self._labels, self._tokens, self._seconds, max(1, self._steps))
        self._labels = self._tokens = self._steps = 0
        self._seconds = 0.0
        return found

    def _figures(self, labels: int, tokens: int, seconds: float, steps: int) -> dict[str, float | None]:
        seconds = max(seconds, 1e-9)
        tflops = self.flops * tokens / seconds / self.num_ranks / 1e12
        found: dict[str, float | None] = {
            "tokens_per_second": labels / seconds,
            "seconds": seconds / steps,
            "tflops": tflops,
        }
        return found if self.peak is None else found | {"mfu": tflops / self.peak}
