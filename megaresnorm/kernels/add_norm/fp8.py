"""FP8 (E4M3) with one scale for a whole tensor, or one for each block of 128 columns.

``add_norm`` itself writes FP8 under a scale that is known before, from the amax of earlier steps (delayed scaling).
Where the scale is to be that of the values themselves (current scaling), ``add_norm(out_dtype=None)`` leaves trunk,
statistics and amax, and ``norm_quant`` normalizes the stored trunk once more: 9 bytes an element instead of the 11 of
writing BF16 and casting that.

T rows   D columns
"""

from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import NormWeights, normalize_with_statistics, to_fp8
from megaresnorm.kernels.registry import register_kernel

BLOCK = 128  # columns that share a scale
LARGEST = 448.0  # of E4M3


def scale_for(amax: Tensor) -> Tensor:
    """The factor that takes ``amax`` to the largest number of E4M3; 1 where amax is 0 or not finite.

    >>> scale_for(torch.tensor([224.0, 0.0]))
    tensor([2., 1.])
    """
    return torch.where((amax > 0) & amax.isfinite(), LARGEST / amax, 1.0)


@register_kernel("norm_quant", "reference")
def norm_quant(
    trunk_TD: Tensor, norm: NormWeights, statistics_T2: Tensor, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """norm(trunk) in FP8.

    The gradient of the FP8 tensor is taken to be that of the value; ``reference.add_norm`` says what autograd does to
    it. The statistics are computed again here; a fused backend reads them.

    Args:
        statistics_T2: as ``add_norm`` returned them for this norm.
        scale: factor for the whole tensor; None for a scale of its own for each block of 1 x 128.
    Returns:
        FP8 [T, D] and the inverse scales: [] for a whole tensor, else [T, ceil(D / 128)]. A value is FP8 times its
        inverse scale.
    """
    wide = torch.float64 if trunk_TD.dtype == torch.float64 else torch.float32
    y_TD, _ = normalize_with_statistics(trunk_TD.to(wide), norm)
    if scale is not None:
        return to_fp8(y_TD, scale), 1.0 / scale
    return _ToFp8Blocks.apply(y_TD)


class _ToFp8Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = y_TD.shape
        blocks = -(-columns // BLOCK)
        padded = torch.nn.functional.pad(y_TD, (0, blocks * BLOCK - columns)).view(rows, blocks, BLOCK)
        scales = scale_for(padded.abs().amax(-1) if rows else padded.new_zeros(rows, blocks))
        fp8 = (padded * scales.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        inverse = (1.0 / scales).float()
        ctx.mark_non_differentiable(inverse)
        return fp8.view(rows, -1)[:, :columns].contiguous(), inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].float()
