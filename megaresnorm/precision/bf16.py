"""BF16 products on FP32 weights."""

import torch
from torch import Tensor, nn

from megaresnorm.parallel.linear import Linear, PlainLinear


class Bf16Linear(PlainLinear):
    """The products of one linear layer in BF16, by a copy of its weight where there is one.

    The model's parameters stay FP32. A microbatch's gradient is a BF16 product; from there on it is accumulated over
    microbatches, clipped and applied in FP32. A checkpoint holds the FP32 weights.

    Attributes:
        copy: of the weight, which ``Bf16Copies`` renews; None: the weight is cast for each product.
    """

    copy: Tensor | None = None

    def operand(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy, or the weight cast."""
        return weight.to(dtype) if self.copy is None else self.copy


class Bf16Copies:
    """BF16 copies of the weights of every linear layer, made anew in one call after the weights have changed.

    Autocast would cast every weight in every microbatch. Not for weights that FSDP2 gathers for the time of their use:
    copies of all would undo the sharding.

    Args:
        model: with memory; its linear layers have a ``Bf16Linear`` each.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[nn.Parameter, Tensor] = {}
        for module in model.modules():
            if isinstance(module, Linear):
                assert isinstance(module.kernel, Bf16Linear)
                if module.weight not in self._copies:  # tied ones share a copy
                    self._copies[module.weight] = torch.empty_like(module.weight, dtype=torch.bfloat16)
                module.kernel.copy = self._copies[module.weight]
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
