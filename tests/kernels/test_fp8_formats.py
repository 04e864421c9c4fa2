"""FP8 numbers: scales that are powers of two, rounding to nearest even, and what may be done with codes exactly."""

import math
from itertools import pairwise

import pytest
import torch

from megaresnorm.kernels.fp8.formats import (
    BLOCK,
    E4M3,
    E5M2,
    LARGEST,
    MX,
    ROW,
    TENSOR,
    TILE,
    Form,
    amax_of,
    dequantize,
    exponents,
    quantize,
    quantize_delayed,
    scales,
    scales_of,
    transposed,
)

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
FORMS = (TENSOR, ROW, BLOCK, TILE, MX)
BITS = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}  # of exponent and fraction, and the exponent's bias
SMALLEST_NORMAL, SMALLEST = {E4M3: 2.0**-6, E5M2: 2.0**-14}, {E4M3: 2.0**-9, E5M2: 2.0**-16}
HALF_UNIT = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # largest relative error of a normal number that is rounded to nearest


def number_of(code: int, dtype: torch.dtype) -> float:
    """What a code means, from the definition of the format (OCP 8-bit floating point, section 5)."""
    of_exponent, of_fraction, bias = BITS[dtype]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, fraction = (code & 0x7F) >> of_fraction, code & (2**of_fraction - 1)
    if exponent == 2**of_exponent - 1:
        if dtype == E5M2:
            return sign * math.inf if fraction == 0 else math.nan
        if fraction == 7:
            return math.nan
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias - of_fraction)
    return sign * (1 + fraction / 2**of_fraction) * 2.0 ** (exponent - bias)


def numbers(rows: int, columns: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    """Of all sizes, with rows and blocks that differ, zeros, and a row of them."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-20, 20, (rows, columns), generator=g) / 2 + torch.arange(columns) // 32 % 3)
    x = torch.randn(rows, columns, generator=g) * sizes
    x[rows // 2] = 0.0
    return x.to(dtype)


def spread(scales: torch.Tensor, form: Form, shape: tuple[int, int]) -> torch.Tensor:
    """The scale of every element."""
    for dim, shared in enumerate(form):
        length = shape[dim] if shared is None else shared
        scales = scales.repeat_interleave(length, dim).narrow(dim, 0, shape[dim])
    return scales


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_scale_is_the_largest_power_of_two_that_keeps_amax_within_the_format(dtype):
    """Every exponent of FP32, with the fractions at which the power changes and those beside them."""
    fractions = torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFF], dtype=torch.int32)
    bits = (torch.arange(255, dtype=torch.int32).view(-1, 1) << 23) | fractions
    amax = bits.view(F32).flatten()
    scales, inverse = scales_of(amax, dtype)
    wide, powers = amax.double(), scales.double().log2()
    assert torch.equal(powers, powers.round()) and torch.equal(scales * inverse, torch.ones_like(amax))
    some = wide > 0
    assert (wide * scales.double() <= LARGEST[dtype]).all()
    assert ((2 * wide * scales.double() > LARGEST[dtype]) | (powers == 126))[some].all() and (powers <= 126).all()
    assert (inverse >= 2.0**-126).all()  # normal numbers, which no device flushes to 0
    assert (scales[~some] == 1).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_scales_of_many_fractions(dtype):
    amax = ((130 << 23) | torch.arange(0, 1 << 23, 7, dtype=torch.int32)).view(F32)
    scaled = amax * scales_of(amax, dtype)[0]
    assert scaled.max() <= LARGEST[dtype] and scaled.min() * 2 > LARGEST[dtype]


def test_scales_of_what_is_not_finite_tell_it():
    for dtype in (E4M3, E5M2):
        scales, inverse = scales_of(torch.tensor([torch.inf, torch.nan, 1.0]), dtype)
        assert scales[:2].tolist() == [1.0, 1.0] and inverse.isnan().tolist() == [True, True, False]


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_all_codes_are_read_as_the_format_says(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    want = torch.tensor([number_of(code, dtype) for code in range(256)])
    for wide in (F32, BF16):
        got = codes.to(wide).float()
        assert torch.equal(got.nan_to_num(1e9), want.nan_to_num(1e9))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_is_to_nearest_and_ties_go_to_even(dtype, sign):
    """Every number of a format, the middle of every two, and what is next to each, at scales of 1 and others."""
    table = [value for value in (number_of(code, dtype) for code in range(128)) if math.isfinite(value)]
    middles = [(a + b) / 2 for a, b in pairwise(table)]
    above, below = (torch.nextafter(torch.tensor(middles), torch.tensor(end)) for end in (1e9, -1e9))
    even = [table[i + i % 2] for i in range(len(middles))]  # of two neighbours one has an even code
    given = torch.cat((torch.tensor([*table, *middles]), above, below))
    want = torch.tensor([*table, *even, *table[1:], *table[:-1]])
    for power in (0, 5, -5):
        x = sign * given.view(1, -1) * 2.0**power
        q = quantize(x, TENSOR, dtype)  # its largest number is the format's, so that the scale is the power's
        assert q.inverse.item() == 2.0**power
        assert torch.equal(dequantize(q), sign * want.view(1, -1) * 2.0**power)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", [F32, BF16])
def test_errors_are_at_most_half_a_unit(dtype, form, source):
    x = numbers(150, 200, source)
    q = quantize(x, form, dtype)
    error, wide = (dequantize(q).double() - x.double()).abs(), x.double()
    scaled = wide.abs() / spread(q.inverse, form, x.shape)
    normal = scaled >= SMALLEST_NORMAL[dtype]
    assert (scaled <= LARGEST[dtype]).all() and normal.any() and (~normal & (wide != 0)).any()
    assert (error <= HALF_UNIT[dtype] * wide.abs())[normal].all()
    assert (error <= SMALLEST[dtype] / 2 * spread(q.inverse, form, x.shape))[~normal].all()
    assert dequantize(q)[75].eq(0).all()  # a row of zeros


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "scales"),
    [(TENSOR, (1, 1)), (ROW, (130, 1)), (BLOCK, (130, 3)), (TILE, (2, 3)), (MX, (130, 9)), (Form(None, 1), (1, 272))],
)
def test_scales_are_shared_by_tensors_rows_and_blocks_that_may_not_be_whole(form, scales):
    x = numbers(130, 272)
    q = quantize(x, form)
    assert q.inverse.shape == scales and q.codes.shape == x.shape
    rows, columns = form.rows or 130, form.columns or 272
    for i in range(scales[0]):
        for j in range(0, scales[1], 3):
            block = x[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert amax_of(x, form)[i, j] == block.abs().max()
            assert q.inverse[i, j] == scales_of(block.abs().max().view(1), E4M3)[1]
    assert quantize(x[:0], form).inverse.shape[0] == (1 if form.rows is None else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_are_exact_in_bf16(form, dtype):
    q = quantize(numbers(40, 160), form, dtype)
    assert torch.equal(dequantize(q, BF16).float(), dequantize(q)) and dequantize(q, BF16).dtype == BF16


@pytest.mark.parametrize("form", FORMS)
def test_transposed_numbers_are_the_same(form):
    q = quantize(numbers(130, 144), form)
    turned = transposed(q)
    assert turned.codes.is_contiguous() and turned.form == Form(form.columns, form.rows)
    assert torch.equal(dequantize(turned), dequantize(q).t()) and transposed(turned).form == form


@pytest.mark.parametrize("form", [ROW, BLOCK, MX])
@pytest.mark.parametrize("values_in", [F32, BF16])
def test_codes_that_are_scaled_anew_along_the_other_dimension_are_the_same_numbers(form, values_in):
    """But for those that are no normal numbers there: they lose what is below its smallest."""
    before = dequantize(quantize(numbers(160, 200), form), values_in)
    turned = before.t().contiguous()
    q = quantize(turned, form)
    after, unit = dequantize(q, values_in), spread(q.inverse, form, turned.shape)
    normal = turned.float().abs() >= SMALLEST_NORMAL[E4M3] * unit
    assert torch.equal(after[normal], turned[normal]) and normal.float().mean() > 0.5
    lost = (after.float() - turned.float()).abs()
    assert lost[~normal].any() and (lost <= SMALLEST[E4M3] / 2 * unit).all()


def test_scales_of_weights_folded_into_gradients_are_exact():
    """As under rowwise, where those of w^T lie along the sum."""
    w, dy = quantize(numbers(48, 64, seed=1), ROW), numbers(16, 48, BF16, seed=2)
    folded = dy * w.inverse.t().to(BF16)
    assert torch.equal(folded.double() @ w.codes.double(), dy.double() @ dequantize(w).double())


# --- amax of earlier steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_what_is_larger_than_a_given_amax_becomes_the_largest_number(dtype):
    x = torch.tensor([[0.5, -1.0, 1.7, 1.8, -900.0, torch.inf, -torch.inf]])
    q = quantize(x, TENSOR, dtype, amax=torch.tensor([[1.0]]))
    largest = LARGEST[dtype] * q.inverse.item()
    assert largest == 1.75 and q.inverse.item() == 1.75 / LARGEST[dtype]
    assert dequantize(q).tolist()[0][:3] == [0.5, -1.0, 1.75]  # 1.7 is rounded there
    assert dequantize(q).tolist()[0][3:] == [largest, -largest, largest, -largest]


def test_what_was_not_finite_is_told_by_the_inverse():
    x = numbers(6, 130)
    for form in FORMS:
        assert quantize(x, form).inverse.isfinite().all()
        for bad in (torch.nan, torch.inf, -torch.inf):
            x[2, 3] = bad
            q = quantize(x, form)
            assert not q.inverse.isfinite().all() and not dequantize(q)[2, 3].isfinite()
            assert form == TENSOR or q.inverse.isfinite().any()
            saturated = quantize(x, TENSOR, amax=torch.ones(1, 1))
            assert saturated.inverse.isfinite().all()
            assert quantize_delayed(x, E4M3, torch.ones(1, 1))[0].inverse.isnan().all()
            x[2, 3] = 1.0
    q = quantize(x, TENSOR, amax=torch.ones(1, 1))
    assert torch.equal(quantize_delayed(x, E4M3, torch.ones(1, 1))[0].inverse, q.inverse)


def test_scales_travel_as_exponents_and_what_is_not_finite_arrives_as_nan():
    inverse = torch.tensor([1.0, 0.5, 2.0**-126, 2.0**126, torch.nan, torch.inf])
    got = scales(exponents(inverse))
    assert torch.equal(got[:4], inverse[:4]) and got[4:].isnan().all()
