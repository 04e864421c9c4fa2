"""norm_quant in Triton: the trunk is read once and written in FP8. A last block of fewer than 128 columns is padded."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.add_norm.fp8 import BLOCK
from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.kernels.add_norm.spec import AddNormSpec, Saved, make_spec
from megaresnorm.kernels.add_norm.triton_common import load_statistics, normalized, tile_of
from megaresnorm.kernels.add_norm.triton_launch import backward


@triton.jit
def norm_quant_kernel(
    trunk, weight, bias, statistics, scale, fp8, inverse, rows, columns, blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """fp8 = norm(trunk) * scale, saturated at 448; the norm is (trunk - mean) / deviation * weight + bias.

    Without ``scale`` every block of 128 columns has its own, 448 / its largest |value| (1 where that is 0 or not
    finite), whose inverse is stored in ``inverse`` [M, blocks]. A program takes BLOCK_M rows and BLOCK_N columns, a
    multiple of 128. Moves 3 bytes an element for a BF16 trunk: it reads 2 and writes 1.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, cols < columns
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = row[:, None] * columns + cols[None, :]
    mean, reciprocal = load_statistics(statistics, row, row_mask)
    y = normalized(tile_of(trunk, offsets, mask), mean, reciprocal, weight, bias, cols, col_mask)
    y = tl.where(mask, y, 0.0)
    if scale is not None:
        y = y * tl.load(scale)
    else:
        tiles = tl.reshape(y, [BLOCK_M, BLOCK_N // 128, 128])
        amax = tl.max(tl.abs(tiles), 2)
        scales = tl.where((amax > 0.0) & (amax < float("inf")), tl.div_rn(amax * 0.0 + 448.0, amax), 1.0)
        y = tl.reshape(tiles * scales[:, :, None], [BLOCK_M, BLOCK_N])
        block = tl.program_id(1) * (BLOCK_N // 128) + tl.arange(0, BLOCK_N // 128)
        at = row[:, None] * blocks + block[None, :]
        tl.store(
            inverse + at, tl.div_rn(scales * 0.0 + 1.0, scales), mask=row_mask[:, None] & (block < blocks)[None, :]
        )
    y = tl.where(y > 448.0, 448.0, y)
    y = tl.where(y < -448.0, -448.0, y)
    tl.store(fp8 + offsets, y.to(fp8.dtype.element_ty), mask=mask)


def norm_quant(
    trunk_TD: Tensor, norm: NormWeights, statistics_T2: Tensor, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``fp8.norm_quant`` by one kernel, which reads the statistics; in backward ``triton_launch.backward``."""
    fp8, inverse = _NormQuant.apply(trunk_TD, norm.weight, norm.bias, statistics_T2, scale, norm.kind, norm.eps)
    return fp8, inverse if scale is None else 1.0 / scale


class _NormQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, trunk: Tensor, weight: Tensor, bias: Tensor | None, statistics: Tensor, scale: Tensor | None,
        kind: str, eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        trunk = trunk.contiguous()
        rows, columns = trunk.shape
        blocks = triton.cdiv(columns, BLOCK)
        fp8 = torch.empty_like(trunk, dtype=torch.float8_e4m3fn)
        inverse = trunk.new_empty((rows, blocks) if scale is None else (0,), dtype=torch.float32)
        block_n = min(1024, max(BLOCK, triton.next_power_of_2(columns)))
        block_m = max(1, 2048 // block_n)
        if rows:
            norm_quant_kernel[(triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))](
                trunk, weight, bias, statistics, scale, fp8, inverse, rows, columns, blocks,
                block_m, block_n, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(trunk, weight, bias, statistics)
        ctx.spec = make_spec(("none", "none", kind), (0.0, 0.0, eps), 1.0, 1.0, trunk.dtype, None, "triton")
        ctx.mark_non_differentiable(inverse)
        return fp8, inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        trunk, weight, bias, statistics = ctx.saved_tensors
        saved = Saved(
            trunk, None, None, None, None, None, (None, None, None, None, weight, bias), (None, None, statistics)
        )
        spec: AddNormSpec = ctx.spec
        dx = torch.empty_like(trunk)
        sums = backward(None, grads[0].float().contiguous(), saved, spec, dx, None)
        return dx, sums[4], None if bias is None else sums[5], None, None, None, None
