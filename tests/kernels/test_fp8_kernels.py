"""FP8 that kernels write: bits in Triton's interpreter and on a GPU, and every backend of add_norm takes it."""

from pathlib import Path

import numpy
import pytest
import torch
from add_norm_checks import BF16, F32, GATES, PATTERNS
from fp8_checks import FORMS, STREAMS, check_fp8, check_quantize, check_transposed, numbers, same
from test_triton import VERSION, pairwise, run_alone

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm.op import fused_add_norm
from megaresnorm.kernels.fp8.formats import (
    BLOCK,
    E4M3,
    E5M2,
    ROW,
    TENSOR,
    TILE,
    dequantize,
    quantize,
    quantize_delayed,
    quantize_transposed,
    scales_of,
)
from megaresnorm.kernels.registry import backends, choose_kernel, kernel_named

load_backends()
HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(
    VERSION < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton takes int() of an array of one element, an error since NumPy 2.4",
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_bits_in_the_interpreter(which):
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which)
    done = run_alone(*options, HERE / "interpreted_fp8.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]


ON_A_CPU = [kernel.backend for kernel in backends("add_norm") if kernel.requires(CPU, BF16) is None]


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[pytest.mark.slow] if name == "compile" else []) for name in ON_A_CPU]
)
def test_every_backend_of_add_norm_on_a_cpu_gives_fp8(backend):
    for form, pattern in zip(FORMS, ("pre, rms", "keel", "none", "post"), strict=True):
        check_fp8(kernel_named("add_norm", backend).function, 3, 200, pattern, "number", "bf16 on fp32", form)


def test_columns_are_multiplied_before_and_the_product_is_rounded():
    x, factor = numbers(9, 40, BF16, bad=False), torch.exp2(torch.arange(40) % 5 - 2.0)
    same(quantize(x, ROW, factor=factor), quantize(x * factor.bfloat16(), ROW))
    x[2] = 1.0  # in the place of numbers whose product is not exact
    assert torch.equal(dequantize(quantize(x, ROW, factor=factor)), dequantize(quantize(x.float() * factor, ROW)))


def test_delayed_scaling_tells_of_its_own_numbers_what_its_codes_do_not():
    x = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    q, own = quantize_delayed(x, E4M3, torch.full((1, 1), 2.0))
    assert own.tolist() == [[3.0]] and dequantize(q).tolist() == [[1.0, -3.0], [0.5, 2.0]]
    q, own = quantize_delayed(200 * x, E4M3, torch.full((1, 1), 400.0))
    assert own.tolist() == [[600.0]] and dequantize(q).tolist() == [[192.0, -448.0], [96.0, 384.0]]
    for bad in (torch.inf, torch.nan):
        x[1, 1] = bad
        assert quantize_delayed(x, E4M3, torch.full((1, 1), 2.0))[0].inverse.isnan().all()


def test_a_scale_of_no_number_is_none_whatever_its_sign():
    nan = torch.tensor([0x7FC00000, -0x400000], dtype=torch.int32).view(F32)
    assert nan.isnan().all() and scales_of(nan, E4M3)[1].isnan().all()


def test_a_transpose_has_scales_of_its_own():
    x = numbers(300, 40, BF16, bad=False)
    same(quantize_transposed(x, BLOCK, E5M2), quantize(x.t().contiguous(), BLOCK, E5M2))
    q = quantize(x, ROW)
    same(quantize_transposed(q, ROW), quantize(dequantize(q, BF16).t().contiguous(), ROW))


def test_which_backend_quantizes():
    assert choose_kernel("fp8_quantize", "auto", CPU, BF16)[0].backend == "reference"
    assert choose_kernel("fp8_quantize", "auto", CUDA, BF16)[0].backend == "triton"


def test_forms_that_no_kernel_has_are_the_reference_s():
    """Of weights, of a tensor that is not known before, and of FP8 with one scale."""
    kernels = kernel_named("fp8_quantize", "triton").implementation
    x = numbers(130, 140, F32, bad=False)
    same(kernels.rows(x, TILE), quantize(x, TILE))
    q = quantize(x, TENSOR)
    same(kernels.transposed(q, TENSOR), quantize_transposed(q, TENSOR))


CALLS = (list(FORMS), list(PATTERNS), list(GATES), list(STREAMS), [192, 1128, 4096, 8192, 12288, 20480])


@pytest.mark.gpu
@pytest.mark.parametrize(("form", "pattern", "gate", "stream", "columns"), pairwise(*CALLS))
def test_a_branch_input_in_fp8_on_a_gpu(form, pattern, gate, stream, columns):
    """Up to 8192 columns what is made again, with fewer norms, has its row in registers as well: one order of sums."""
    kernel, remade = fused_add_norm("triton"), columns <= 8192 or columns > 16384
    out = check_fp8(kernel, 199, columns, pattern, gate, stream, form, remade=remade, device="cuda")
    assert out.branch_input is out.trunk or out.branch_input.stride() == (0, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "columns", "source", "dtype"),
    pairwise(list(FORMS), [40, 1128, 4096, 8192, 22016], [BF16, F32], [E4M3, E5M2]),
)
def test_quantize_on_a_gpu(form, columns, source, dtype):
    check_quantize(kernel_named("fp8_quantize", "triton").implementation, 199, columns, form, source, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "size", "source", "dtype"),
    pairwise(["row", "block", "mx"], [(199, 1128), (4096, 2048)], [BF16, "row", "block", "mx"], [E4M3, E5M2]),
)
def test_quantize_transposed_on_a_gpu(form, size, source, dtype):
    kernels = kernel_named("fp8_quantize", "triton").implementation
    check_transposed(kernels, *size, form, source, dtype, "cuda")
