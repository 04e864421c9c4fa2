"""Products of FP8 tensors, and the specification of them: an emulation that runs everywhere.

M rows   N outputs   K summed
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.fp8.formats import BLOCK, MX, ROW, TENSOR, TILE, Form, Fp8, dequantize
from megaresnorm.kernels.registry import register_kernel


class Fp8Forms(NamedTuple):
    """What shares a scale: elements of an input or an output's gradient, and of a weight."""

    rows: Form
    weight: Form


FORMS = {  # of the recipes, as precision.fp8.recipe
    "tensorwise": Fp8Forms(TENSOR, TENSOR),
    "rowwise": Fp8Forms(ROW, ROW),
    "block": Fp8Forms(BLOCK, TILE),
    "mxfp8": Fp8Forms(MX, MX),
}
RECIPES = tuple(FORMS)
KINDS = (*RECIPES, "block-e5m2")  # of the op; the last with gradients in E5M2, which few products of blocks take


def kind_of(recipe: str, gradients: str) -> str:
    """The kind of product that a recipe needs.

    Args:
        gradients: their type in FP8, e4m3 or e5m2; another where they are not.

    >>> kind_of("block", "e4m3"), kind_of("block", "e5m2"), kind_of("rowwise", "e5m2")
    ('block', 'block-e5m2', 'rowwise')
    """
    return f"{recipe}-{gradients}" if f"{recipe}-{gradients}" in KINDS else recipe


def padded(q: Fp8, multiple: int = 16) -> Fp8:
    """q [M, K] with zeros behind its columns, up to a multiple, as GPUs sum them. Widths of a model need none."""
    missing = -q.codes.shape[1] % multiple
    if not missing:
        return q
    return q._replace(codes=F.pad(q.codes.view(torch.uint8), (0, missing)).view(q.codes.dtype))


class ProductKernel(Protocol):
    """A backend of ``fp8_product``; it computes what ``emulated`` does."""

    def __call__(self, a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
        """See ``emulated``."""


@register_kernel("fp8_product", "emulated", kinds=KINDS)
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
