"""LayerNorm and RMSNorm as holders of weights; the arithmetic is the add_norm kernel's."""

import torch
from torch import nn

from megaresnorm.kernels.reference import NormWeights


class Norm(nn.Module):
    """Weights of a norm over the last dim, of width ``dim``."""

    def __init__(self, kind: str, dim: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias and kind == "layernorm" else None

    def weights(self, scale: float = 1.0) -> NormWeights:
        """Plain values for the kernel. ``scale`` multiplies the output and is folded into weight and bias."""
        if scale == 1.0:
            return NormWeights(self.kind, self.weight, self.bias, self.eps)
        bias = None if self.bias is None else self.bias * scale
        return NormWeights(self.kind, self.weight * scale, bias, self.eps)
