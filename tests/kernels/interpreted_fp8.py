"""FP8 by the Triton kernels in Triton's interpreter, on CPU tensors.

test_fp8.py runs this file in a process of its own with TRITON_INTERPRET=1. Casts are replaced as in
interpreted_triton.py, which does that when it is imported.
"""

import interpreted_triton
import pytest
from add_norm_checks import BF16, F32, GATES, PATTERNS
from fp8_checks import FORMS, STREAMS, check_fp8, check_quantize, check_transposed
from test_triton import pairwise

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm import op
from megaresnorm.kernels.fp8 import triton_quantize
from megaresnorm.kernels.fp8.formats import E4M3, E5M2
from megaresnorm.kernels.registry import kernel_named

load_backends()
triton_kernel = op.fused_add_norm("triton")
kernels = kernel_named("fp8_quantize", "triton").implementation
CALLS = (list(FORMS), list(PATTERNS), list(GATES), list(STREAMS), [32, 200, 1000], [False, True])
SLOW = pytest.mark.slow


def in_turn(*factors, every):
    """A cover of all pairs; but for every so many of them they are slow."""
    return [pytest.param(*c, marks=[SLOW] if i % every else []) for i, c in enumerate(pairwise(*factors))]


@pytest.mark.parametrize(("form", "pattern", "gate", "stream", "columns", "drops"), in_turn(*CALLS, every=3))
def test_a_branch_input_in_fp8(form, pattern, gate, stream, columns, drops):
    """The backward pass is the same for all forms."""
    out = check_fp8(
        triton_kernel, 2, columns, pattern, gate, stream, form, drops=drops, gradients=form == "row" and columns == 200
    )
    assert out.branch_input is out.trunk or out.branch_input.stride() == (0, 0)


@pytest.mark.parametrize(("form", "pattern", "stream"), in_turn(list(FORMS), list(PATTERNS), list(STREAMS), every=3))
def test_of_rows_in_blocks_of_columns(form, pattern, stream, monkeypatch):
    interpreted_triton.in_blocks(monkeypatch, 128)
    for columns in (100, 300):
        check_fp8(triton_kernel, 2, columns, pattern, "number", stream, form, gradients=False)


SOURCES = ([BF16, F32], [E4M3, E5M2])


@pytest.mark.parametrize(("form", "columns", "source", "dtype"), pairwise(list(FORMS), [20, 200, 1000], *SOURCES))
def test_quantize(form, columns, source, dtype):
    check_quantize(kernels, 9, columns, form, source, dtype)


@pytest.mark.parametrize("source", SOURCES[0])
def test_quantize_rows_wider_than_registers(source, monkeypatch):
    monkeypatch.setattr(triton_quantize, "MAX_ROW", 64)
    monkeypatch.setattr(triton_quantize, "WIDE", 128)
    check_quantize(kernels, 9, 300, "row", source)


@pytest.mark.parametrize(
    ("form", "size", "source", "dtype"),
    pairwise(["row", "block", "mx"], [(7, 70), (300, 40)], [BF16, "row", "block", "mx"], [E4M3, E5M2]),
)
def test_quantize_transposed(form, size, source, dtype, monkeypatch):
    monkeypatch.setattr(triton_quantize, "COLUMN_ROWS", 64)
    check_transposed(kernels, *size, form, source, dtype)


def test_quantize_nothing():
    for form in FORMS:
        check_quantize(kernels, 0, 40, form)
        if form != "tensor":
            check_transposed(kernels, 0, 40, form)
