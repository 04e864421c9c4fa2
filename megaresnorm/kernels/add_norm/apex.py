"""Norms of NVIDIA Apex."""

import torch
from apex.normalization.fused_layer_norm import (
    fused_rms_norm_affine,
    mixed_dtype_fused_layer_norm_affine,
    mixed_dtype_fused_rms_norm_affine,
)
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import NormWeights


def normalize(x_TD: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
    """``reference.normalize``, in ``out_dtype``.

    Weights are in FP32 also where x is BF16; Apex's mixed variants return the weight's type.
    """
    shape = x_TD.shape[-1:]
    if norm.kind == "rmsnorm":
        apply = fused_rms_norm_affine if x_TD.dtype == norm.weight.dtype else mixed_dtype_fused_rms_norm_affine
        return apply(x_TD, norm.weight, shape, norm.eps).to(out_dtype)
    bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    return mixed_dtype_fused_layer_norm_affine(x_TD, norm.weight, bias, shape, norm.eps).to(out_dtype)
