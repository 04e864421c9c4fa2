"""GELU and SwiGLU by the C kernel: hands it the tensors' addresses."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.custom_op import FLOATS, CustomOp
from megaresnorm.kernels.registry import register_kernel

ROWS_PER_BLOCK = 256  # bias gradients are summed within a block of rows, then over the blocks


class _Activation(ctypes.Structure):
    """The structure of activation.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("h", "bias", "y", "dy", "dh", "partial")),
        *((name, ctypes.c_long) for name in ("rows", "rows_per_block", "width", "type", "swiglu")),
    ]


class _Kind(NamedTuple):
    kind: str

    def values(self) -> tuple:
        return (self.kind,)


def cpu_activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``kernels.activation.activation`` for FP32 and BF16 and the kinds gelu and swiglu; bias in FP32, contiguous."""
    return _activation(h_TF, bias, _Kind(kind))


def _run(
    function: str, h: Tensor, bias: Tensor | None, kind: str, y: Tensor | None, dy: Tensor | None, dh: Tensor | None,
    partial: Tensor | None, count: int,
) -> None:  # fmt: skip
    rows, columns = h.shape
    at, swiglu = build.address, kind == "swiglu"
    argument = _Activation(
        at(h), at(bias), at(y), at(dy), at(dh), at(partial),
        rows, ROWS_PER_BLOCK, columns // 2 if swiglu else columns, build.type_of(h), swiglu,
    )  # fmt: skip
    build.call(getattr(build.load(), function), argument, count, rows * columns)


def _forward(h: Tensor, bias: Tensor | None, constants: _Kind) -> Tensor:
    if h.dtype not in FLOATS:
        raise TypeError(f"activation/cpu: h is {h.dtype}, wanted float32 or bfloat16; take the reference")
    if constants.kind not in ("gelu", "swiglu") or (constants.kind == "swiglu" and h.shape[1] % 2):
        raise ValueError(
            f"activation/cpu: {constants.kind!r} of {h.shape[1]} columns; wanted gelu, or swiglu of an even number"
        )
    build.check_fp32("activation/cpu: bias", bias, (h.shape[1],))
    h = h.contiguous()
    y = _fake(h, bias, constants)
    _run("activation_forward", h, bias, constants.kind, y, None, None, None, h.shape[0])
    return y


def _fake(h: Tensor, bias: Tensor | None, constants: _Kind) -> Tensor:
    return (
        h.new_empty((h.shape[0], h.shape[1] // 2))
        if constants.kind == "swiglu"
        else torch.empty_like(h, memory_format=torch.contiguous_format)
    )


def _save(ctx: Any, arguments: tuple, results: Tensor) -> None:
    *tensors, ctx.constants = arguments
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple:
    dh, *d_bias = _activation_backward(dy, *ctx.saved_tensors, ctx.constants)
    return dh, d_bias[0] if d_bias else None


def _backward(dy: Tensor, h: Tensor, bias: Tensor | None, constants: _Kind) -> tuple[Tensor, ...]:
    h, dy = h.contiguous(), dy.to(h.dtype).contiguous()
    blocks, dh = -(-h.shape[0] // ROWS_PER_BLOCK), torch.empty_like(h)
    partial = None if bias is None else h.new_empty((blocks, h.shape[1]), dtype=torch.float32)
    _run("activation_backward", h, bias, constants.kind, None, dy, dh, partial, blocks)
    if partial is None:
        return (dh,)
    return dh, partial.view(-1) if blocks == 1 else partial.sum(0)


def _fake_backward(dy: Tensor, h: Tensor, bias: Tensor | None, constants: _Kind) -> tuple[Tensor, ...]:
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    return (dh,) if bias is None else (dh, torch.empty_like(bias))


_activation = CustomOp(
    "activation(Tensor h, Tensor? bias, str kind) -> Tensor", 2, _Kind, _forward, _fake, _save, _differentiate
)
_activation_backward = CustomOp(
    "activation_backward(Tensor dy, Tensor h, Tensor? bias, str kind) -> Tensor[]", 3, _Kind, _backward, _fake_backward
)


register_kernel("activation", "cpu", requires=build.requires, kinds=("gelu", "swiglu"))(cpu_activation)
