"""Rows of the stage ``kernels`` of campaign_stages.py: times of every backend, and kernels as a share of a copy."""

import functools
from collections.abc import Callable

import torch
from campaign_report import DEVICE, SMOKE, attempt, row, seconds


def backends_of_packages() -> None:
    """Every backend of the ops that other packages have too, best of five calls; those that cannot run with why."""
    from megaresnorm.kernels import load_backends
    from megaresnorm.kernels.benchmark import benchmark_backends

    load_backends()
    columns = {"add_norm": 4096, "fp8_quantize": 4096, "activation": 5632, "cross_entropy": 50304, "rotary": 4096}
    for op, width in columns.items():
        shape = (64, 32) if SMOKE else (8192, width)
        for found in benchmark_backends(DEVICE, torch.bfloat16, [shape], [op]):
            time = None if found.milliseconds is None else round(found.milliseconds, 3)
            failed = {"failed": found.reason} if found.reason.startswith("failed") else {}
            row("backends", name=f"{op} {shape[0]} x {shape[1]}: {found.backend}", ms=time, why=found.reason, **failed)


def bandwidths() -> None:
    """Rotary, activation and loss as a share of a copy: bytes as docs/kernels.md counts them, forward and both ways."""
    from megaresnorm.kernels import load_backends
    from megaresnorm.kernels.cross_entropy import one_for
    from megaresnorm.kernels.registry import choose_kernel

    load_backends()
    tokens, heads, width, ffn, vocabulary = (64, 2, 16, 64, 256) if SMOKE else (8192, 32, 128, 8192, 50_304)
    dtype = torch.bfloat16
    big = torch.empty(1 << (16 if SMOKE else 29), dtype=torch.uint8, device=DEVICE)
    copy = 2 * big.numel() / seconds(lambda: big.clone(), 0.2)
    chosen = {op: choose_kernel(op, "auto", DEVICE, dtype)[0] for op in ("rotary", "activation", "cross_entropy")}
    rotary, activate, loss = (kernel.function for kernel in chosen.values())
    draw = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()  # noqa: E731
    qkv, h, logits = draw(1, tokens, 3 * heads, width), draw(tokens, 2 * ffn), draw(tokens, vocabulary)
    table, labels = torch.ones(tokens, width, device=DEVICE), torch.zeros(tokens, dtype=torch.long, device=DEVICE)
    d_qkv, dy = [draw(1, tokens, heads, width).detach() for _ in range(3)], draw(tokens, ffn).detach()

    def of_loss() -> None:
        objective = loss(logits, labels)[1]
        torch.autograd.grad(objective, logits, one_for(objective))

    calls = {
        "rotary forward": (lambda: rotary(qkv.detach(), heads, cos=table, sin=table), 4 * qkv.numel()),
        "rotary both": (
            lambda: torch.autograd.grad(rotary(qkv, heads, cos=table, sin=table), qkv, d_qkv), 8 * qkv.numel()
        ),
        "swiglu forward": (lambda: activate(h.detach(), None, "swiglu"), 6 * dy.numel()),
        "swiglu both": (lambda: torch.autograd.grad(activate(h, None, "swiglu"), h, dy), 16 * dy.numel()),
        "loss both": (of_loss, 6 * logits.numel()),
    }  # fmt: skip
    for name, (call, size) in calls.items():
        with attempt("bandwidth", name):
            op = {"swiglu": "activation", "loss": "cross_entropy"}.get(name.split()[0], "rotary")
            _bandwidth(f"{name}, {chosen[op].backend}", call, size, copy)
    _quantizing(copy)


def _bandwidth(name: str, call: Callable[[], object], size: int, copy: float) -> None:
    rate = size / seconds(call, 0.1)
    row("bandwidth", name=name, **{"GB/s": round(1e-9 * rate, 1), "of copy": round(rate / copy, 3)})


def _quantizing(copy: float) -> None:
    """Kernels that write FP8, as a share of a copy: 3 bytes an element, 2 of codes, and what a second pass reads."""
    from megaresnorm.kernels.add_norm.spec import FORMS
    from megaresnorm.kernels.fp8.formats import E4M3, quantize
    from megaresnorm.kernels.registry import choose_kernel

    backend = choose_kernel("fp8_quantize", "auto", DEVICE, torch.bfloat16)[0]
    kernels = backend.implementation
    for columns in (64,) if SMOKE else (4096, 22016):
        x = torch.randn(64 if SMOKE else 8192, columns, device=DEVICE).bfloat16()
        amax, factor = torch.full((1, 1), 4.0, device=DEVICE), torch.ones(columns, device=DEVICE)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            name: (functools.partial(kernels.rows, x, FORMS[name]), 3) for name in ("row", "block", "mx")
        }
        calls["row, folded"] = functools.partial(kernels.rows, x, FORMS["row"], factor=factor), 3
        calls["tensor, delayed"] = functools.partial(kernels.delayed, x, E4M3, amax), 3
        calls["tensor"] = functools.partial(kernels.rows, x, FORMS["tensor"]), 5
        for name, again in (("row", 2), ("block", 0), ("mx", 0)):
            codes = quantize(x, FORMS[name])
            calls[f"{name} transposed"] = functools.partial(kernels.transposed, x, FORMS[name]), 3 + again
            of_codes = functools.partial(kernels.transposed, codes, FORMS[name])
            calls[f"{name} transposed of codes"] = of_codes, 2 + again // 2
        for name, (call, size) in calls.items():
            with attempt("bandwidth", name):
                _bandwidth(f"FP8 {name}, {columns} columns, {backend.backend}", call, size * x.numel(), copy)
