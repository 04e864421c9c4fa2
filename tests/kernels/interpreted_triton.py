"""The Triton kernels' numbers in Triton's interpreter, on CPU tensors.

test_triton.py runs this file in a process of its own with TRITON_INTERPRET=1, since Triton decides when it is imported.
The interpreter's casts to BF16 truncate and those to E4M3 neither carry nor saturate (Triton 3.9), so here, and nowhere
in the package, they are replaced by torch's.
"""

import numpy as np
import pytest
import test_sharded
import torch
import triton.runtime.interpreter as interpreter
from add_norm_checks import BF16, DTYPES, F32, GATES, PATTERNS, check, check_fp8, make_norm

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm import op, triton_launch, triton_sharded
from megaresnorm.kernels.add_norm import triton_fp8 as triton_fp8
from megaresnorm.kernels.add_norm.fp8 import norm_quant
from megaresnorm.kernels.add_norm.reference import AddNormArgs, add_norm

load_backends()
triton_kernel = op.fused_add_norm("triton")
_original = interpreter._convert_float
_CASTS = {"bf16": (torch.bfloat16, torch.int16, np.uint16), "fp8e4nv": (torch.float8_e4m3fn, torch.uint8, np.uint8)}


def _convert(data, source, target, rounding=None):
    if str(source) != "fp32" or str(target) not in _CASTS:
        return _original(data, source, target, rounding)
    dtype, integer, unsigned = _CASTS[str(target)]
    return torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(dtype).view(integer).numpy().view(unsigned)


interpreter._convert_float = _convert


FORMS = ("registers", "sums apart", "wide")


@pytest.fixture(params=FORMS)
def kernel(request, monkeypatch):
    """add_norm by the kernels for rows in registers with and without column sums, and for rows in blocks of columns."""
    if request.param != "registers":
        monkeypatch.setattr(triton_launch, "MAX_WITH_SUMS", 0)
    if request.param == "wide":
        in_blocks(monkeypatch, 32)
    return triton_kernel


def in_blocks(monkeypatch, columns):
    """All rows are read so many columns at a time."""
    for limit in ("MAX_FORWARD", "MAX_BACKWARD", "MAX_WITH_SUMS"):
        monkeypatch.setattr(triton_launch, limit, 0)
    for shape in ("WIDE", "WIDE_BACKWARD"):
        monkeypatch.setattr(triton_launch, shape, triton_launch.Shape(1, columns, 4))


def in_turn() -> list:
    """All combinations; but for every pattern in every type of number with one gate they are slow.

    For the kernels of wider rows all are, but for every third of these.
    """
    return [
        pytest.param(
            form, pattern, gate, dtypes, marks=[pytest.mark.slow] if (i + j + k) % 4 or (i + k + m) % m else []
        )
        for form, m in zip(FORMS, (1, 3, 3), strict=True)
        for i, pattern in enumerate(PATTERNS)
        for j, gate in enumerate(GATES)
        for k, dtypes in enumerate(DTYPES)
    ]


@pytest.mark.parametrize(("kernel", "pattern", "gate", "dtypes"), in_turn(), indirect=["kernel"])
def test_values_and_gradients(kernel, pattern, gate, dtypes):
    check(kernel, 5, 40, pattern, gate, dtypes, drops=True)
    if gate == "number":
        check(kernel, 5, 40, pattern, gate, dtypes)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_values_and_gradients_in_fp16(kernel, pattern):
    for gate in ("number", "vector"):
        check(kernel, 5, 40, pattern, gate, "fp16 on fp32")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (1, 192), (199, 64)]
    + [pytest.param(*size, marks=pytest.mark.slow) for size in ((1, 64), (1, 512), (199, 1), (199, 192), (199, 512))],
)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_sizes(rows, columns, dtypes):
    for pattern in ("pre", "pre, rms", "keel"):
        check(triton_kernel, rows, columns, pattern, "vector", dtypes)


def test_wide_rows_over_several_programs(monkeypatch):
    """Column sums in several blocks of columns, and over more rows than one program takes."""
    in_blocks(monkeypatch, 128)
    monkeypatch.setattr(triton_launch, "COLUMNS_ROWS", 16)
    check(triton_kernel, 40, 200, "pre", "vector", "fp32")


def test_more_rows_than_two_to_the_16():
    check(triton_kernel, 70_000, 4, "pre, rms", "number", "bf16", drops=True)


def test_strided_gradients(kernel):
    """Of columns that are a slice of a wider tensor, and of rows in another order."""
    norm = make_norm("rmsnorm", 40, torch.Generator().manual_seed(0))
    x, delta = torch.linspace(-1, 2, 3 * 40).view(3, 40), torch.linspace(2, -3, 3 * 40).view(3, 40)
    gradients = torch.linspace(-1, 1, 3 * 96).view(3, 96)[:, 7:47], torch.linspace(1, 2, 3 * 40).view(40, 3).t()
    found = []
    for function in (add_norm, kernel):
        leaves = [t.clone().requires_grad_() for t in (x, delta)]
        out = function(AddNormArgs(*leaves, alpha=1.5, next_norm=norm, residual_dtype=F32, out_dtype=F32))
        found.append(torch.autograd.grad(out[:2], (*leaves, norm.weight), gradients))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5)


def test_amax_shows_a_value_that_is_not_a_number(kernel):
    x = torch.ones(3, 40)
    x[1, 7] = float("nan")
    assert kernel(
        AddNormArgs(x, residual_dtype=F32, out_dtype=torch.float8_e4m3fn, fp8_scale=torch.tensor(1.0))
    ).amax.isnan()


@pytest.mark.parametrize("pattern", ["pre", "pre, rms", "keel", "none"])
def test_fp8(kernel, pattern):
    check_fp8(kernel, 9, 40, pattern)


def test_empty_and_absent_gradients(kernel):
    norm = make_norm("layernorm", 40, torch.Generator().manual_seed(0))
    for rows in (0, 3):
        for one in (0, 1):
            found = []
            for function in (add_norm, kernel):
                x = torch.linspace(-1, 2, rows * 40).view(rows, 40).requires_grad_()
                out = function(AddNormArgs(x, x * 0.5, alpha=1.5, next_norm=norm, residual_dtype=F32, out_dtype=F32))
                found.append(torch.autograd.grad(out[one].sum(), (x, norm.weight), allow_unused=True))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(b, torch.zeros_like(b) if a is None else a, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtypes", test_sharded.DTYPES)
def test_norms_over_divided_columns(kind, dtypes, monkeypatch):
    monkeypatch.setattr(triton_sharded, "ROWS_PER_PROGRAM", 16)
    for rows, columns, block in ((1, 2, 4096), (37, 24, 4096), (3, 600, 128)):
        monkeypatch.setattr(triton_sharded, "BLOCK_N", block)
        test_sharded.check(triton_sharded.SHARDED, kind, rows, columns, dtypes)
        if dtypes[0] == dtypes[1]:
            test_sharded.check_blocks(triton_sharded.SHARDED, kind, rows, columns, dtypes[0])


@pytest.mark.parametrize(
    "columns", [200, 1100, *(pytest.param(columns, marks=pytest.mark.slow) for columns in (128, 384))]
)
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("whole", [True, False])
def test_norm_quant(columns, kind, whole):
    """Codes and inverse scales those of the reference but for a rounding tie here and there; gradients too."""
    g = torch.Generator().manual_seed(columns)
    x = (3 * torch.randn(9, columns, generator=g)).to(BF16)
    x[3] = 0
    norm = make_norm(kind, columns, g)
    out = add_norm(AddNormArgs(x, next_norm=norm, residual_dtype=BF16, out_dtype=None))
    scale = 448 / out.amax if whole else None
    d = torch.randn(9, columns, generator=g).to(torch.float8_e4m3fn)
    found = []
    for function in (norm_quant, triton_fp8.norm_quant):
        leaf = x.clone().requires_grad_()
        fp8, inverse = function(leaf, norm, out.statistics, scale=scale)
        found.append((fp8, inverse, *torch.autograd.grad(fp8, (leaf, norm.weight), d)))
    (fp8, inverse, dx, dw), (got, got_inverse, got_dx, got_dw) = found
    assert got.shape == (9, columns) and got_inverse.shape == (() if whole else (9, -(-columns // 128)))
    assert (got.float() != fp8.float()).float().mean() < 0.01
    torch.testing.assert_close(got.float(), fp8.float(), rtol=0.13, atol=0.002)
    torch.testing.assert_close(got_inverse, inverse, rtol=1e-5, atol=0)
    torch.testing.assert_close(got_dx, dx, rtol=0.02, atol=0.02)
    torch.testing.assert_close(got_dw, dw, rtol=1e-4, atol=1e-4)
