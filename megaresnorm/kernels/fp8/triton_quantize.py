"""Quantization in Triton: kernels/fp8/formats.py is the specification, bit for bit where numbers are finite.

A program takes a tile of which it has all that shares a scale, so that x is read once and its codes are written once:
three bytes an element of BF16. Rows of more than MAX_ROW columns that share one scale are read twice.

M rows   K columns
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.custom_op import launcher
from megaresnorm.kernels.fp8.formats import E4M3, MX, ROW, TENSOR, TOP, Form, Fp8, Rows, scales_shape
from megaresnorm.kernels.fp8.triton_formats import amax_of, saturated, scale_for, scaled, scales_of, size_of

MAX_ROW = 16384  # columns of a row in registers
TILE, COLUMNS = 4096, 1024  # elements of a program, and its columns where a row is several tiles
WIDE = 4096  # columns that a program reads at a time of a wider row
TOKENS, FEATURES = 128, 64  # rows and columns of a program that transposes
COLUMN_ROWS = 256  # rows of a program that looks for the largest numbers of columns
WHOLE = 1 << 30  # columns that share a scale where a whole row does
AMAXES = 4096  # numbers that are read at a time of the largest of all programs


@triton.jit
def _values_of(x, factor, offsets, mask, cols, col_mask):
    """A tile of x times ``factor``, rounded to x's type, in FP32."""
    v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if factor is not None:
        f = tl.load(factor + cols, mask=col_mask, other=0.0).to(x.dtype.element_ty).to(tl.float32)
        v = (v * f[None, :]).to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x, factor, given, codes, inverse, own, rows, columns,
    GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """codes [M, K] = x times its scales, of which GROUP columns share one (0: all), and ``inverse`` [M, groups].

    The scales are those of ``given`` [M, groups], or of the largest |x|; with GROUP 0 of ``given`` [1], and ``own``
    [programs] is the largest |x| of every program, or None.

    Reads x, writes the codes: 3 bytes an element in BF16, 5 in FP32.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    row_mask, col_mask = row < rows, cols < columns
    mask = row_mask[:, None] & col_mask[None, :]
    offsets = row[:, None] * columns + cols[None, :]
    v = _values_of(x, factor, offsets, mask, cols, col_mask)
    if GROUP == 0:
        y = v * scale_for(given, TOP)
    if own is not None:
        largest = tl.max(tl.max(size_of(v, mask), 1), 0)
        tl.store(own + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), largest.to(tl.float32, bitcast=True))
    if GROUP > 0:
        y = scaled(v, mask, row, row_mask, start, columns, inverse, given, GROUP, TOP, BLOCK_M, BLOCK_N)
    tl.store(codes + offsets, saturated(y, TOP).to(codes.dtype.element_ty), mask=mask)


@triton.jit
def quantize_wide_kernel(x, factor, given, codes, inverse, columns, TOP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same for a scale a row, which is wider than a tile; a program takes one row.

    Reads x twice, the second time from a cache, and writes the codes: 5 bytes an element in BF16.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    sizes = tl.zeros([1], tl.int32)
    if given is None:
        for start in range(0, columns, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_mask = cols < columns
            offsets = row[:, None] * columns + cols[None, :]
            v = _values_of(x, factor, offsets, col_mask[None, :], cols, col_mask)
            sizes = tl.maximum(sizes, tl.max(size_of(v, col_mask[None, :]), 1))
    scales, inverses = scales_of(amax_of(sizes, given, row, row >= 0), TOP)
    tl.store(inverse + row, inverses)
    for start in range(0, columns, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_mask = cols < columns
        offsets = row[:, None] * columns + cols[None, :]
        y = _values_of(x, factor, offsets, col_mask[None, :], cols, col_mask) * scales[:, None]
        tl.store(codes + offsets, saturated(y, TOP).to(codes.dtype.element_ty), mask=col_mask[None, :])


@triton.jit
def _rows_of(
    x, scales, row, row_mask, start, columns, IN_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """A tile of x in FP32, or of BF16 numbers that are codes x times inverse ``scales``, of IN_GROUP columns each."""
    cols = start + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (cols < columns)[None, :]
    offsets = row[:, None] * columns + cols[None, :]
    v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        if IN_GROUP >= BLOCK_N:
            at = row * ((columns + IN_GROUP - 1) // IN_GROUP) + start // IN_GROUP
            v = v * tl.load(scales + at, mask=row_mask, other=0.0)[:, None]
        else:
            groups = (columns + IN_GROUP - 1) // IN_GROUP
            group = start // IN_GROUP + tl.arange(0, BLOCK_N // IN_GROUP)
            found = tl.load(
                scales + row[:, None] * groups + group[None, :],
                mask=row_mask[:, None] & (group < groups)[None, :],
                other=0.0,
            )
            v = tl.reshape(v, [BLOCK_M, BLOCK_N // IN_GROUP, IN_GROUP]) * found[:, :, None]
            v = tl.reshape(v, [BLOCK_M, BLOCK_N])
        v = v.to(tl.bfloat16).to(tl.float32)
    return v, cols, mask


@triton.jit
def transpose_kernel(
    x, scales, given, codes, inverse, rows, columns,
    IN_GROUP: tl.constexpr, GROUP: tl.constexpr, TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """codes [K, M] = the transpose of x times its scales, of which GROUP rows of x share one, and ``inverse``.

    With GROUP 0 a column of x has one, of ``given`` [K]. ``inverse`` is [K, groups]. x is values, or with ``scales``
    codes, which are read as BF16.

    Reads x, writes the codes: 3 bytes an element of BF16, 2 of codes.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    v, cols, mask = _rows_of(x, scales, row, row_mask, tl.program_id(1) * BLOCK_N, columns, IN_GROUP, BLOCK_M, BLOCK_N)
    col_mask = cols < columns
    if GROUP == 0:
        bits = tl.load(given + cols, mask=col_mask, other=0.0).to(tl.int32, bitcast=True)
        found, inverses = scales_of(bits, TOP)
        tl.store(inverse + cols, inverses, mask=col_mask & (tl.program_id(0) + cols * 0 == 0))
        y = v * found[None, :]
    else:
        tiles = tl.reshape(size_of(v, mask), [BLOCK_M // GROUP, GROUP, BLOCK_N])
        found, inverses = scales_of(tl.max(tiles, 1), TOP)
        groups = (rows + GROUP - 1) // GROUP
        group = tl.program_id(0) * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
        at = cols.to(tl.int64)[None, :] * groups + group[:, None]
        tl.store(inverse + at, inverses, mask=(group < groups)[:, None] & col_mask[None, :])
        y = tl.reshape(tl.reshape(v, [BLOCK_M // GROUP, GROUP, BLOCK_N]) * found[:, None, :], [BLOCK_M, BLOCK_N])
    turned = tl.trans(saturated(y, TOP).to(codes.dtype.element_ty))
    offsets = cols.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(codes + offsets, turned, mask=col_mask[:, None] & row_mask[None, :])


@triton.jit(do_not_specialize=["rows"])
def columns_kernel(
    x, scales, partial, rows, columns, rows_per_program,
    IN_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial [programs, K] = the largest |x| of every column over ``rows_per_program`` rows.

    Reads x: 2 bytes an element of BF16, 1 of codes.
    """
    sizes = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    start = tl.program_id(1) * BLOCK_N
    cols = start + tl.arange(0, BLOCK_N)
    for i in range(0, rows_per_program, BLOCK_M):
        row = first + i + tl.arange(0, BLOCK_M)
        v, _cols, mask = _rows_of(x, scales, row, row < rows, start, columns, IN_GROUP, BLOCK_M, BLOCK_N)
        sizes = tl.maximum(sizes, size_of(v, mask))
    largest = tl.max(sizes, 0).to(tl.float32, bitcast=True)
    tl.store(partial + tl.program_id(0).to(tl.int64) * columns + cols, largest, mask=cols < columns)


@triton.jit(do_not_specialize=["count"])
def amax_kernel(found, given, own, inverse, count, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """own [1] = the largest of ``found`` [count]; inverse [1] that of the scale of ``given`` [1], NaN where own is."""
    sizes = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sizes = tl.maximum(sizes, tl.load(found + at, mask=at < count, other=0.0).to(tl.int32, bitcast=True))
    largest = tl.max(sizes, 0)
    _scale, of_given = scales_of(tl.load(given).to(tl.int32, bitcast=True), TOP)
    tl.store(own, largest.to(tl.float32, bitcast=True))
    tl.store(inverse, tl.where((largest >> 23) == 255, float("nan"), of_given))


class Tile(NamedTuple):
    """A program's tile of block_m rows and block_n columns, and its warps of 32 threads."""

    block_m: int
    block_n: int
    warps: int


def tile_of(columns: int, form: Form) -> Tile | None:
    """Tiles of ``quantize_kernel``, each of whole groups; None for rows that do not fit in registers."""
    block_n = triton.next_power_of_2(columns)
    if form != ROW:
        block_n = min(block_n, COLUMNS)
    elif block_n > MAX_ROW:
        return None
    block_m = max(1, TILE // block_n)
    return Tile(block_m, block_n, min(16, max(4, block_m * block_n // 1024)))


def warps_of(form: Form) -> int:
    """Of a program that transposes: a thread has as many registers as it needs for groups of 32 rows."""
    return 16 if form == MX else 8


def group_of(form: Form, columns: int, block_n: int) -> int:
    """GROUP of the kernels for tiles of ``block_n`` columns; more than those for a scale a row of several tiles."""
    if form == TENSOR:
        return 0
    return max(block_n, triton.next_power_of_2(columns)) if form.columns is None else min(form.columns, block_n)


def quantize(
    x: Tensor, form: Form, dtype: torch.dtype = E4M3, *, amax: Tensor | None = None, factor: Tensor | None = None
) -> Fp8:
    """``formats.quantize`` for ROW, BLOCK and MX, and for TENSOR with an amax."""
    codes, inverse = _quantized(x, form, dtype, amax, factor, None)
    if form == TENSOR:
        assert amax is not None
        note_amax(amax, amax, torch.empty_like(amax), inverse, dtype)
    return Fp8(codes, inverse, form)


def quantize_delayed(x: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Fp8, Tensor]:
    """``formats.quantize_delayed``."""
    tile = tile_of(x.shape[1], TENSOR)
    assert tile is not None
    programs = triton.cdiv(x.shape[0], tile.block_m) * triton.cdiv(x.shape[1], tile.block_n)
    found = torch.empty(programs, dtype=torch.float32, device=x.device)
    codes, inverse = _quantized(x, TENSOR, dtype, amax, None, found)
    own = torch.empty_like(inverse)
    note_amax(found, amax, own, inverse, dtype)
    return Fp8(codes, inverse, TENSOR), own


def _quantized(
    x: Tensor, form: Form, dtype: torch.dtype, amax: Tensor | None, factor: Tensor | None, found: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes and inverse scales; those of a tensor are not written yet."""
    x, (rows, columns) = x.contiguous(), x.shape
    codes = torch.empty_like(x, dtype=dtype)
    inverse = x.new_empty(scales_shape(x.shape, form), dtype=torch.float32)
    amax = None if amax is None else amax.contiguous()
    factor = None if factor is None else factor.contiguous()
    if not x.numel():
        return codes, inverse.fill_(1.0)
    top, tile = TOP[dtype], tile_of(columns, form)
    if tile is None:
        launcher(quantize_wide_kernel)[(rows,)](x, factor, amax, codes, inverse, columns, top, WIDE, num_warps=8)
        return codes, inverse
    launcher(quantize_kernel)[(triton.cdiv(rows, tile.block_m), triton.cdiv(columns, tile.block_n))](
        x, factor, amax, codes, inverse, found, rows, columns,
        group_of(form, columns, tile.block_n), top, tile.block_m, tile.block_n, num_warps=tile.warps,
    )  # fmt: skip
    return codes, inverse


def note_amax(found: Tensor, given: Tensor, own: Tensor, inverse: Tensor, dtype: torch.dtype) -> None:
    """Write the largest of ``found``, and the inverse scale of ``given``: see ``amax_kernel``."""
    launcher(amax_kernel)[(1,)](found, given, own, inverse, found.numel(), TOP[dtype], AMAXES, num_warps=8)


def quantize_transposed(x: Rows, form: Form, dtype: torch.dtype = E4M3) -> Fp8:
    """``formats.quantize_transposed`` for ROW, BLOCK and MX.

    With a scale a row of the result x is read twice, the first time for the largest numbers of its columns.
    """
    values, scales, in_form = (x, None, ROW) if isinstance(x, Tensor) else x
    values, (rows, columns) = values.contiguous(), values.shape
    codes = values.new_empty((columns, rows), dtype=dtype)
    inverse = torch.empty(scales_shape(codes.shape, form), dtype=torch.float32, device=codes.device)
    if not values.numel():
        return Fp8(codes, inverse.fill_(1.0), form)
    scales = None if scales is None else scales.contiguous()
    grid = triton.cdiv(rows, TOKENS), triton.cdiv(columns, FEATURES)
    group, given = form.columns or 0, None
    if form == ROW:
        partial = inverse.new_empty((triton.cdiv(rows, COLUMN_ROWS), columns))
        launcher(columns_kernel)[(len(partial), grid[1])](
            values, scales, partial, rows, columns, COLUMN_ROWS, in_form.columns or WHOLE, 32, FEATURES,
            num_warps=4,
        )  # fmt: skip
        given = partial.amax(0)
    launcher(transpose_kernel)[grid](
        values, scales, given, codes, inverse, rows, columns, in_form.columns or WHOLE, group, TOP[dtype],
        TOKENS, FEATURES, num_warps=warps_of(form),
    )  # fmt: skip
    return Fp8(codes, inverse, form)
