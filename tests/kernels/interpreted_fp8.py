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


@pytest.mark.parametrize(("form", "pattern", "gate", "stream", "columns", "drops"), pairwise(*CALLS))
def test_a_branch_input_in_fp8(form, pattern, gate, stream, columns, drops):
    out = check_fp8(triton_kernel, 3, columns, pattern, gate, stream, form, drops=drops)
    assert out.branch_input is out.trunk or out.branch_input.stride() == (0, 0)


@pytest.mark.parametrize(("form", "pattern", "stream"), pairwise(list(FORMS), list(PATTERNS), list(STREAMS)))
def test_of_rows_in_blocks_of_columns(form, pattern, stream, monkeypatch):
    interpreted_triton.in_blocks(monkeypatch, 128)
    for columns in (100, 300):
        check_fp8(triton_kernel, 3, columns, pattern, "number", stream, form)
