"""Backends of other packages, against the references: with stand-ins of the packages, and with them on a GPU."""

import importlib
import sys

import pytest
import torch
from add_norm_checks import BF16, DTYPES, F32, FP8, GATES, PATTERNS, check, make_norm
from standins import ADAPTERS, installed

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import activation
from megaresnorm.kernels.add_norm.reference import AddNormArgs
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.kernels.registry import backends, choose_kernel, kernel_named

load_backends()
NORMS = ("te", "apex", "liger", "quack", "torch")
GATED = ("swiglu", "geglu_tanh")
LOSSES = ("liger", "quack")
BY_PACKAGE = [("add_norm", name) for name in NORMS[:-1]] + [("activation", "liger")]
BY_PACKAGE += [("cross_entropy", name) for name in LOSSES]
CUDA = torch.device("cuda")


@pytest.fixture
def packages():
    with installed():
        yield


# --- add_norm ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", NORMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_values_and_gradients_of_add_norm(packages, backend, dtypes):
    kernel = kernel_named("add_norm", backend).function
    for pattern in PATTERNS:
        for gate in (*GATES, "one"):
            alpha = 1.0 if gate == "one" else 2.5
            check(kernel, 19, 96, pattern, gate, dtypes, alpha=alpha, separate=True)
        for gate in ("one", "vector"):
            check(kernel, 19, 96, pattern, gate, dtypes, alpha=1.0, separate=True, drops=True)


@pytest.mark.parametrize(("backend", "fused"), [("liger", list(DTYPES)), ("quack", ["fp32", "bf16 on fp32"])])
def test_a_plain_add_before_an_rmsnorm_is_one_kernel(packages, backend, fused, monkeypatch):
    """Quack normalizes a sum before it is rounded to BF16, so that then the add stays ours."""
    adapter, separate = importlib.import_module(f"megaresnorm.kernels.gpu.{backend}"), []
    add_then = adapter.add_then
    monkeypatch.setattr(adapter, "add_then", lambda normalize: separate.append(1) or add_then(normalize))
    for pattern in ("pre, rms", "pre", "post, rms", "keel", "sandwich"):
        for gate, alpha in (("one", 1.0), ("one", 2.0), ("number", 1.0), ("vector", 1.0), ("no delta", 1.0)):
            for dtypes in DTYPES:
                separate.clear()
                check(adapter.add_norm, 7, 32, pattern, gate, dtypes, alpha=alpha, separate=True)
                one = pattern == "pre, rms" and gate == "one" and alpha == 1.0 and dtypes in fused
                assert len(separate) == (1 if one else 2), (pattern, gate, alpha, dtypes)  # one of check's own


@pytest.mark.parametrize("backend", NORMS)
def test_a_layernorm_without_a_bias(packages, backend):
    norm = make_norm("layernorm", 16, torch.Generator().manual_seed(0))
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for name in ("reference", backend):
        args = AddNormArgs(x, next_norm=norm._replace(bias=None), residual_dtype=F32, out_dtype=F32)
        y = kernel_named("add_norm", name).function(args).branch_input
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, norm.weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", NORMS)
def test_what_a_norm_of_another_package_cannot_do_is_one_line(packages, backend):
    norm = make_norm("rmsnorm", 8, torch.Generator().manual_seed(0))
    x, scale = torch.ones(2, 8), torch.tensor(1.0)
    for out_dtype in (FP8, None):
        args = AddNormArgs(x, x, next_norm=norm, residual_dtype=F32, out_dtype=out_dtype, fp8_scale=scale)
        with pytest.raises(ValueError, match="writes no FP8, statistics or amax; take triton or the reference") as e:
            kernel_named("add_norm", backend).function(args)
        assert "\n" not in str(e.value)


# --- activation -------------------------------------------------------------------------------------------------------


def check_activation(kernel, kind, bias, dtype, device="cpu", rows=37, width=24):
    g = torch.Generator().manual_seed(width)
    h = (3 * torch.randn(rows, 2 * width, generator=g)).to(device, dtype).requires_grad_()
    b = torch.randn(2 * width, generator=g).to(device).requires_grad_() if bias else None
    leaves = [h] if b is None else [h, b]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = kernel(h, b, kind), activation(wide[0], wide[1] if bias else None, kind)
    assert got.dtype == dtype
    d = torch.randn(rows, width, generator=g).to(device, dtype)
    first, again = (torch.autograd.grad(got, leaves, d, retain_graph=True) for _ in range(2))
    wanted = torch.autograd.grad(want, wide, d.double())
    for a, e in ((got, want), (first[0], wanted[0])):
        error, once = (a.double() - e.detach()).norm(), (e.detach().to(dtype).double() - e.detach()).norm()
        # In BF16 Liger rounds the activated gate before the product, and so does the reference; the bias is a third.
        assert error <= (3.0 * once if dtype == BF16 else 1e-6 * e.detach().norm())
    for a, e in zip(first, again, strict=True):
        assert torch.equal(a, e)  # nothing that the backward pass reads was overwritten
    if bias:
        error = (first[1].double() - wanted[1]).abs().max()
        assert first[1].dtype == F32 and error <= (0.2 if dtype == BF16 else 1e-4)


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_values_and_gradients_of_activation(packages, kind, bias, dtype):
    kernel = kernel_named("activation", "liger").function
    check_activation(kernel, kind, bias, dtype)
    check_activation(kernel, kind, bias, dtype, rows=1)  # the halves of one row are contiguous


def test_other_activations_are_refused(packages):
    kernel = kernel_named("activation", "liger")
    assert kernel.kinds == GATED
    with pytest.raises(ValueError, match="has no geglu, only swiglu and geglu_tanh; take another backend"):
        kernel.function(torch.ones(2, 4), None, "geglu")


# --- cross entropy ----------------------------------------------------------------------------------------------------


def check_cross_entropy(kernel, z_loss, scale, dtype, device="cpu", rows=12, vocab=80, padded=96):
    """Of a slice of padded logits. Its relative error in BF16 is that of Liger's rows, which are rounded."""
    g = torch.Generator().manual_seed(rows)
    leaf = (3 * torch.randn(rows, padded, generator=g)).to(device, dtype)
    labels = torch.randint(vocab, (rows,), generator=g).to(device)
    labels[::3], labels[1] = -1, -100
    found = []
    for function in (cross_entropy_sums, kernel):
        x = leaf.clone().requires_grad_()
        nll, objective = function((x * 1.0)[:, :vocab], labels, z_loss, scale)
        assert nll.dtype == objective.dtype == F32
        (objective * 3.0).backward()
        found.append((nll, objective.detach(), x.grad))
    (nll, objective, gradient), (got_nll, got_objective, got) = found
    assert not got_nll.requires_grad
    relative = 1e-5 if dtype == F32 else 2**-8
    torch.testing.assert_close(got_nll, nll.detach(), rtol=relative, atol=0)
    torch.testing.assert_close(got_objective, objective, rtol=relative, atol=0)
    # In BF16 a probability near 1 is rounded before and after 1 is taken from it, and the product is rounded.
    largest = gradient.abs().max().item()
    torch.testing.assert_close(got, gradient, rtol=0, atol=(2e-6 if dtype == F32 else 2**-6) * largest)
    assert not got[::3].any() and not got[1].any() and not got[:, vocab:].any()


@pytest.mark.parametrize("backend", LOSSES)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("scale", [1.0, 0.125])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_values_and_gradients_of_cross_entropy(packages, backend, z_loss, scale, dtype):
    check_cross_entropy(kernel_named("cross_entropy", backend).function, z_loss, scale, dtype)


@pytest.mark.parametrize("backend", LOSSES)
def test_logits_of_any_strides_and_without_a_gradient(packages, backend):
    kernel, labels = kernel_named("cross_entropy", backend).function, torch.tensor([1, -1, 4])
    leaf = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    for function in (cross_entropy_sums, kernel):
        nll, objective = function((leaf * 1.0).t(), labels, 0.01)
        found.append((nll, *torch.autograd.grad(objective, leaf)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(kernel(leaf.t() * 1.0, labels, 0.01)[0], found[0][0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", LOSSES)
def test_a_second_backward_and_a_late_reader_are_noticed(packages, backend):
    kernel = kernel_named("cross_entropy", backend).function
    x = torch.randn(2, 8, requires_grad=True)
    objective = kernel(x * 1.0, torch.tensor([0, 1]), 0.01)[1]
    objective.backward(retain_graph=True)
    with pytest.raises((RuntimeError, AssertionError)):
        objective.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kernel(torch.tanh(x), torch.tensor([0, 1]))[1].backward()


# --- choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "backend"), BY_PACKAGE)
def test_a_package_that_is_missing_is_one_line_and_imports_nothing(op, backend):
    before = set(sys.modules)
    kernel = kernel_named(op, backend)
    if kernel.requires(CUDA, BF16) is None:
        pytest.skip(f"{backend} is installed")
    with pytest.raises(ConfigError, match=rf"kernels.{op}={backend} cannot run on cuda: .* is not installed \(") as e:
        choose_kernel(op, backend, CUDA, BF16)
    assert "\n" not in str(e.value)
    assert not {f"megaresnorm.kernels.{name}" for name in ADAPTERS} & (set(sys.modules) - before)
    assert kernel.requires(torch.device("cpu"), F32) == "made for NVIDIA GPUs"
    for dtype in (torch.float64, torch.float16):
        assert kernel.requires(CUDA, dtype) == f"it computes in FP32, not in {dtype}"


@pytest.mark.parametrize(("op", "backend"), [*BY_PACKAGE, ("add_norm", "torch")])
def test_a_package_that_is_there_runs_by_name_alone(packages, op, backend):
    assert choose_kernel(op, backend, CUDA, BF16)[1] == f"{op} on cuda: {backend} (asked for)"
    assert kernel_named(op, backend).avoid(CUDA, BF16) == "chosen only by name"


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "backend"), [*BY_PACKAGE, ("add_norm", "torch")])
def test_with_the_package_itself_on_a_gpu(op, backend):
    kernel = next(k for k in backends(op) if k.backend == backend)
    if reason := kernel.requires(CUDA, BF16):
        pytest.skip(reason)
    if op == "add_norm":
        for pattern in ("pre", "pre, rms", "keel", "sandwich"):
            for dtypes in DTYPES:
                check(kernel.function, 199, 1024, pattern, "number", dtypes, device="cuda", separate=True)
                check(kernel.function, 199, 1024, pattern, "one", dtypes, alpha=1.0, device="cuda", separate=True)
    for dtype in (F32, BF16) if op == "activation" else ():
        for kind in GATED:
            check_activation(kernel.function, kind, True, dtype, "cuda", rows=199, width=256)
    for dtype in (F32, BF16) if op == "cross_entropy" else ():
        for z_loss in (0.0, 0.01):
            check_cross_entropy(kernel.function, z_loss, 0.125, dtype, "cuda", rows=199, vocab=1000, padded=1024)
