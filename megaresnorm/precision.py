"""Number formats: which types a recipe means, and BF16 products on FP32 weights that are cast once a step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.parallel.tensor import ColumnLinear, RowLinear

Linear = ColumnLinear | RowLinear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def weight_dtype(compute: str) -> torch.dtype:
    """Type of weights, gradients and optimizer state: FP32, unless all is FP64."""
    return torch.float64 if compute == "fp64" else torch.float32


class Bf16Weights:
    """BF16 copies of the weights of every linear layer, and the matmul that reads them.

    The model's parameters stay FP32: a microbatch's gradient is a BF16 product, and from there on it is accumulated over
    microbatches, clipped and applied in FP32; a checkpoint holds the FP32 weights. ``refresh`` renews all copies in one
    call after the weights have changed; autocast would cast every weight in every microbatch.
    keep_copies: False where FSDP2 gathers weights for the time of their use: they are cast when they are there, forward and
    backward, since copies of all would undo the sharding.
    """

    def __init__(self, model: nn.Module, *, keep_copies: bool = True) -> None:
        linears = [module for module in model.modules() if isinstance(module, Linear)]
        self._linears = linears if keep_copies else []
        self._copies: dict[nn.Module, Tensor] = {}
        for linear in linears:
            linear.matmul = self._matmul_of(linear) if keep_copies else _cast_matmul

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights; tied ones share a copy."""
        if not self._copies:
            by_weight: dict[nn.Parameter, Tensor] = {}
            for linear in self._linears:
                if linear.weight not in by_weight:
                    by_weight[linear.weight] = torch.empty_like(linear.weight, dtype=torch.bfloat16)
                self._copies[linear] = by_weight[linear.weight]
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [linear.weight for linear in self._linears])

    def _matmul_of(self, linear: Linear) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        return lambda x, weight, bias: _Bf16Linear.apply(x, weight, bias, self._copies[linear])


class _Bf16Linear(torch.autograd.Function):
    """x W^T + b from the BF16 copy of W; the gradients of W and b arrive in FP32.

    x: [T, in] bf16.   weight: [out, in] fp32, only receives the gradient.   copy: [out, in] bf16, or the weight itself.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        ctx.has_bias = bias is not None
        return F.linear(x, copy.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        (dy,) = grads
        x, copy = ctx.saved_tensors
        db = dy.sum(0, dtype=torch.float32) if ctx.has_bias else None
        return dy @ copy.to(dy.dtype), (dy.t() @ x).float(), db, None


def _cast_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _Bf16Linear.apply(x, weight, bias, weight)
