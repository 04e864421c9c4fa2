"""Every backend of add_norm that runs on a CPU, against FP64; and what a call may be given."""

import pytest
import torch
from add_norm_checks import BF16, DTYPES, F32, GATES, PATTERNS, check, make_norm

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm.op import fused_add_norm
from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights, add_norm
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.registry import backends

load_backends()
needs_compiler = pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
fused = fused_add_norm("cpu")


@pytest.fixture(params=build.levels())
def level(request, monkeypatch):
    """The C kernel as compiled for each level of instructions that this processor has."""
    library = build.load(request.param)
    monkeypatch.setattr(build, "load", lambda: library)
    return request.param


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_reference(pattern, gate, dtypes):
    for columns in (7, 192):
        check(add_norm, 19, columns, pattern, gate, dtypes)
    check(add_norm, 19, 40, pattern, gate, dtypes, drops=True)


@needs_compiler
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_cpu(level, pattern, gate, dtypes):
    for columns in (1, 7, 192):
        check(fused, 19, columns, pattern, gate, dtypes)
    check(fused, 19, 40, pattern, gate, dtypes, drops=True)


@needs_compiler
@pytest.mark.parametrize("columns", [1, 2, 3, 64, 192, 760, 1128, 4096, 8192])
@pytest.mark.parametrize("rows", [1, 199])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_cpu_sizes(level, rows, columns, dtypes):
    for pattern in ("pre", "pre, rms", "keel"):
        check(fused, rows, columns, pattern, "vector", dtypes)


@needs_compiler
@pytest.mark.parametrize("columns", [64, 760])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("pattern", ["pre", pytest.param("sandwich", marks=pytest.mark.slow), "post, rms"])
def test_cpu_many_rows(columns, dtypes, pattern):
    check(fused, 8192, columns, pattern, "scalar", dtypes)


@needs_compiler
@pytest.mark.parametrize("columns", [1021, 1040])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_cpu_streams_what_is_larger_than_the_caches(level, columns, dtypes):
    torch.set_num_threads(2)
    check(fused, 2100, columns, "all", "vector", dtypes)


@needs_compiler
def test_cpu_more_rows_than_two_to_the_sixteenth():
    check(fused, 70_001, 8, "pre, rms", "number", "fp32")


@needs_compiler
def test_bf16_rounding_is_that_of_torch(level):
    """Random bit patterns of FP32, NaN and infinity among them."""
    bits = torch.randint(-(2**31), 2**31, (64, 1000), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    x = bits.view(F32)
    got = fused(AddNormArgs(x, residual_dtype=F32, out_dtype=BF16, norm=None, next_norm=None)).branch_input
    stored = fused(AddNormArgs(x, torch.zeros_like(x), residual_dtype=BF16, out_dtype=None)).trunk
    for t in (got, stored):
        torch.testing.assert_close(t, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_empty_input_absent_and_strided_gradients(rows):
    norm = make_norm("layernorm", 8, torch.Generator().manual_seed(0))
    for trunk_too, branch_too in ((True, False), (False, True), (True, True)):
        gradients = []
        for kernel in (add_norm, fused):
            x, delta = (torch.linspace(-1, 2, rows * 8).view(8, rows).t().requires_grad_() for _ in range(2))
            out = kernel(AddNormArgs(x, delta, alpha=1.5, next_norm=norm, residual_dtype=F32, out_dtype=F32))
            outputs = [t for t, there in ((out.trunk, trunk_too), (out.branch_input, branch_too)) if there]
            d = torch.linspace(0, 1, rows * 8).view(8, rows).t()
            gradients.append(
                torch.autograd.grad(outputs, (x, delta, norm.weight, norm.bias), [d] * len(outputs), allow_unused=True)
            )
            assert out.statistics.shape == (rows, 2)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(b, torch.zeros_like(b) if a is None else a, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_gamma_of_zero_and_rows_of_zero():
    x = torch.zeros(3, 16).requires_grad_()
    weight = torch.zeros(16, requires_grad=True)
    out = fused(AddNormArgs(x, next_norm=NormWeights("rmsnorm", weight, None, 1e-5), residual_dtype=F32, out_dtype=F32))
    out.branch_input.sum().backward()
    assert not out.branch_input.any() and not x.grad.any() and not weight.grad.any()


@needs_compiler
def test_sums_do_not_depend_on_the_number_of_threads():
    g = torch.Generator().manual_seed(0)
    norm = make_norm("layernorm", 1024, g)
    x, delta, d = (torch.randn(2000, 1024, generator=g) for _ in range(3))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = [x.clone().requires_grad_(), delta.clone().requires_grad_(), norm.weight, norm.bias]
        out = fused(AddNormArgs(*leaves[:2], next_norm=norm, residual_dtype=F32, out_dtype=F32))
        results.append([out.trunk, out.branch_input, *torch.autograd.grad(out.branch_input, leaves, d)])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_statistics_survive_a_large_mean():
    """Row mean 100 times the deviation: E[x^2] - mean^2 in FP32 would be off by 1e-3."""
    norm = make_norm("layernorm", 4096, torch.Generator().manual_seed(0))
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(1)) + 100
    want = add_norm(AddNormArgs(x.double(), next_norm=norm, residual_dtype=torch.float64, out_dtype=torch.float64))
    got = fused(AddNormArgs(x, next_norm=norm, residual_dtype=F32, out_dtype=F32))
    assert (got.branch_input - want.branch_input).abs().max() < 3e-5
    torch.testing.assert_close(got.statistics.double(), want.statistics, rtol=1e-6, atol=0)


def test_no_other_backend_of_add_norm_runs_on_cpus():
    """One that does belongs into the tests above; torch's own norms are in test_packages.py."""
    cpu = torch.device("cpu")
    runnable = {k.backend for k in backends("add_norm") if k.requires(cpu, F32) is None}
    assert runnable <= {"cpu", "compile", "torch", "reference"}


@pytest.mark.skipif(
    next(k for k in backends("add_norm") if k.backend == "compile").requires(torch.device("cpu"), F32) is not None,
    reason="no C++ compiler",
)
def test_torch_compile_of_the_reference():
    kernel = next(k.function for k in backends("add_norm") if k.backend == "compile")
    for dtypes in ("fp32", "bf16 on fp32"):
        check(kernel, 199, 192, "pre, rms", "number", dtypes)


@needs_compiler
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.float64)}, TypeError, "float64"),
        ({"delta": torch.ones(3, 4)}, ValueError, r"\[\[2, 4\], \[3, 4\]\]"),
        ({"next_norm": NormWeights("rmsnorm", torch.ones(5), None, 1e-5)}, TypeError,
         r"float32 \[5\]; wanted float32 \[4\]"),
        ({"next_norm": NormWeights("rmsnorm", torch.ones(4).bfloat16(), None, 1e-5)}, TypeError, "bfloat16"),
        ({"next_norm": NormWeights("rmsnorm", torch.ones(4), None, 1e-5), "out_dtype": None}, ValueError,
         "needs an out_dtype"),
        ({"out_dtype": torch.float8_e4m3fn}, TypeError, "cannot write"),
        ({"out_dtype": torch.float16}, TypeError, "not torch.float16|cannot write"),
        ({"gate": torch.ones(3)}, ValueError, r"gate has shape \[3\]"),
        ({"next_norm": NormWeights("rmsnorm", torch.ones(8)[::2], None, 1e-5)}, TypeError, "contiguous|float32"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(change, error, message):
    arguments = {"x": torch.ones(2, 4), "delta": torch.ones(2, 4), "residual_dtype": F32, "out_dtype": F32}
    with pytest.raises(error, match=message):
        fused(AddNormArgs(**(arguments | change)))
