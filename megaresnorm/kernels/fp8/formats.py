"""FP8 tensors: codes of one byte, and scales that rows, blocks or the whole tensor share.

Every scale is a power of two. Then scaling is exact, and so is what is made of codes in BF16 or FP32; an element is
rounded as the format rounds it, whatever its scale; and codes that are scaled anew for a product along the other
dimension are the same numbers again, but for those that fall below the smallest normal one.

M rows   K columns, along which a product sums   B columns or rows that share a scale
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
TOP = {E4M3: 8, E5M2: 15}  # both largest numbers are 1.75 times 2 to this power
_BIAS, _FRACTION, _THREE_QUARTERS = 127, 23, 0x600000  # of FP32: exponents begin there; the bits of 1.75's fraction
_DEEPEST = 126  # a scale of more than 2^126 would have an inverse that is no normal number


class Form(NamedTuple):
    """What shares a scale: so many rows and columns; None: all.

    Scales of [M, K] are [ceil(M / rows), ceil(K / columns)], and 1 where that is None.
    """

    rows: int | None
    columns: int | None

    def spans(self, dim: int) -> bool:
        """Whether a scale is shared along a whole dimension, and so by ranks over which it is sharded."""
        return self[dim] is None

    def divides(self, size: int) -> bool:
        """Whether so many columns of a rank begin and end with columns that share scales."""
        return self.columns is not None and size % self.columns == 0

    @property
    def transposed(self) -> "Form":
        """The form of the transposed tensor, with the scales transposed."""
        return Form(self.columns, self.rows)


TENSOR, ROW, BLOCK, TILE, MX = Form(None, None), Form(1, None), Form(1, 128), Form(128, 128), Form(1, 32)


class Fp8(NamedTuple):
    """Numbers in FP8: codes times inverse scales.

    Attributes:
        codes: [M, K], float8_e4m3fn or float8_e5m2.
        inverse: FP32, of the form. Not finite where one of the numbers was not, which codes do not tell.
        form: what shares a scale.
    """

    codes: Tensor
    inverse: Tensor
    form: Form

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and inverse scales."""
        return self.codes, self.inverse


Rows = Tensor | Fp8  # what a product reads: values [M, K], or these in FP8


def tensors_of(rows: Rows) -> tuple[Tensor, ...]:
    """The tensors that rows consist of."""
    return (rows,) if isinstance(rows, Tensor) else rows.tensors


def rows_of(tensors: tuple[Tensor, ...], form: Form | None) -> Rows:
    """The rows that consist of these tensors; the form is that of FP8, None for values."""
    return tensors[0] if form is None else Fp8(tensors[0], tensors[1], form)


class Fp8Output(NamedTuple):
    """How a kernel writes a tensor [M, K] in FP8 for a product along K.

    Attributes:
        form: what shares a scale; TENSOR only with an amax.
        amax: FP32 [1, 1], of earlier steps; larger elements become the largest number. None: the values' own.
    """

    form: Form
    amax: Tensor | None = None


def scales_of(amax: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest power of two that keeps amax within a format, and its inverse.

    Args:
        amax: FP32, not negative.

    Returns:
        Scales and inverse scales, FP32: 1 where amax is 0; the inverse is NaN where amax is not finite.

    >>> [scale.tolist() for scale in scales_of(torch.tensor([0.0, 224.0, 225.0, torch.inf]), E4M3)]
    [[1.0, 2.0, 1.0, 1.0], [1.0, 0.5, 1.0, nan]]
    """
    bits = amax.view(torch.int32) & 0x7FFFFFFF  # a NaN may have a sign
    exponent = bits >> _FRACTION
    power = (TOP[dtype] + _BIAS) - exponent - ((bits & ((1 << _FRACTION) - 1)) > _THREE_QUARTERS).int()
    power = torch.where((bits == 0) | (exponent == 255), 0, power.clamp(max=_DEEPEST))
    scales = ((_BIAS + power) << _FRACTION).view(torch.float32)
    inverse = ((_BIAS - power) << _FRACTION).view(torch.float32)
    return scales, torch.where(exponent == 255, torch.nan, inverse)


def amax_of(x: Tensor, form: Form) -> Tensor:
    """The largest |x| that each scale is for, FP32, shaped as the scales are; NaN where there is one.

    Args:
        x: [M, K].
    """
    if not x.numel():
        return x.new_zeros(scales_shape(x.shape, form), dtype=torch.float32)
    size = x.abs()
    if form == TENSOR:
        return size.amax().float().view(1, 1)
    if form == ROW:
        return size.amax(1, keepdim=True).float()
    missing = [-length % (shared or 1) for length, shared in zip(x.shape, form, strict=True)]
    padded = F.pad(size, (0, missing[1], 0, missing[0])) if any(missing) else size
    return _in_blocks(padded, form).amax((1, 3)).float()


def quantize(
    x: Tensor,
    form: Form,
    dtype: torch.dtype = E4M3,
    *,
    amax: Tensor | None = None,
    factor: Tensor | None = None,
) -> Fp8:
    """x in FP8, every element rounded to nearest, ties to even.

    Args:
        x: [M, K] in BF16 or FP32.
        amax: FP32, what the scales are for, in their shape; larger elements become the largest number of the format.
            None: that of x.
        factor: FP32 [K], by which the columns of x are multiplied before, in the type of x, which is exact for powers
            of two; None: they are not.
    """
    if factor is not None:
        x = x * factor.to(x.dtype)
    scales, inverse = scales_of(amax_of(x, form) if amax is None else amax, dtype)
    y = _times(x, scales, form)  # in x's type: exact, but for what rounds to zero afterwards
    if amax is not None:
        y = y.clamp_(-LARGEST[dtype], LARGEST[dtype])
    return Fp8(y.to(dtype), inverse, form)


def quantize_delayed(x: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Fp8, Tensor]:
    """x in FP8 with the one scale of an amax of earlier steps (delayed scaling), and the largest |x|.

    Args:
        amax: FP32 [1, 1]; larger elements become the largest number of the format.

    Returns:
        x in FP8, whose inverse scale is NaN where an element was not finite, which saturation would hide; and FP32
        [1, 1].
    """
    own, q = amax_of(x, TENSOR), quantize(x, TENSOR, dtype, amax=amax)
    return q._replace(inverse=torch.where(own.isfinite(), q.inverse, torch.nan)), own


def quantize_transposed(x: Rows, form: Form, dtype: torch.dtype = E4M3) -> Fp8:
    """The transpose of x [M, K] in FP8 [K, M], with scales of its own: for a product that sums along M.

    Args:
        x: values, or FP8, which is read as BF16.
    """
    return quantize((dequantize(x, torch.bfloat16) if isinstance(x, Fp8) else x).t().contiguous(), form, dtype)


def dequantize(q: Fp8, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [M, K]; exact in FP32 and in BF16."""
    return _times(_decoded(q.codes, dtype), q.inverse, q.form)


def transposed(q: Fp8) -> Fp8:
    """The transposed numbers, with the scales that they have."""
    return Fp8(q.codes.view(torch.uint8).t().contiguous().view(q.codes.dtype), q.inverse.t(), q.form.transposed)


def exponents(inverse: Tensor) -> Tensor:
    """Scales, which are powers of two or not finite, as a byte each, for sending."""
    return ((inverse.view(torch.int32) >> _FRACTION) & 0xFF).to(torch.uint8)


def scales(exponents: Tensor) -> Tensor:
    """The scales of ``exponents``; what was not finite is NaN."""
    bits = exponents.int()
    return ((bits << _FRACTION) | ((bits == 255).int() << (_FRACTION - 1))).view(torch.float32)


def _decoded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes as numbers. On CPUs torch converts E4M3 one by one, which takes six times as long as a table."""
    if codes.is_cpu and codes.dtype == E4M3 and dtype in _TABLES:
        return _TABLES[dtype].index_select(0, codes.reshape(-1).view(torch.uint8).int()).view(codes.shape)
    return codes.to(dtype)


_CODES = torch.arange(256, dtype=torch.uint8).view(E4M3)
_TABLES = {dtype: _CODES.to(dtype) for dtype in (torch.float32, torch.bfloat16)}


def _times(x: Tensor, scales: Tensor, form: Form) -> Tensor:
    """x [M, K], each element times its scale."""
    scales = scales.to(x.dtype)
    if form.rows in (None, 1) and form.columns in (None, 1):
        return x * scales
    if all(length % (shared or 1) == 0 for length, shared in zip(x.shape, form, strict=True)):
        return (_in_blocks(x, form) * scales[:, None, :, None]).view(x.shape)
    for dim, shared in enumerate(form):
        if shared not in (None, 1):
            scales = scales.repeat_interleave(shared, dim).narrow(dim, 0, x.shape[dim])
    return x * scales


def _in_blocks(x: Tensor, form: Form) -> Tensor:
    """[M, K] -> [M / rows, rows, K / columns, columns]."""
    return x.unflatten(1, (-1, form.columns or x.shape[1])).unflatten(0, (-1, form.rows or x.shape[0]))


def scales_shape(shape: tuple[int, ...], form: Form) -> tuple[int, int]:
    """The shape of the scales of [M, K]."""
    rows, columns = (1 if shared is None else -(-size // shared) for size, shared in zip(shape, form, strict=True))
    return rows, columns
