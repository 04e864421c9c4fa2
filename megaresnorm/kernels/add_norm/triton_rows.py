"""add_norm in Triton: whole rows in registers, one pass over them forward and one backward.

Every program writes its sums over rows as one row of FP32, and these rows are added in a fixed order: no atomics.
``triton_launch`` chooses kernels and tiles; rows that do not fit in registers are those of ``triton_wide``.

In the equations, norm(v) = (v - mean) / sqrt(variance + eps) * weight + bias (RMSNorm: mean 0, variance the mean
square), and ' is a norm's gradient: with unit = (v - mean) / sqrt(variance + eps) and g = weight dy,

    norm'(dy) = (g - mean(g) - unit mean(g unit)) / sqrt(variance + eps)    (RMSNorm: without mean(g))
    d_weight  = sum over rows of dy unit          d_bias = sum over rows of dy

Whatever a tile needs is loaded before the first sum over its columns: threads wait for each other there, and a load
behind it would begin when they are through.

Bytes an element leave out statistics, weights and column sums, which are one number a row or column.

M rows   N columns
"""

import triton
import triton.language as tl

from megaresnorm.kernels.add_norm.triton_common import (
    columns_of,
    gate_of,
    hash_of_rows,
    kept,
    load_statistics,
    statistics_of,
    store_codes,
    store_pair,
    store_statistics,
    tile_of,
)
from megaresnorm.kernels.fp8.triton_formats import scale_for, scaled, size_of


@triton.jit
def _affine(v, mean, reciprocal, weight, bias, bias_pointer):
    """(v - mean) * reciprocal * weight + bias, with weight and bias as tiles [1, n]; no bias without its pointer."""
    y = (v - mean[:, None]) * reciprocal[:, None] * weight
    if bias_pointer is not None:
        y += bias
    return y


@triton.jit
def _weight_and_bias(weight, bias, cols, mask):
    """Weight and bias of a norm as tiles [1, n]; without a bias anything in its place."""
    w = columns_of(weight, cols, mask)
    return w, columns_of(bias, cols, mask) if bias is not None else w


@triton.jit(do_not_specialize=["rows", "first_column"])
def forward_kernel(
    x, delta, gate, z, trunk, branch, codes, inverse, given, own, key, numbers,
    branch_weight, branch_bias, branch_statistics, weight, bias, statistics, next_weight, next_bias, next_statistics,
    rows, columns, alpha, scale, factor, first_column, branch_eps, eps, next_eps,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr, GROUP: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z = alpha x + gate dropout(branch_norm(delta)), trunk = norm(z), branch = next_norm(trunk) of BLOCK_M rows.

    Tensors are [M, N], statistics [M, 2], numbers [M], weights and biases [N]; None where a call has none. Each norm
    reads the rounded tensor before it. With a THRESHOLD there is dropout (``triton_common.kept``), and what is kept is
    multiplied by ``factor``.

    With ``codes`` the branch input is rounded to BF16 and written in FP8 instead: GROUP columns share a scale, whose
    inverse is stored in ``inverse`` [M, groups]. With ``own`` [M] all have that of the amax
    ``given`` [1], and the largest |branch| of every row is stored there.

    Reads x and delta, writes z, trunk (with NORM) and branch, each once. With next_norm alone that is 8 bytes an
    element in BF16, 12 with an FP32 stream, 4 without delta; NORM adds the trunk. In FP8 it is one less: 7 and 11.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, cols < columns
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = row[:, None] * columns + cols[None, :]
    v = tile_of(x, offsets, mask)
    if own is not None:
        scale_of_all = scale_for(given, 8)
    if delta is not None:
        d = tile_of(delta, offsets, mask)
        factors = gate_of(gate, scale, cols, col_mask, GATE)
        if THRESHOLD:
            bits = tl.load(key)
            row_hash = hash_of_rows(bits, numbers, row, row_mask)
        if BRANCH_NORM:
            branch_w, branch_b = _weight_and_bias(branch_weight, branch_bias, cols, col_mask)
    if NORM:
        w, b = _weight_and_bias(weight, bias, cols, col_mask)
    if NEXT_NORM:
        next_w, next_b = _weight_and_bias(next_weight, next_bias, cols, col_mask)
    if delta is not None:
        if THRESHOLD:
            factors = tl.where(kept(bits, row_hash, cols, first_column, THRESHOLD), factors * factor, 0.0)
        if BRANCH_NORM:
            mean, reciprocal = statistics_of(d, mask, columns, branch_eps, BRANCH_NORM)
            store_statistics(branch_statistics, row, row_mask, mean, reciprocal)
            d = _affine(d, mean, reciprocal, branch_w, branch_b, branch_bias)
        v = alpha * v + factors * d
    if z is not None:
        stored = v.to(z.dtype.element_ty)
        tl.store(z + offsets, stored, mask=mask)
        v = tl.where(mask, stored.to(tl.float32), 0.0)
    if NORM:
        mean, reciprocal = statistics_of(v, mask, columns, eps, NORM)
        store_statistics(statistics, row, row_mask, mean, reciprocal)
        stored = _affine(v, mean, reciprocal, w, b, bias).to(trunk.dtype.element_ty)
        tl.store(trunk + offsets, stored, mask=mask)
        v = tl.where(mask, stored.to(tl.float32), 0.0)
    if NEXT_NORM:
        mean, reciprocal = statistics_of(v, mask, columns, next_eps, NEXT_NORM)
        store_statistics(next_statistics, row, row_mask, mean, reciprocal)
        v = _affine(v, mean, reciprocal, next_w, next_b, next_bias)
    if branch is not None:
        tl.store(branch + offsets, v.to(branch.dtype.element_ty), mask=mask)
    if codes is not None:
        v = v.to(tl.bfloat16).to(tl.float32)
        if own is not None:
            tl.store(own + row, tl.max(size_of(v, mask), 1).to(tl.float32, bitcast=True), mask=row_mask)
            v = v * scale_of_all
        else:
            v = scaled(v, mask, row, row_mask, 0, columns, inverse, None, GROUP, 8, BLOCK_M, BLOCK_N)
        store_codes(codes, offsets, mask, v)


@triton.jit
def _norm_gradient(dy, unit, reciprocal, weight, columns, KIND: tl.constexpr):
    """norm'(dy), the gradient of the norm's input, and mean(g unit) and mean(g) of every row."""
    gy = dy * weight
    along = tl.sum(gy * unit, 1) / columns
    inner = gy - unit * along[:, None]
    average = along * 0.0
    if KIND == 2:
        average = tl.sum(gy, 1) / columns
        inner -= average[:, None]
    return inner * reciprocal[:, None], along, average


@triton.jit(do_not_specialize=["rows", "rows_per_program", "first_column"])
def backward_kernel(
    d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta, coefficients, key, numbers,
    branch_weight, branch_bias, branch_statistics, weight, statistics, next_weight, next_statistics,
    sum_branch_weight, sum_branch_bias, sum_weight, sum_bias, sum_next_weight, sum_next_bias, sum_gate,
    rows, columns, rows_per_program, alpha, scale, factor, first_column,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr,
    THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = norm'(d_trunk + next_norm'(d_branch)), dx = alpha g, d_delta = branch_norm'(dropout'(gate g)), column sums.

    The column sums are d_weight and d_bias of the norms and d_gate, the sum of g dropout(branch_norm(delta)). A program
    goes over ``rows_per_program`` rows and stores its share of them, [programs, N], at each sum_*; None where there is
    none. With ``coefficients`` [M, 6] there are no sums: mean(g unit) and mean(g) of every row and norm are stored
    instead, from which triton_wide.columns_kernel makes them. d_delta is None without delta, or where it is the very
    tensor of dx.

    Reads d_trunk, d_branch and z, the trunk with two norms, and delta for a learned gate or a branch norm; writes dx
    and d_delta; each once. With next_norm alone that is 8 bytes an element in BF16 where d_delta is dx and 10 where it
    is not; 16 with an FP32 stream.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    if BRANCH_NORM and (d_delta is not None) and (coefficients is None):
        branch_w, branch_b = _weight_and_bias(branch_weight, branch_bias, cols, col_mask)
    if NORM:
        w = columns_of(weight, cols, col_mask)
    if NEXT_NORM and (d_branch is not None):
        next_w = columns_of(next_weight, cols, col_mask)
    if THRESHOLD:
        bits = tl.load(key)
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
        if d_branch is not None:
            g = tile_of(d_branch, offsets, mask)
            if d_trunk is not None:
                passed = tile_of(d_trunk, offsets, mask)
        else:
            g = tile_of(d_trunk, offsets, mask)
        if NEXT_NORM and (d_branch is not None):
            next_v = tile_of(trunk if NORM else z, offsets, mask)
            next_mean, next_reciprocal = load_statistics(next_statistics, row, row_mask)
        if NORM:
            v = tile_of(z, offsets, mask)
            mean, reciprocal = load_statistics(statistics, row, row_mask)
        if THRESHOLD:
            row_hash = hash_of_rows(bits, numbers, row, row_mask)
        if (d_delta is not None) and (delta is not None):
            d = tile_of(delta, offsets, mask)
            if BRANCH_NORM:
                branch_mean, branch_reciprocal = load_statistics(branch_statistics, row, row_mask)
        if NEXT_NORM and (d_branch is not None):
            unit = (next_v - next_mean[:, None]) * next_reciprocal[:, None]
            if sum_next_weight is not None:
                a_next_weight += g * unit
            if sum_next_bias is not None:
                a_next_bias += g
            g, along, average = _norm_gradient(g, unit, next_reciprocal, next_w, columns, NEXT_NORM)
            if coefficients is not None:
                store_pair(coefficients, row, row_mask, along, average, 2)
        if (d_branch is not None) and (d_trunk is not None):
            g += passed
        if NORM:
            g = tl.where(mask, g, 0.0)
            unit = (v - mean[:, None]) * reciprocal[:, None]
            if sum_weight is not None:
                a_weight += g * unit
            if sum_bias is not None:
                a_bias += g
            g, along, average = _norm_gradient(g, unit, reciprocal, w, columns, NORM)
            if coefficients is not None:
                store_pair(coefficients, row, row_mask, along, average, 1)
        tl.store(dx + offsets, (g * alpha).to(dx.dtype.element_ty), mask=mask)
        if d_delta is not None:
            g = tl.where(mask, g, 0.0)
            if THRESHOLD:
                g = tl.where(kept(bits, row_hash, cols, first_column, THRESHOLD), g * factor, 0.0)
            gated = g * gate_of(gate, scale, cols, col_mask, GATE)
            if BRANCH_NORM:
                if coefficients is not None:  # here, or registers would not do
                    branch_w, branch_b = _weight_and_bias(branch_weight, branch_bias, cols, col_mask)
                unit = (d - branch_mean[:, None]) * branch_reciprocal[:, None]
                if sum_gate is not None:
                    a_gate += g * _affine(d, branch_mean, branch_reciprocal, branch_w, branch_b, branch_bias)
                if sum_branch_weight is not None:
                    a_branch_weight += gated * unit
                if sum_branch_bias is not None:
                    a_branch_bias += gated
                gated, along, average = _norm_gradient(gated, unit, branch_reciprocal, branch_w, columns, BRANCH_NORM)
                if coefficients is not None:
                    store_pair(coefficients, row, row_mask, along, average, 0)
            elif sum_gate is not None:
                a_gate += g * d
            tl.store(d_delta + offsets, gated.to(d_delta.dtype.element_ty), mask=mask)
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


@triton.jit(do_not_specialize=["programs"])
def sum_kernel(partial, sums, programs, columns, USED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums [7, N]: for every bit of USED the sum over the programs of the next [programs, N] of partial, else 0."""
    slot = tl.program_id(1)
    place, used = slot * 0, slot * 0
    for i in tl.static_range(7):
        place += ((USED >> i) & 1) * tl.where(slot > i, 1, 0)
        used += ((USED >> i) & 1) * tl.where(slot == i, 1, 0)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, programs * used, BLOCK_M):
        program = start + tl.arange(0, BLOCK_M)
        at = (place * programs + program).to(tl.int64)[:, None] * columns + cols[None, :]
        total += tile_of(partial, at, (program < programs)[:, None] & col_mask[None, :])
    tl.store(sums + slot * columns + cols, tl.sum(total, 0), mask=col_mask)
