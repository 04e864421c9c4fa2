"""Times the kernels that run on this machine, and says why the others do not."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.kernels.fp8.formats import ROW, quantize
from megaresnorm.kernels.fp8.product import FORMS, RECIPES
from megaresnorm.kernels.registry import Kernel, backends, choose_kernel

OPS = ("add_norm", "fp8_quantize", "rotary", "attention", "activation", "cross_entropy")
PRODUCT = "fp8_product"  # which is timed for every recipe, in BF16, as where precision.compute is fp8


@dataclass(frozen=True)
class BackendTiming:
    """One backend of an op at one shape.

    Attributes:
        kind: the form of an op of which all forms are timed; None of others.
        shape: rows and columns, as ``benchmark_backends`` takes them.
        chosen: whether ``auto`` takes this backend.
        milliseconds: forward and backward (if it has one), or one product, the best of five calls; None where it cannot
            run or failed.
        reason: why ``auto`` does not take it, or why it cannot run; empty for the chosen one.
    """

    op: str
    kind: str | None
    shape: tuple[int, int]
    backend: str
    chosen: bool
    milliseconds: float | None
    reason: str


def benchmark_backends(
    device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int]], ops: Sequence[str] = (*OPS, PRODUCT)
) -> list[BackendTiming]:
    """Run every backend of some ops a few times.

    Args:
        shapes: pairs of rows and columns. Rows are tokens; columns are the model dim, or the vocabulary for
            cross_entropy. Attention and rotary have heads of 64 columns, attention sequences of at most 256 tokens. A
            product is with a square weight.
    """
    findings = []
    for op in ops:
        for kind in RECIPES if op == PRODUCT else (None,):
            of_op = torch.bfloat16 if op == PRODUCT else dtype
            taken = choose_kernel(op, "auto", device, of_op, kind)[0]
            for shape in shapes:
                findings += [_try(kernel, taken, kind, shape, device, of_op) for kernel in backends(op)]
    return findings


def _try(
    kernel: Kernel, taken: Kernel, kind: str | None, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> BackendTiming:
    found = BackendTiming(kernel.op, kind, shape, kernel.backend, kernel is taken, None, "")
    if (reason := kernel.refusal(device, dtype, kind)) is not None:
        return replace(found, reason=f"cannot run: {reason}")
    try:
        call = _call(kernel, kind, shape, device, dtype)
        call()
        milliseconds = 1e3 * min(_seconds(call, device) for _ in range(5))
    except Exception as e:  # noqa: BLE001  (what a kernel raises is what is asked for)
        return replace(found, reason=f"failed: {(str(e) or type(e).__name__).splitlines()[0][:100]}")
    reason = "" if found.chosen else kernel.avoid(device, dtype) or f"auto takes {taken.backend}"
    return replace(found, milliseconds=milliseconds, reason=reason)


def _call(
    kernel: Kernel, kind: str | None, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    return _CALLS[kernel.op](kernel, *shape, device, dtype) if kind is None else _product(kernel, kind, *shape, device)


def _seconds(call: Callable, device: torch.device) -> float:
    start = _now(device)
    call()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def _add_norm(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    x, delta = (_random((rows, columns), device, dtype) for _ in range(2))
    norm = NormWeights("rmsnorm", _random((columns,), device, torch.float32), None, 1e-5)

    def call() -> None:
        out = kernel.function(AddNormArgs(x, delta, next_norm=norm, residual_dtype=dtype, out_dtype=dtype))
        (out.trunk.sum() + out.branch_input.sum()).backward()

    return call


def _fp8_quantize(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    x = _random((rows, columns), device, dtype).detach()
    return lambda: kernel.function(x, ROW)


def _rotary(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    heads = max(1, columns // 64)
    qkv, table = _random((1, rows, 3 * heads, 64), device, dtype), torch.ones(rows, 64, device=device)
    norm = NormWeights("rmsnorm", _random((64,), device, torch.float32), None, 1e-5)

    def call() -> None:
        heads_of = kernel.function(qkv, heads, cos=table, sin=table, q_norm=norm, k_norm=norm)
        torch.autograd.backward(heads_of, heads_of)

    return call


def _attention(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    seq, heads = min(rows, 256), max(1, columns // 64)
    batch = max(1, rows // seq)
    if kernel.implementation is not None:  # the form that a model uses
        qkv = _random((batch, seq, 3 * heads, 64), device, dtype)
        return lambda: kernel.implementation(qkv, heads)[0].sum().backward()
    q, k, v = (_random((batch, seq, heads, 64), device, dtype) for _ in range(3))
    return lambda: kernel.function(q, k, v)[0].sum().backward()


def _activation(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    h = _random((rows, 2 * columns), device, dtype)
    return lambda: kernel.function(h, None, "swiglu").sum().backward()


def _cross_entropy(kernel: Kernel, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Callable:
    logits, labels = _random((rows, columns), device, dtype), torch.zeros(rows, dtype=torch.long, device=device)
    return lambda: differentiate(kernel.function(logits * 1.0, labels)[1])


def _product(kernel: Kernel, recipe: str, rows: int, columns: int, device: torch.device) -> Callable:
    x = quantize(torch.randn(rows, columns, device=device), FORMS[recipe].rows)
    w = quantize(torch.randn(columns, columns, device=device), FORMS[recipe].weight)
    return lambda: kernel.function(x, w, None, torch.bfloat16, precise=False)


_CALLS = dict(zip(OPS, (_add_norm, _fp8_quantize, _rotary, _attention, _activation, _cross_entropy), strict=True))
