"""Linear layers whose weights are sharded over a tensor-parallel axis; on one rank they are the plain ones.

T tokens   D model dim   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.parallel.branch_input import BranchInput, Gathered
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.mesh import Axis

MatMul = Callable[[BranchInput, Tensor, Tensor | None], Tensor]


def linear(x: BranchInput, weight: Tensor, bias: Tensor | None, operand: Tensor | None = None) -> Tensor:
    """x W^T + b. Gradients of weight and bias arrive in their own types.

    Args:
        x: whole rows [T, in_dim]. If they are ``Gathered``, their gradient travels as the weight's is computed.
        operand: a copy of the weight in the type of x. Without one, a weight of another type is cast for each product.

    Communication:
        Nothing in forward; in backward, for a ``Gathered`` x, one reduce-scatter or all-reduce of [T, in_dim].
    """
    if isinstance(x, Gathered):
        return _Linear.apply(x.mine, x, weight, bias, operand)
    return F.linear(x, weight, bias) if x.dtype == weight.dtype else _Linear.apply(x, None, weight, bias, operand)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, mine: Tensor, gathered: Gathered | None, weight: Tensor, bias: Tensor | None, operand: Tensor | None
    ) -> Tensor:
        x = mine if gathered is None else gathered.whole
        operand = weight if operand is None else operand
        ctx.save_for_backward(x, operand)
        ctx.start = None if gathered is None else (gathered.collective, gathered.axis)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return F.linear(x, operand.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
        (dy,) = grads
        x, operand = ctx.saved_tensors
        dx = dy @ operand.to(dy.dtype)
        if ctx.start is not None:
            collective, axis = ctx.start
            arriving = collective.start_transpose(dx, axis)
        d_weight = (dy.t() @ x).to(ctx.weight_dtype)
        d_bias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
        return dx if ctx.start is None else arriving(), None, d_weight, d_bias, None


class ColumnLinear(nn.Module):
    """y = x W^T + b with weight [out_dim / p, in_dim]: every rank computes its share of the outputs.

    The parameters are left uninitialised (see model/init.py).

    Attributes:
        matmul: ``linear``. precision/bf16.py replaces it where products are computed in another type.
    """

    matmul: MatMul

    def __init__(self, in_dim: int, out_dim: int, axis: Axis, *, bias: bool = False) -> None:
        super().__init__()
        assert out_dim % axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim // axis.size, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim // axis.size)) if bias else None
        self.matmul = linear

    def forward(self, x: BranchInput) -> Tensor:
        """This rank's outputs [T, out_dim / p] for whole rows x, which every rank has.

        Communication:
            Nothing in forward; in backward the partial sums of x's gradient are reduced if x is ``Gathered``, as in
            ``linear``.
        """
        return self.matmul(x, self.weight, self.bias)

    def without_bias(self, x: BranchInput) -> Tensor:
        """x W^T, for a kernel that adds the bias itself.

        Communication:
            As ``forward``.
        """
        return self.matmul(x, self.weight, None)


class RowLinear(nn.Module):
    """y = x W^T + b with weight [out_dim, in_dim / p]: every rank computes a partial sum, which ``layout`` adds up.

    Attributes:
        bias: in the stream's layout, [out_dim] or this rank's columns of it.
        matmul: as in ``ColumnLinear``.
    """

    matmul: MatMul

    def __init__(self, in_dim: int, out_dim: int, layout: TensorLayout, *, bias: bool = False) -> None:
        super().__init__()
        assert in_dim % layout.axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim // layout.axis.size))
        self.bias = nn.Parameter(torch.empty(layout.width(out_dim))) if bias else None
        self.matmul, self.layout = linear, layout

    def forward(self, x: Tensor) -> Tensor:
        """y in the stream's layout.

        Args:
            x: [T, in_dim / p], this rank's columns.

        Communication:
            One ``layout.reduce`` of [T, out_dim].
        """
        if self.layout.axis.size == 1:
            return self.matmul(x, self.weight, self.bias)
        y = self.layout.reduce(self.matmul(x, self.weight, None))
        return y if self.bias is None else (y.to(self.bias.dtype) + self.bias).to(y.dtype)
