"""BF16 products on FP32 weights that are cast once a step."""

import torch
from torch import Tensor, nn

from megaresnorm.parallel.linear import ColumnLinear, MatMul, RowLinear, linear

Linear = ColumnLinear | RowLinear


class Bf16Weights:
    """BF16 copies of the weights of every linear layer, and the matmul that reads them.

    The model's parameters stay FP32. A microbatch's gradient is a BF16 product; from there on it is accumulated over
    microbatches, clipped and applied in FP32. A checkpoint holds the FP32 weights. ``refresh`` renews all copies in one
    call after the weights have changed; autocast would cast every weight in every microbatch.

    Not for weights that FSDP2 gathers for the time of their use: copies of all would undo the sharding. A linear
    without a copy casts its weight for each product.

    Args:
        model: its linear layers get another ``matmul``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._linears = [module for module in model.modules() if isinstance(module, Linear)]
        self._copies: dict[nn.Module, Tensor] = {}
        for module in self._linears:
            module.matmul = self._matmul_of(module)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights; tied ones share a copy."""
        if not self._copies:
            by_weight: dict[nn.Parameter, Tensor] = {}
            for module in self._linears:
                if module.weight not in by_weight:
                    by_weight[module.weight] = torch.empty_like(module.weight, dtype=torch.bfloat16)
                self._copies[module] = by_weight[module.weight]
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), [module.weight for module in self._linears])

    def _matmul_of(self, module: Linear) -> MatMul:
        return lambda x, weight, bias: linear(x, weight, bias, self._copies[module])
