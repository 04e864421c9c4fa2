"""Gradients of add_norm in Triton for rows that do not fit in registers: a block of columns at a time.

The gradients of rows have one program a row, which reads its row once for each sum that it needs. The column sums are a
second kernel, over blocks of columns, that reads the few numbers a row which the first one left.

triton_rows has the equations, triton_launch the tiles. Bytes an element count every load and store of the code; a row
that is read again may come from a cache.

M rows   N columns
"""

import triton
import triton.language as tl

from megaresnorm.kernels.add_norm.triton_common import (
    columns_of,
    factors_of,
    load_statistics,
    normalized,
    store_pair,
    tile_of,
)


@triton.jit
def _load_pair(coefficients, row, row_mask, PLACE: tl.constexpr):
    """mean(g unit) and mean(g) of the norm at PLACE: 0 the branch's, 1 the sum's, 2 the next one."""
    at = coefficients + 6 * row + 2 * PLACE
    return tl.load(at, mask=row_mask, other=0.0), tl.load(at + 1, mask=row_mask, other=0.0)


@triton.jit
def _norm_gradient(dy, unit, reciprocal, along, average, weight, cols, col_mask):
    gy = dy * columns_of(weight, cols, col_mask)
    return (gy - average[:, None] - unit * along[:, None]) * reciprocal[:, None]


@triton.jit
def _gradients(
    d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
    row, row_mask, offsets, mask, cols, col_mask, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile: of next_norm's output, the trunk and the sum; and the unit rows of next_norm and norm.

    LAST is the last gradient that is computed: 0 the first alone, 1 also that of the trunk, 2 all.
    """
    d_next = tile_of(d_branch, offsets, mask) if d_branch is not None else tile_of(d_trunk, offsets, mask) * 0.0
    next_unit, unit, d_sum = d_next, d_next, d_next
    if NEXT_NORM and (d_branch is not None):
        mean, reciprocal = load_statistics(next_statistics, row, row_mask)
        v = tile_of(trunk if NORM else z, offsets, mask)
        next_unit = (v - mean[:, None]) * reciprocal[:, None]
        if LAST > 0:
            along, average = _load_pair(coefficients, row, row_mask, 2)
            d_sum = _norm_gradient(d_next, next_unit, reciprocal, along, average, next_weight, cols, col_mask)
    if LAST > 0:
        if d_trunk is not None:
            d_sum += tile_of(d_trunk, offsets, mask)
        d_sum = tl.where(mask, d_sum, 0.0)
    d_norm = d_sum
    if NORM and LAST > 0:
        mean, reciprocal = load_statistics(statistics, row, row_mask)
        unit = (tile_of(z, offsets, mask) - mean[:, None]) * reciprocal[:, None]
        if LAST > 1:
            along, average = _load_pair(coefficients, row, row_mask, 1)
            d_sum = _norm_gradient(d_norm, unit, reciprocal, along, average, weight, cols, col_mask)
            d_sum = tl.where(mask, d_sum, 0.0)
    return d_next, d_norm, d_sum, next_unit, unit


@triton.jit
def _store_means(coefficients, row, row_mask, along, average, columns, PLACE: tl.constexpr, KIND: tl.constexpr):
    average = tl.sum(average, 1) / columns if KIND == 2 else tl.sum(average, 1) * 0.0
    store_pair(coefficients, row, row_mask, tl.sum(along, 1) / columns, average, PLACE)
    tl.debug_barrier()  # other threads of the program read what was stored


@triton.jit(do_not_specialize=["rows", "first_column"])
def rows_kernel(
    d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta, coefficients, key, numbers,
    branch_weight, branch_statistics, weight, statistics, next_weight, next_statistics,
    rows, columns, alpha, scale, factor, first_column,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and d_delta of a row, as triton_rows.backward_kernel, and coefficients [M, 6].

    The coefficients are mean(g unit) and mean(g) of each norm; for RMSNorm 0 is stored for mean(g).

    With next_norm alone and in BF16 it moves 12 bytes an element, or 14 where d_delta is a tensor of its own: d_branch
    and z for the coefficients (4), d_branch, z, d_trunk and dx for the gradients (8).
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    if NEXT_NORM and (d_branch is not None):
        along, average = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
            dy, _, _, unit, _ = _gradients(
                d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
                row, row_mask, offsets, mask, cols, col_mask, NORM, NEXT_NORM, 0,
            )  # fmt: skip
            gy = dy * columns_of(next_weight, cols, col_mask)
            along += gy * unit
            average += gy
        _store_means(coefficients, row, row_mask, along, average, columns, 2, NEXT_NORM)
    if NORM:
        along, average = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
            _, dy, _, _, unit = _gradients(
                d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
                row, row_mask, offsets, mask, cols, col_mask, NORM, NEXT_NORM, 1,
            )  # fmt: skip
            gy = dy * columns_of(weight, cols, col_mask)
            along += gy * unit
            average += gy
        _store_means(coefficients, row, row_mask, along, average, columns, 1, NORM)
    along, average = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < columns
        offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
        _, _, g, _, _ = _gradients(
            d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
            row, row_mask, offsets, mask, cols, col_mask, NORM, NEXT_NORM, 2,
        )  # fmt: skip
        tl.store(dx + offsets, (g * alpha).to(dx.dtype.element_ty), mask=mask)
        if d_delta is not None:
            gated = tl.where(mask, g, 0.0) * factors_of(
                gate, scale, key, numbers, factor, row, row_mask, cols, col_mask, first_column, GATE, THRESHOLD
            )
            if BRANCH_NORM:
                mean, reciprocal = load_statistics(branch_statistics, row, row_mask)
                gy = gated * columns_of(branch_weight, cols, col_mask)
                along += gy * ((tile_of(delta, offsets, mask) - mean[:, None]) * reciprocal[:, None])
                average += gy
            else:
                tl.store(d_delta + offsets, gated.to(d_delta.dtype.element_ty), mask=mask)
    if BRANCH_NORM:
        _store_means(coefficients, row, row_mask, along, average, columns, 0, BRANCH_NORM)
        along_mean, average_mean = _load_pair(coefficients, row, row_mask, 0)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets, mask = row[:, None] * columns + cols[None, :], col_mask[None, :]
            _, _, g, _, _ = _gradients(
                d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
                row, row_mask, offsets, mask, cols, col_mask, NORM, NEXT_NORM, 2,
            )  # fmt: skip
            gated = g * factors_of(
                gate, scale, key, numbers, factor, row, row_mask, cols, col_mask, first_column, GATE, THRESHOLD
            )
            mean, reciprocal = load_statistics(branch_statistics, row, row_mask)
            unit = (tile_of(delta, offsets, mask) - mean[:, None]) * reciprocal[:, None]
            gated = _norm_gradient(gated, unit, reciprocal, along_mean, average_mean, branch_weight, cols, col_mask)
            tl.store(d_delta + offsets, gated.to(d_delta.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "rows_per_program", "first_column"])
def columns_kernel(
    d_trunk, d_branch, z, trunk, delta, gate, coefficients, key, numbers,
    branch_weight, branch_bias, branch_statistics, weight, statistics, next_weight, next_statistics,
    sum_branch_weight, sum_branch_bias, sum_weight, sum_bias, sum_next_weight, sum_next_bias, sum_gate,
    rows, columns, rows_per_program, scale, factor, first_column,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Column sums of triton_rows.backward_kernel over ``rows_per_program`` rows of BLOCK_N columns.

    Each sum_* is [programs, N], or None. With next_norm alone, a constant gate and BF16 the sums depend on d_branch and
    z, 4 bytes an element.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    a_branch_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_branch_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_next_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_next_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows_per_program, BLOCK_M):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_M)
        row_mask = (row < rows) & (start + tl.arange(0, BLOCK_M) < rows_per_program)
        mask = row_mask[:, None] & col_mask[None, :]
        offsets = row[:, None] * columns + cols[None, :]
        d_next, d_norm, g, next_unit, unit = _gradients(
            d_trunk, d_branch, z, trunk, weight, statistics, next_weight, next_statistics, coefficients,
            row, row_mask, offsets, mask, cols, col_mask, NORM, NEXT_NORM, 2,
        )  # fmt: skip
        if sum_next_weight is not None:
            a_next_weight += d_next * next_unit
        if sum_next_bias is not None:
            a_next_bias += d_next
        if sum_weight is not None:
            a_weight += d_norm * unit
        if sum_bias is not None:
            a_bias += d_norm
        if delta is not None:
            d = tile_of(delta, offsets, mask)
            if BRANCH_NORM:
                mean, reciprocal = load_statistics(branch_statistics, row, row_mask)
                gated = g * factors_of(
                    gate, scale, key, numbers, factor, row, row_mask, cols, col_mask, first_column, GATE, THRESHOLD
                )
                a_branch_weight += gated * ((d - mean[:, None]) * reciprocal[:, None])
                a_branch_bias += gated
                d = normalized(d, mean, reciprocal, branch_weight, branch_bias, cols, col_mask)
            if sum_gate is not None:
                ones = factors_of(
                    gate, 1.0, key, numbers, factor, row, row_mask, cols, col_mask, first_column, 0, THRESHOLD
                )
                a_gate += tl.where(mask, g * ones * d, 0.0)
    at = program * columns + cols
    if sum_branch_weight is not None:
        tl.store(sum_branch_weight + at, tl.sum(a_branch_weight, 0), mask=col_mask)
    if sum_branch_bias is not None:
        tl.store(sum_branch_bias + at, tl.sum(a_branch_bias, 0), mask=col_mask)
    if sum_weight is not None:
        tl.store(sum_weight + at, tl.sum(a_weight, 0), mask=col_mask)
    if sum_bias is not None:
        tl.store(sum_bias + at, tl.sum(a_bias, 0), mask=col_mask)
    if sum_next_weight is not None:
        tl.store(sum_next_weight + at, tl.sum(a_next_weight, 0), mask=col_mask)
    if sum_next_bias is not None:
        tl.store(sum_next_bias + at, tl.sum(a_next_bias, 0), mask=col_mask)
    if sum_gate is not None:
        tl.store(sum_gate + at, tl.sum(a_gate, 0), mask=col_mask)
