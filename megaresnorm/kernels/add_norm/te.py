"""Norms of NVIDIA Transformer Engine, through its public modules."""

import functools

import torch
import transformer_engine.pytorch as te
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import NormWeights


def normalize(x_TD: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
    """``reference.normalize``, in ``out_dtype``; weights and statistics are in FP32."""
    weights = {"weight": norm.weight} if norm.bias is None else {"weight": norm.weight, "bias": norm.bias}
    if norm.kind == "layernorm" and norm.bias is None:
        weights["bias"] = torch.zeros_like(norm.weight)
    module = _module(norm.kind, x_TD.shape[-1], norm.eps, x_TD.device)
    return torch.func.functional_call(module, weights, (x_TD,)).to(out_dtype)


@functools.lru_cache(maxsize=8)
def _module(kind: str, width: int, eps: float, device: torch.device) -> torch.nn.Module:
    made = te.LayerNorm if kind == "layernorm" else te.RMSNorm
    return made(width, eps=eps, device=device, dtype=torch.float32)
