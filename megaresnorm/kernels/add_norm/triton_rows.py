"""add_norm in Triton: one pass over the rows forward, one backward.

A program holds whole rows in registers, up to MAX_COLUMNS; wider rows are read a block of columns at a time, with one
more kernel for the column sums. Every program writes its sums over rows as one row of FP32, and these rows are added in
a fixed order: no atomics.

In the equations, norm(v) = (v - mean) / sqrt(variance + eps) * weight + bias (RMSNorm: mean 0, variance the mean
square), and ' is a norm's gradient: with unit = (v - mean) / sqrt(variance + eps) and g = weight dy,

    norm'(dy) = (g - mean(g) - unit mean(g unit)) / sqrt(variance + eps)    (RMSNorm: without mean(g))
    d_weight  = sum over rows of dy unit          d_bias = sum over rows of dy

Bytes an element leave out statistics, weights and column sums, which are one number a row or column.

M rows   N columns
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.add_norm import triton_wide
from megaresnorm.kernels.add_norm.spec import FP8, SUMS, AddNormSpec, Inputs, Outputs, Saved
from megaresnorm.kernels.add_norm.triton_common import (
    as_output,
    columns_of,
    gate_of,
    largest_of,
    load_statistics,
    normalized,
    statistics_of,
    store_statistics,
    tile_of,
)
from megaresnorm.kernels.custom_op import launcher

MAX_COLUMNS = 8192  # above, the column sums of the gradients would no longer fit in registers
WIDE_BLOCK = 4096
KINDS = {"none": 0, "rmsnorm": 1, "layernorm": 2}
NUMBER, SCALAR, VECTOR = 0, 1, 2  # forms of a gate: constant, learned [1], learned [N]


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, delta, gate, z, trunk, branch, amax, fp8_scale,
    branch_weight, branch_bias, branch_statistics, weight, bias, statistics, next_weight, next_bias, next_statistics,
    rows, columns, alpha, scale, branch_eps, eps, next_eps,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z = alpha x + gate branch_norm(delta), trunk = norm(z), branch = next_norm(trunk); a program has BLOCK_M rows.

    Tensors are [M, N], statistics [M, 2], amax [M], weights and biases [N]; None where a call has none. Each norm reads
    the rounded tensor before it. amax is the largest |branch| of a row before ``fp8_scale``.

    Reads x and delta, writes z, trunk (with NORM) and branch, each once. With next_norm alone that is 8 bytes an
    element in BF16, 12 with an FP32 stream, 7 with branch in FP8, 4 without delta; NORM adds the trunk.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, cols < columns
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = row[:, None] * columns + cols[None, :]
    v = tile_of(x, offsets, mask)
    if delta is not None:
        d = tile_of(delta, offsets, mask)
        if BRANCH_NORM:
            mean, reciprocal = statistics_of(d, mask, columns, branch_eps, BRANCH_NORM)
            store_statistics(branch_statistics, row, row_mask, mean, reciprocal)
            d = normalized(d, mean, reciprocal, branch_weight, branch_bias, cols, col_mask)
        v = alpha * v + gate_of(gate, scale, cols, col_mask, GATE) * d
    if z is not None:
        stored = v.to(z.dtype.element_ty)
        tl.store(z + offsets, stored, mask=mask)
        v = tl.where(mask, stored.to(tl.float32), 0.0)
    if NORM:
        mean, reciprocal = statistics_of(v, mask, columns, eps, NORM)
        store_statistics(statistics, row, row_mask, mean, reciprocal)
        stored = normalized(v, mean, reciprocal, weight, bias, cols, col_mask).to(trunk.dtype.element_ty)
        tl.store(trunk + offsets, stored, mask=mask)
        v = tl.where(mask, stored.to(tl.float32), 0.0)
    if NEXT_NORM:
        mean, reciprocal = statistics_of(v, mask, columns, next_eps, NEXT_NORM)
        store_statistics(next_statistics, row, row_mask, mean, reciprocal)
        v = normalized(v, mean, reciprocal, next_weight, next_bias, cols, col_mask)
    if amax is not None:
        tl.store(amax + row, largest_of(v, mask), mask=row_mask)
    if branch is not None:
        tl.store(branch + offsets, as_output(v, fp8_scale, branch, FP8), mask=mask)


@triton.jit
def _norm_gradient(dy, v, mean, reciprocal, weight, cols, col_mask, columns, KIND: tl.constexpr):
    """norm'(dy), the gradient of the norm's input, and the unit rows."""
    unit = (v - mean[:, None]) * reciprocal[:, None]
    gy = dy * columns_of(weight, cols, col_mask)
    inner = gy - unit * (tl.sum(gy * unit, 1) / columns)[:, None]
    if KIND == 2:
        inner -= (tl.sum(gy, 1) / columns)[:, None]
    return inner * reciprocal[:, None], unit


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def backward_kernel(
    d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta,
    branch_weight, branch_bias, branch_statistics, weight, statistics, next_weight, next_statistics,
    sum_branch_weight, sum_branch_bias, sum_weight, sum_bias, sum_next_weight, sum_next_bias, sum_gate,
    rows, columns, rows_per_program, alpha, scale,
    BRANCH_NORM: tl.constexpr, NORM: tl.constexpr, NEXT_NORM: tl.constexpr, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g = norm'(d_trunk + next_norm'(d_branch)), dx = alpha g, d_delta = branch_norm'(gate g), and the column sums.

    The column sums are d_weight and d_bias of the norms and d_gate, the sum of g branch_norm(delta). A program goes
    over ``rows_per_program`` rows and stores its share of them, [programs, N], at each sum_*; None where there is none.
    d_delta is None without delta, or where it is the very tensor of dx.

    Reads d_trunk, d_branch and z, the trunk with two norms, and delta for a learned gate or a branch norm; writes dx
    and d_delta; each once. With next_norm alone that is 8 bytes an element in BF16 where d_delta is dx and 10 where it
    is not; 16 with an FP32 stream.
    """
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    a_branch_weight = tl.zeros([BLOCK_N], tl.float32)
    a_branch_bias = tl.zeros([BLOCK_N], tl.float32)
    a_weight = tl.zeros([BLOCK_N], tl.float32)
    a_bias = tl.zeros([BLOCK_N], tl.float32)
    a_next_weight = tl.zeros([BLOCK_N], tl.float32)
    a_next_bias = tl.zeros([BLOCK_N], tl.float32)
    a_gate = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, rows_per_program, BLOCK_M):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_M)
        row_mask = (row < rows) & (start + tl.arange(0, BLOCK_M) < rows_per_program)
        mask = row_mask[:, None] & col_mask[None, :]
        offsets = row[:, None] * columns + cols[None, :]
        if d_branch is not None:
            g = tile_of(d_branch, offsets, mask)
            if NEXT_NORM:
                dy = g
                v = tile_of(trunk if NORM else z, offsets, mask)
                mean, reciprocal = load_statistics(next_statistics, row, row_mask)
                g, unit = _norm_gradient(dy, v, mean, reciprocal, next_weight, cols, col_mask, columns, NEXT_NORM)
                a_next_weight += tl.sum(dy * unit, 0)
                if sum_next_bias is not None:
                    a_next_bias += tl.sum(dy, 0)
            if d_trunk is not None:
                g += tile_of(d_trunk, offsets, mask)
        else:
            g = tile_of(d_trunk, offsets, mask)
        if NORM:
            dy = tl.where(mask, g, 0.0)
            v = tile_of(z, offsets, mask)
            mean, reciprocal = load_statistics(statistics, row, row_mask)
            g, unit = _norm_gradient(dy, v, mean, reciprocal, weight, cols, col_mask, columns, NORM)
            a_weight += tl.sum(dy * unit, 0)
            if sum_bias is not None:
                a_bias += tl.sum(dy, 0)
        tl.store(dx + offsets, (g * alpha).to(dx.dtype.element_ty), mask=mask)
        if d_delta is not None:
            if delta is not None:
                d = tile_of(delta, offsets, mask)
            gated = tl.where(mask, g * gate_of(gate, scale, cols, col_mask, GATE), 0.0)
            if BRANCH_NORM:
                mean, reciprocal = load_statistics(branch_statistics, row, row_mask)
                if sum_gate is not None:
                    y = normalized(d, mean, reciprocal, branch_weight, branch_bias, cols, col_mask)
                    a_gate += tl.sum(tl.where(mask, g * y, 0.0), 0)
                dy = gated
                gated, unit = _norm_gradient(
                    dy, d, mean, reciprocal, branch_weight, cols, col_mask, columns, BRANCH_NORM
                )
                a_branch_weight += tl.sum(dy * unit, 0)
                if sum_branch_bias is not None:
                    a_branch_bias += tl.sum(dy, 0)
            elif sum_gate is not None:
                a_gate += tl.sum(g * d, 0)
            tl.store(d_delta + offsets, gated.to(d_delta.dtype.element_ty), mask=mask)
    at = program * columns + cols
    if sum_branch_weight is not None:
        tl.store(sum_branch_weight + at, a_branch_weight, mask=col_mask)
    if sum_branch_bias is not None:
        tl.store(sum_branch_bias + at, a_branch_bias, mask=col_mask)
    if sum_weight is not None:
        tl.store(sum_weight + at, a_weight, mask=col_mask)
    if sum_bias is not None:
        tl.store(sum_bias + at, a_bias, mask=col_mask)
    if sum_next_weight is not None:
        tl.store(sum_next_weight + at, a_next_weight, mask=col_mask)
    if sum_next_bias is not None:
        tl.store(sum_next_bias + at, a_next_bias, mask=col_mask)
    if sum_gate is not None:
        tl.store(sum_gate + at, a_gate, mask=col_mask)


def forward(inputs: Inputs, spec: AddNormSpec, outputs: Outputs) -> None:
    """Fill ``outputs``, as ``AddNormBackend.forward``."""
    x, delta, gate, fp8_scale, w = inputs
    rows, columns = x.shape
    if rows == 0:
        return
    wide = columns > MAX_COLUMNS
    shape = _shape(columns, 1) if not wide else Shape(1, WIDE_BLOCK, 8)
    kernel = triton_wide.forward_kernel if wide else forward_kernel
    z, trunk, branch, branch_statistics, statistics, next_statistics, amax = outputs
    launcher(kernel)[(triton.cdiv(rows, shape.block_m),)](
        x, delta, gate, z, trunk, branch, amax, fp8_scale,
        w[0], w[1], branch_statistics, w[2], w[3], statistics, w[4], w[5], next_statistics,
        rows, columns, spec.alpha, spec.constant_gate, *spec.eps,
        *_kinds(spec), _kind_of_gate(gate), spec.out_dtype == FP8,
        shape.block_m, shape.block_n, num_warps=shape.warps,
    )  # fmt: skip


def backward(
    d_trunk: Tensor | None, d_branch: Tensor | None, saved: Saved, spec: AddNormSpec, dx: Tensor, d_delta: Tensor | None
) -> Tensor:
    """Fill dx and d_delta and return the column sums, as ``AddNormBackend.backward``."""
    z, trunk, delta, gate, w, (branch_statistics, statistics, next_statistics) = saved
    rows, columns = z.shape
    if d_branch is None:
        spec = spec.without_next_norm()
    used = [i for i, there in enumerate(_sums(saved, spec)) if there]
    sums = z.new_zeros((SUMS, columns), dtype=torch.float32)
    if rows == 0:
        return sums
    norms = sum(kind != "none" for kind in spec.kinds)
    wide = columns * max(1, norms) > MAX_COLUMNS
    shape = _shape(columns, max(1, norms)) if not wide else Shape(8, 128, 4)
    programs = max(
        1, min(triton.cdiv(rows, shape.block_m), _programs(z.device) if not wide else triton.cdiv(rows, 256))
    )
    rows_per_program = triton.cdiv(triton.cdiv(rows, programs), shape.block_m) * shape.block_m
    programs = triton.cdiv(rows, rows_per_program)
    partial = z.new_empty((len(used), programs, columns), dtype=torch.float32)
    parts: list[Tensor | None] = [None] * SUMS
    for slot, i in enumerate(used):
        parts[i] = partial[slot]
    kinds = *_kinds(spec), _kind_of_gate(gate)
    if not wide:
        launcher(backward_kernel)[(programs,)](
            d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta,
            w[0], w[1], branch_statistics, w[2], statistics, w[4], next_statistics, *parts,
            rows, columns, rows_per_program, spec.alpha, spec.constant_gate, *kinds,
            shape.block_m, shape.block_n, num_warps=shape.warps,
        )  # fmt: skip
    else:
        coefficients = z.new_zeros((rows, 6), dtype=torch.float32)
        launcher(triton_wide.rows_kernel)[(rows,)](
            d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta, coefficients,
            w[0], branch_statistics, w[2], statistics, w[4], next_statistics,
            rows, columns, spec.alpha, spec.constant_gate, *kinds,
            1, min(WIDE_BLOCK, triton.next_power_of_2(columns)), num_warps=8,
        )  # fmt: skip
        if used:
            launcher(triton_wide.columns_kernel)[(programs, triton.cdiv(columns, shape.block_n))](
                d_trunk, d_branch, z, trunk, delta, gate, coefficients,
                w[0], w[1], branch_statistics, w[2], statistics, w[4], next_statistics, *parts,
                rows, columns, rows_per_program, spec.constant_gate, *kinds,
                shape.block_m, shape.block_n, num_warps=shape.warps,
            )  # fmt: skip
    for slot, i in enumerate(used):
        torch.sum(partial[slot], 0, out=sums[i])
    return sums


class Shape(NamedTuple):
    """A program's tile of block_m rows and block_n columns, and its warps of 32 threads."""

    block_m: int
    block_n: int
    warps: int


def _shape(columns: int, norms: int) -> Shape:
    """Tiles of 2048 numbers or one row, 16 numbers a thread: 128-bit accesses and no register spills.

    tests/kernels/registers.json has the registers that each kernel may use.
    """
    block_n = triton.next_power_of_2(columns)
    block_m = max(1, 2048 // block_n)
    return Shape(block_m, block_n, min(16, max(4, block_m * block_n // 512)))


def _programs(device: torch.device) -> int:
    """Two programs a multiprocessor: their partial sums are then about two percent of the bytes that a kernel moves."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _kinds(spec: AddNormSpec) -> list[int]:
    return [KINDS[kind] for kind in spec.kinds]


def _kind_of_gate(gate: Tensor | None) -> int:
    return NUMBER if gate is None else SCALAR if gate.numel() == 1 else VECTOR


def _sums(saved: Saved, spec: AddNormSpec) -> Sequence[bool]:
    """Which of the SUMS column sums exist."""
    weights = [w is not None and spec.kinds[i // 2] != "none" for i, w in enumerate(saved.weights)]
    return *weights, saved.gate is not None
