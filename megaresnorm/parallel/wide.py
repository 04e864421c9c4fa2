"""Weights stored in BF16 whose gradients are FP32: nothing on the way from its product to the update rounds one.

Autograd would give a gradient the type of its weight. torch's ``Tensor.grad_dtype`` lets a weight have one of another
type; the functions here are what computes it.

T rows that are looked up   V rows of the table   D columns
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gradient_dtype(stored: torch.dtype) -> torch.dtype:
    """The type of a weight's gradient: FP32, or FP64 for a weight in FP64.

    >>> gradient_dtype(torch.bfloat16), gradient_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(stored, torch.float32)


def with_wide_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """The same parameter, whose ``grad`` is from now on of ``gradient_dtype``."""
    dtype = gradient_dtype(parameter.dtype)
    if dtype != parameter.dtype:
        parameter.grad_dtype = dtype
    return parameter


def no_gradient(tensor: Tensor) -> Tensor:
    """The gradient of a parameter that no loss depends on: zeros like it, of ``gradient_dtype``."""
    return torch.zeros_like(tensor, dtype=gradient_dtype(tensor.dtype), requires_grad=False)


def look_up(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of a table by number, as F.embedding; those of a table in BF16 are widened to FP32, and so is its gradient.

    F.embedding itself would add the gradients of a row that is looked up often in BF16.
    """
    if gradient_dtype(table_VD.dtype) == table_VD.dtype:
        return F.embedding(ids_T, table_VD)
    return _LookUp.apply(ids_T, table_VD)


def widened(weight: Tensor) -> Tensor:
    """A weight in the type of its gradient; FP32 and FP64 as they are."""
    return weight if gradient_dtype(weight.dtype) == weight.dtype else _Widened.apply(weight)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_T: Tensor, table_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_T)
        ctx.num_rows = table_VD.shape[0]
        return F.embedding(ids_T, table_VD).to(gradient_dtype(table_VD.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (ids_T,) = ctx.saved_tensors
        return None, torch.ops.aten.embedding_dense_backward(grads[0], ids_T, ctx.num_rows, -1, False)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.to(gradient_dtype(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor]:
        return (grads[0],)
