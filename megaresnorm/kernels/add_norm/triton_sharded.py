"""The kernels of a norm sharded over the hidden dimension in Triton; kernels/add_norm/sharded.py is their reference.

A program takes one row, a block of columns at a time; for the gradients of weight and bias it takes one block of
columns and some of the rows. Their partial sums are added in a fixed order: no atomics.

In the equations unit = (z - mean) / deviation with the statistics of whole rows [T, 2]. Bytes an element count every
load and store of the code for BF16 tensors; a row that is read again may come from a cache.

T rows   d columns of this rank
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.add_norm import sharded
from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.kernels.add_norm.sharded import ShardedNormKernels, empty_sums
from megaresnorm.kernels.add_norm.triton_common import (
    columns_of,
    load_statistics,
    statistics_of,
    store_statistics,
    tile_of,
)

BLOCK_N = 4096
ROWS_PER_PROGRAM = 64  # in grad_weights_kernel, in tiles of WEIGHTS_M x WEIGHTS_N
MOST_COLUMNS = 16384  # of a whole row in registers
WEIGHTS_M, WEIGHTS_N = 8, 128
KINDS = {"rmsnorm": 1, "layernorm": 2}


@triton.jit
def stats_kernel(z, sums, columns, LAYERNORM: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums = (mean, sum of (z - mean)^2) of the local columns for LayerNorm, the sum of z^2 for RMSNorm.

    Moves 4 bytes an element for LayerNorm, which reads z twice, and 2 for RMSNorm.
    """
    row = tl.program_id(0).to(tl.int64)
    mean = 0.0
    if LAYERNORM:
        total = tl.zeros([1, BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            total += tile_of(z, row * columns + cols[None, :], (cols < columns)[None, :])
        mean = tl.sum(total) / columns
    squares = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = (cols < columns)[None, :]
        centred = tl.where(mask, tile_of(z, row * columns + cols[None, :], mask) - mean, 0.0)
        squares += centred * centred
    if LAYERNORM:
        tl.store(sums + 2 * row, mean)
        tl.store(sums + 2 * row + 1, tl.sum(squares))
    else:
        tl.store(sums + row, tl.sum(squares))


@triton.jit
def apply_kernel(z, statistics, weight, bias, out, columns, BLOCK_N: tl.constexpr):
    """out = unit weight + bias. Moves 4 bytes an element: z and out."""
    row = tl.program_id(0).to(tl.int64)
    mean, reciprocal = load_statistics(statistics, row, True)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < columns
        offsets = row * columns + cols[None, :]
        y = (tile_of(z, offsets, col_mask[None, :]) - mean) * reciprocal * columns_of(weight, cols, col_mask)
        if bias is not None:
            y += columns_of(bias, cols, col_mask)
        tl.store(out + offsets, y.to(out.dtype.element_ty), mask=col_mask[None, :])


@triton.jit
def grad_sums_kernel(dy, z, statistics, weight, sums, columns, LAYERNORM: tl.constexpr, BLOCK_N: tl.constexpr):
    """sums = (sum of g unit, sum of g) with g = weight dy; RMSNorm has only the first. 4 bytes an element: dy and z."""
    row = tl.program_id(0).to(tl.int64)
    mean, reciprocal = load_statistics(statistics, row, True)
    along = tl.zeros([1, BLOCK_N], tl.float32)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < columns
        offsets = row * columns + cols[None, :]
        g = tile_of(dy, offsets, col_mask[None, :]) * columns_of(weight, cols, col_mask)
        along += g * ((tile_of(z, offsets, col_mask[None, :]) - mean) * reciprocal)
        total += g
    if LAYERNORM:
        tl.store(sums + 2 * row, tl.sum(along))
        tl.store(sums + 2 * row + 1, tl.sum(total))
    else:
        tl.store(sums + row, tl.sum(along))


@triton.jit
def grad_apply_kernel(
    dy, z, statistics, sums, weight, out, columns, whole_columns, LAYERNORM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """out = (g - mean(g) - unit mean(g unit)) / deviation with g = weight dy; RMSNorm without mean(g).

    The means are ``sums`` over all ranks, divided by ``whole_columns``. Moves 6 bytes an element: dy, z and out.
    """
    row = tl.program_id(0).to(tl.int64)
    mean, reciprocal = load_statistics(statistics, row, True)
    if LAYERNORM:
        along, total = tl.load(sums + 2 * row) / whole_columns, tl.load(sums + 2 * row + 1) / whole_columns
    else:
        along, total = tl.load(sums + row) / whole_columns, 0.0
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < columns
        offsets = row * columns + cols[None, :]
        unit = (tile_of(z, offsets, col_mask[None, :]) - mean) * reciprocal
        g = tile_of(dy, offsets, col_mask[None, :]) * columns_of(weight, cols, col_mask)
        dz = reciprocal * (g - total - unit * along)
        tl.store(out + offsets, dz.to(out.dtype.element_ty), mask=col_mask[None, :])


@triton.jit
def grad_weights_kernel(
    dy, z, statistics, sum_weight, sum_bias, rows, columns, rows_per_program,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of dy unit and of dy over ``rows_per_program`` rows, [programs, d] each. 4 bytes an element: dy and z."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    d_weight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    d_bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows_per_program, BLOCK_M):
        row = program * rows_per_program + start + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & col_mask[None, :]
        offsets = row[:, None] * columns + cols[None, :]
        mean, reciprocal = load_statistics(statistics, row, row < rows)
        d = tile_of(dy, offsets, mask)
        d_weight += d * ((tile_of(z, offsets, mask) - mean[:, None]) * reciprocal[:, None])
        d_bias += d
    tl.store(sum_weight + program * columns + cols, tl.sum(d_weight, 0), mask=col_mask)
    tl.store(sum_bias + program * columns + cols, tl.sum(d_bias, 0), mask=col_mask)


@triton.jit
def normalize_blocks_kernel(
    z, weight, bias, out, statistics, eps, columns, block_columns, block_pitch,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [T, D] = the norm of whole rows, which z [p, T, d] has in blocks ``block_pitch`` elements apart.

    Moves 4 bytes an element: z and out.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    cols = tl.arange(0, BLOCK_N)
    mask = (cols < columns)[None, :]
    from_block = (cols // block_columns).to(tl.int64) * block_pitch + cols % block_columns
    v = tile_of(z, row[:, None] * block_columns + from_block[None, :], mask)
    w = columns_of(weight, cols, cols < columns)
    b = columns_of(bias, cols, cols < columns) if bias is not None else w
    mean, reciprocal = statistics_of(v, mask, columns, eps, KIND)
    store_statistics(statistics, row, row >= 0, mean, reciprocal)
    y = (v - mean[:, None]) * reciprocal[:, None] * w
    if bias is not None:
        y += b
    tl.store(out + row[:, None] * columns + cols[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def pack_gradient_kernel(
    du, u, weight, bias, packed, sums, rows, columns, block_columns, packed_columns,
    LAYERNORM: tl.constexpr, RANKS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """packed [p, T, packed_columns]: du by blocks of columns, then the sums of du (u - bias) and of weight du.

    The sums [T, n] are stored apart where there is such a tensor. Moves 6 bytes an element: du, u and packed.
    """
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < columns
    offsets = row * columns + cols[None, :]
    d = tl.load(du + offsets, mask=col_mask[None, :], other=0.0)
    unit = tile_of(u, offsets, col_mask[None, :])
    w = columns_of(weight, cols, col_mask)
    if bias is not None:
        unit -= columns_of(bias, cols, col_mask)
    place = (cols // block_columns).to(tl.int64) * rows * packed_columns + row * packed_columns + cols % block_columns
    tl.store(packed + place[None, :], d, mask=col_mask[None, :])
    along = tl.sum(d.to(tl.float32) * unit)
    total = tl.sum(d.to(tl.float32) * w)
    if sums is not None:
        if LAYERNORM:
            tl.store(sums + 2 * row, along)
            tl.store(sums + 2 * row + 1, total)
        else:
            tl.store(sums + row, along)
    else:
        for rank in tl.static_range(RANKS):
            at = packed + (rank * rows + row) * packed_columns + block_columns
            tl.store(at, along)
            if LAYERNORM:
                tl.store(at + 1, total)


def _shape(columns: int) -> dict[str, int]:
    block = min(BLOCK_N, triton.next_power_of_2(columns))
    return {"BLOCK_N": block, "num_warps": max(1, min(8, block // 512))}


def stats(z: Tensor, kind: str) -> Tensor:
    """``sharded.shard_stats``."""
    found = empty_sums(z, kind)
    stats_kernel[(z.shape[0],)](z.contiguous(), found, z.shape[1], kind == "layernorm", **_shape(z.shape[1]))
    return found


def apply(
    z: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, kind: str, out_dtype: torch.dtype
) -> Tensor:
    """``sharded.shard_apply``."""
    out = torch.empty(z.shape, dtype=out_dtype, device=z.device)
    apply_kernel[(z.shape[0],)](z.contiguous(), statistics, weight, bias, out, z.shape[1], **_shape(z.shape[1]))
    return out


def grad_sums(dy: Tensor, z: Tensor, statistics: Tensor, weight: Tensor, kind: str) -> Tensor:
    """``sharded.shard_grad_sums``."""
    found = empty_sums(z, kind)
    grad_sums_kernel[(z.shape[0],)](
        dy.contiguous(), z.contiguous(), statistics, weight, found, z.shape[1], kind == "layernorm",
        **_shape(z.shape[1]),
    )  # fmt: skip
    return found


def grad_weights(dy: Tensor, z: Tensor, statistics: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``sharded.shard_grad_weights``."""
    rows, columns = z.shape
    programs = triton.cdiv(rows, ROWS_PER_PROGRAM)
    partial = z.new_empty((2, programs, columns), dtype=torch.float32)
    grad_weights_kernel[(programs, triton.cdiv(columns, WEIGHTS_N))](
        dy.contiguous(), z.contiguous(), statistics, partial[0], partial[1], rows, columns, ROWS_PER_PROGRAM,
        WEIGHTS_M, WEIGHTS_N, num_warps=4,
    )  # fmt: skip
    d_weight, d_bias = partial.sum(1).unbind(0)
    return d_weight, d_bias


def grad_apply(
    dy: Tensor, z: Tensor, statistics: Tensor, sums: Tensor, weight: Tensor, kind: str, columns: int
) -> Tensor:
    """``sharded.shard_grad_apply``."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad_apply_kernel[(z.shape[0],)](
        dy.contiguous(), z.contiguous(), statistics, sums.contiguous(), weight, out, z.shape[1], columns,
        kind == "layernorm", **_shape(z.shape[1]),
    )  # fmt: skip
    return out


def normalize_blocks(z: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
    """``sharded.normalize_blocks``."""
    ranks, rows, columns = z.shape
    if ranks * columns > MOST_COLUMNS:
        return sharded.normalize_blocks(z, norm)
    if z.stride(2) != 1 or z.stride(1) != columns:
        z = z.contiguous()
    out = z.new_empty((rows, ranks * columns))
    statistics = z.new_empty((rows, 2), dtype=torch.float32)
    block = triton.next_power_of_2(ranks * columns)
    if rows:
        normalize_blocks_kernel[(rows,)](
            z, norm.weight, norm.bias, out, statistics, norm.eps, ranks * columns, columns, z.stride(0),
            KINDS[norm.kind], block, num_warps=_whole_warps(block),
        )  # fmt: skip
    return out, statistics


def pack_gradient(du: Tensor, u: Tensor, norm: NormWeights, ranks: int) -> tuple[Tensor, Tensor | None]:
    """``sharded.pack_gradient``."""
    (rows, columns), numbers = du.shape, 2 if norm.kind == "layernorm" else 1
    if columns > MOST_COLUMNS:
        return sharded.pack_gradient(du, u, norm, ranks)
    beside = du.dtype == torch.float32
    packed = du.new_empty((ranks, rows, columns // ranks + numbers * beside))
    sums = None if beside else empty_sums(du, norm.kind)
    block = triton.next_power_of_2(columns)
    if rows:
        pack_gradient_kernel[(rows,)](
            du.contiguous(), u.contiguous(), norm.weight, norm.bias, packed, sums, rows, columns, columns // ranks,
            packed.shape[2], norm.kind == "layernorm", ranks, block, num_warps=_whole_warps(block),
        )  # fmt: skip
    return packed, sums


def _whole_warps(block: int) -> int:
    return min(16, max(1, block // 512))


SHARDED = ShardedNormKernels(stats, apply, grad_sums, grad_weights, grad_apply, normalize_blocks, pack_gradient)
