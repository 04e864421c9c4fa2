"""add_norm in Triton for rows that do not fit in registers: a block of columns at a time.

A program reads its row once for each sum that it needs. triton_rows has the equations, triton_wide the gradients,
triton_launch the tiles. Bytes an element count every load and store of the code; a row that is read again may come from
a cache.

M rows   N columns
"""

import triton
import triton.language as tl

from megaresnorm.kernels.add_norm.triton_common import (
    factors_of,
    normalized,
    store_codes,
    store_statistics,
    tile_of,
)
from megaresnorm.kernels.fp8.triton_formats import scale_for, scaled, scales_of, size_of


@triton.jit
def _statistics(source, row, columns, eps, KIND: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean and 1 / deviation [1] of one row in memory, in two passes; RMSNorm (KIND 1) needs only the second."""
    mean = tl.zeros([1], tl.float32)
    if KIND == 2:
        total = tl.zeros([1, BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            total += tile_of(source, row[:, None] * columns + cols[None, :], (cols < columns)[None, :])
        mean = tl.sum(total, 1) / columns
    squares = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < columns)[None, :]
        centred = tile_of(source, row[:, None] * columns + cols[None, :], mask) - mean[:, None]
        squares += tl.where(mask, centred * centred, 0.0)
    variance = tl.sum(squares, 1) / columns
    return mean, tl.div_rn(variance * 0.0 + 1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def _branch_of(
    source, row, start, columns, mean, reciprocal, weight, bias, NEXT_NORM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A block of the branch input in FP32, its offsets and its mask."""
    cols = start + tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
    v = tile_of(source, offsets, mask)
    if NEXT_NORM:
        v = normalized(v, mean, reciprocal, weight, bias, cols, col_mask)
    return v, offsets, mask


@triton.jit
def _store_fp8(
    source, codes, inverse, given, own, row, row_mask, columns, mean, reciprocal, weight, bias,
    NEXT_NORM: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the branch input of a row in FP8; for a scale a row it is computed twice."""
    sizes = tl.zeros([BLOCK_M], tl.int32)
    if GROUP > BLOCK_N:
        for start in range(0, columns, BLOCK_N):
            v, offsets, mask = _branch_of(
                source, row, start, columns, mean, reciprocal, weight, bias, NEXT_NORM, BLOCK_N
            )
            sizes = tl.maximum(sizes, tl.max(size_of(v.to(tl.bfloat16).to(tl.float32), mask), 1))
        scales, inverses = scales_of(sizes, 8)
        tl.store(inverse + row, inverses, mask=row_mask)
    if own is not None:
        scale_of_all = scale_for(given, 8)
    for start in range(0, columns, BLOCK_N):
        v, offsets, mask = _branch_of(source, row, start, columns, mean, reciprocal, weight, bias, NEXT_NORM, BLOCK_N)
        v = v.to(tl.bfloat16).to(tl.float32)
        if GROUP > BLOCK_N:
            v = v * scales[:, None]
        elif own is not None:
            sizes = tl.maximum(sizes, tl.max(size_of(v, mask), 1))
            v = v * scale_of_all
        else:
            v = scaled(v, mask, row, row_mask, start, columns, inverse, None, GROUP, 8, BLOCK_M, BLOCK_N)
        store_codes(codes, offsets, mask, v)
    if own is not None:
        tl.store(own + row, sizes.to(tl.float32, bitcast=True), mask=row_mask)


@triton.jit(do_not_specialize=["rows", "first_column"])
def forward_kernel(
    x, delta, gate, z, trunk, branch, codes, inverse, given, own, key, numbers,
    branch_weight, branch_bias, branch_statistics, weight, bias, statistics, next_weight, next_bias, next_statistics,
    rows, columns, alpha, scale, factor, first_column, branch_eps, eps, next_eps,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr, GROUP: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Equations and arguments of triton_rows.forward_kernel; BLOCK_M is 1, and GROUP more than BLOCK_N for a whole row.

    With next_norm alone and in BF16 it moves 12 bytes an element for RMSNorm and 14 for LayerNorm: x, delta and z for
    the sum (6), z once or twice for the statistics (2 or 4), z and branch for the output (4). In FP8 it is one less;
    with a scale a row one more, since z is read once more for the largest number of its row.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    if BRANCH_NORM:
        b_mean, b_reciprocal = _statistics(delta, row, columns, branch_eps, BRANCH_NORM, BLOCK_N)
        store_statistics(branch_statistics, row, row_mask, b_mean, b_reciprocal)
    if z is not None:
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
            v = tile_of(x, offsets, mask)
            if delta is not None:
                d = tile_of(delta, offsets, mask)
                if BRANCH_NORM:
                    d = normalized(d, b_mean, b_reciprocal, branch_weight, branch_bias, cols, col_mask)
                v = alpha * v + d * factors_of(
                    gate, scale, key, numbers, factor, row, row_mask, cols, col_mask, first_column, GATE, THRESHOLD
                )
            tl.store(z + offsets, v.to(z.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # other threads of the program read what was stored
    stored = x if z is None else z
    if NORM:
        mean, reciprocal = _statistics(stored, row, columns, eps, NORM, BLOCK_N)
        store_statistics(statistics, row, row_mask, mean, reciprocal)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
            v = normalized(tile_of(stored, offsets, mask), mean, reciprocal, weight, bias, cols, col_mask)
            tl.store(trunk + offsets, v.to(trunk.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    summed = trunk if NORM else stored
    if NEXT_NORM:
        mean, reciprocal = _statistics(summed, row, columns, next_eps, NEXT_NORM, BLOCK_N)
        store_statistics(next_statistics, row, row_mask, mean, reciprocal)
    else:
        mean, reciprocal = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    if branch is not None:
        for start in range(0, columns, BLOCK_N):
            v, offsets, mask = _branch_of(
                summed, row, start, columns, mean, reciprocal, next_weight, next_bias, NEXT_NORM, BLOCK_N
            )
            tl.store(branch + offsets, v.to(branch.dtype.element_ty), mask=mask)
    if codes is not None:
        _store_fp8(
            summed, codes, inverse, given, own, row, row_mask, columns, mean, reciprocal, next_weight, next_bias,
            NEXT_NORM, GROUP, BLOCK_M, BLOCK_N,
        )  # fmt: skip
