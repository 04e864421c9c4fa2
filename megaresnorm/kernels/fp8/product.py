"""Products of FP8 tensors, and the specification of them: an emulation that runs everywhere.

M rows   N outputs   K summed
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.fp8.formats import Fp8, dequantize
from megaresnorm.kernels.registry import register_kernel

RECIPES = ("tensorwise", "rowwise", "block", "mxfp8")  # the kinds of the op, as precision.fp8.recipe


class ProductKernel(Protocol):
    """A backend of ``fp8_product``; it computes what ``emulated`` does."""

    def __call__(self, a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
        """See ``emulated``."""


@register_kernel("fp8_product", "emulated", kinds=RECIPES)
def emulated(a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
    """a b^T + bias.

    Scales are powers of two, so what is multiplied is exact in BF16 and in FP32, as are the products of two elements in
    FP32, where they are summed.

    Args:
        a: [M, K].
        b: [N, K].
        bias: [N] or None.
        dtype: of the result, BF16 or FP32.
        precise: whether sums of more than some hundred products are to be kept in FP32; a device may have faster ones,
            which are enough for a forward pass.

    Returns:
        [M, N], rounded once.
    """
    wide = torch.bfloat16 if dtype == torch.bfloat16 and _has_bf16_products(a.codes.device) else torch.float32
    bias = None if bias is None else bias.to(dtype).to(wide)
    return F.linear(dequantize(a, wide), dequantize(b, wide), bias).to(dtype)


def _has_bf16_products(device: torch.device) -> bool:
    """Whether a device multiplies BF16 numbers faster than FP32 ones; it sums them in FP32."""
    return device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
