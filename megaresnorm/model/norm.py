"""LayerNorm and RMSNorm as holders of weights; the arithmetic is the add_norm kernel's."""

import functools
from collections.abc import Callable

import torch
from torch import nn

from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.recipe import ModelRecipe


class Norm(nn.Module):
    """Weights of a norm over the last dim.

    Args:
        kind: layernorm or rmsnorm.
        bias: whether LayerNorm has a bias; RMSNorm never has one.
        zero_centered: whether it multiplies by 1 + weight.
    """

    def __init__(self, kind: str, dim: int, *, eps: float, bias: bool, zero_centered: bool = False) -> None:
        super().__init__()
        self.kind, self.eps, self.zero_centered = kind, eps, zero_centered
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias and kind == "layernorm" else None

    def weights(self, scale: float = 1.0) -> NormWeights:
        """Plain values for the kernel.

        Args:
            scale: factor on the norm's output, which is folded into weight and bias.
        """
        weight = self.weight + 1.0 if self.zero_centered else self.weight
        if scale == 1.0:
            return NormWeights(self.kind, weight, self.bias, self.eps)
        bias = None if self.bias is None else self.bias * scale
        return NormWeights(self.kind, weight * scale, bias, self.eps)


def norm_of(recipe: ModelRecipe) -> Callable[[int], Norm]:
    """The constructor of a model's norms, from their width."""
    centered = recipe.norm_zero_centered
    return functools.partial(Norm, recipe.norm, eps=recipe.norm_eps, bias=recipe.norm_bias, zero_centered=centered)
