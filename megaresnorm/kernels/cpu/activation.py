"""GELU and SwiGLU by the C kernel: hands it the tensors' addresses."""

import ctypes

import torch
from torch import Tensor

from megaresnorm.kernels.activation import ActivationBackend, register_activation
from megaresnorm.kernels.cpu import build

ROWS_PER_BLOCK = 256  # bias gradients are summed within a block of rows, then over the blocks


class _Activation(ctypes.Structure):
    """The structure of activation.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("h", "bias", "y", "dy", "dh", "partial")),
        *((name, ctypes.c_long) for name in ("rows", "rows_per_block", "width", "type", "swiglu")),
    ]


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


def _forward(h: Tensor, bias: Tensor | None, kind: str, y: Tensor) -> None:
    _run("activation_forward", h, bias, kind, y, None, None, None, h.shape[0])


def _backward(dy: Tensor, h: Tensor, bias: Tensor | None, kind: str, dh: Tensor) -> Tensor | None:
    blocks = -(-h.shape[0] // ROWS_PER_BLOCK)
    partial = None if bias is None else h.new_empty((blocks, h.shape[1]), dtype=torch.float32)
    _run("activation_backward", h, bias, kind, None, dy, dh, partial, blocks)
    if partial is None:
        return None
    return partial.view(-1) if blocks == 1 else partial.sum(0)


register_activation("cpu", ActivationBackend(_forward, _backward, ("gelu", "swiglu")), requires=build.requires)
