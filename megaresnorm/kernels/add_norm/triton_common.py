"""Device functions that the Triton kernels of add_norm share, on masked tiles [m, n] in FP32."""

import triton
import triton.language as tl

from megaresnorm.kernels.fp8.triton_formats import saturated


@triton.jit
def tile_of(ptr, offsets, mask):
    """Load a tile in FP32, 0 where it is masked."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def columns_of(ptr, cols, mask):
    """Load a row of FP32 numbers, one a column, as [1, n]; 0 where it is masked.

    As a tile, so that its threads have the columns that they have of other tiles, and none waits for another.
    """
    return tl.load(ptr + cols[None, :], mask=mask[None, :], other=0.0)


@triton.jit
def statistics_of(v, mask, columns, eps, KIND: tl.constexpr):
    """Mean (0 for RMSNorm) and 1 / sqrt(variance + eps) of every row, in two passes over registers.

    The variance of RMSNorm is the mean square. KIND is 1 for RMSNorm and 2 for LayerNorm.
    """
    if KIND == 2:
        mean = tl.sum(v, 1) / columns
        centred = tl.where(mask, v - mean[:, None], 0.0)
    else:
        mean = tl.sum(v, 1) * 0.0
        centred = v
    variance = tl.sum(centred * centred, 1) / columns
    return mean, tl.div_rn(variance * 0.0 + 1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def normalized(v, mean, reciprocal, weight, bias, cols, col_mask):
    """(v - mean) * reciprocal * weight + bias."""
    y = (v - mean[:, None]) * reciprocal[:, None] * columns_of(weight, cols, col_mask)
    if bias is not None:
        y += columns_of(bias, cols, col_mask)
    return y


@triton.jit
def store_statistics(ptr, row, row_mask, mean, reciprocal):
    """Store mean and 1 / deviation of every row into [M, 2]."""
    tl.store(ptr + 2 * row, mean, mask=row_mask)
    tl.store(ptr + 2 * row + 1, reciprocal, mask=row_mask)


@triton.jit
def load_statistics(ptr, row, row_mask):
    """Load mean and 1 / deviation of every row from [M, 2]."""
    return tl.load(ptr + 2 * row, mask=row_mask, other=0.0), tl.load(ptr + 2 * row + 1, mask=row_mask, other=0.0)


@triton.jit
def gate_of(gate, scale, cols, col_mask, GATE: tl.constexpr):
    """The gate as a factor [1, n] of tiles: a number (GATE 0, ``scale``), a learned number (1) or vector (2)."""
    if GATE == 2:
        factor = columns_of(gate, cols, col_mask)
    elif GATE == 1:
        factor = tl.load(gate + cols * 0, mask=col_mask, other=0.0)[None, :]
    else:
        factor = (cols * 0 + scale)[None, :]
    return factor


@triton.jit
def _mix32(h):
    """kernels/dropout.py: a bijection of 32-bit numbers in which every input bit moves every output bit."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def hash_of_rows(bits, numbers, row, row_mask):
    """The rows' part of the mask of dropout (kernels/dropout.py), in 32 bits.

    ``bits`` is the key, and ``numbers`` [M] are the rows' global numbers; both are int64.
    """
    number = tl.load(numbers + row, mask=row_mask, other=0)
    return _mix32(_mix32(number.to(tl.uint32) ^ _mix32((number >> 32).to(tl.uint32))) ^ bits.to(tl.uint32))


@triton.jit
def kept(bits, row_hash, cols, first_column, THRESHOLD: tl.constexpr):
    """Which elements of a tile dropout keeps; ``first_column`` is the global number of column 0."""
    column_hash = _mix32((cols + first_column).to(tl.uint32) ^ (bits >> 32).to(tl.uint32))
    return _mix32(row_hash[:, None] ^ column_hash[None, :]) >= tl.full([1, 1], THRESHOLD, tl.uint32)


@triton.jit
def factors_of(
    gate, scale, key, numbers, factor, row, row_mask, cols, col_mask, first_column,
    GATE: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    """What a tile of the branch is multiplied by: its gate, and with a THRESHOLD the mask of dropout and ``factor``."""
    found = gate_of(gate, scale, cols, col_mask, GATE)
    if THRESHOLD:
        bits = tl.load(key)
        row_hash = hash_of_rows(bits, numbers, row, row_mask)
        found = tl.where(kept(bits, row_hash, cols, first_column, THRESHOLD), found * factor, 0.0)
    return found


@triton.jit
def store_pair(coefficients, row, row_mask, along, average, PLACE: tl.constexpr):
    """Store mean(g unit) and mean(g) of every row for the norm at PLACE: 0 the branch's, 1 the sum's, 2 the next."""
    at = coefficients + 6 * row + 2 * PLACE
    tl.store(at, along, mask=row_mask)
    tl.store(at + 1, average, mask=row_mask)


@triton.jit
def store_codes(codes, offsets, mask, y):
    """Store y, which has been scaled, in E4M3.

    Eight codes a thread, as many as of BF16 numbers: the compiler gives all tiles of a kernel the layout of the widest
    accesses, and with sixteen a row would be summed in another order than where its branch input is stored in BF16.
    """
    tl.store(tl.max_contiguous(codes + offsets, [1, 8]), saturated(y, 8).to(codes.dtype.element_ty), mask=mask)
