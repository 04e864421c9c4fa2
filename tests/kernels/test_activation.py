"""GELU and SwiGLU in C against FP64, for every level of instructions."""

import pytest
import torch

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import activation, fused_activation
from megaresnorm.kernels.cpu import build

F32, BF16 = torch.float32, torch.bfloat16
load_backends()
cpu_activation = fused_activation("cpu")
pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")


@pytest.fixture(params=build.levels())
def level(request, monkeypatch):
    library = build.load(request.param)
    monkeypatch.setattr(build, "load", lambda: library)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 33), (700, 128), (0, 8)])
def test_values_and_gradients(level, kind, bias, dtype, rows, width):
    g = torch.Generator().manual_seed(rows)
    columns = 2 * width if kind == "swiglu" else width
    h = (3 * torch.randn(rows, columns, generator=g)).to(dtype).requires_grad_()
    b = torch.randn(columns, generator=g).requires_grad_() if bias else None
    leaves = [h] if b is None else [h, b]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    got, want = cpu_activation(h, b, kind), activation(wide[0], wide[1] if bias else None, kind)
    d = torch.randn(rows, width, generator=g).to(dtype)
    gradients = torch.autograd.grad(got, leaves, d)
    wanted = torch.autograd.grad(want, wide, d.double())
    assert got.dtype == dtype
    for a, e in ((got, want), (gradients[0], wanted[0])):
        once = (e.detach().to(dtype).double() - e.detach()).norm()
        absolute = 5e-7 * (1 + e.detach().abs().max().item() if rows else 1)
        error = (a.double() - e.detach()).abs()
        assert error.norm() <= 1.5 * once if dtype == BF16 else (error <= absolute).all()
    if bias:
        assert gradients[1].dtype == F32
        torch.testing.assert_close(gradients[1].double(), wanted[1], rtol=0, atol=1e-5 * max(1, rows**0.5) * 3)


def test_far_out_it_is_zero_or_the_identity(level):
    x = torch.tensor([[-200.0, -20.0, 0.0, 20.0, 200.0, float("nan")]], requires_grad=True)
    y = cpu_activation(x, None, "gelu")
    assert y[0, :5].tolist() == [0.0, 0.0, 0.0, 20.0, 200.0] and y[0, 5].isnan()
    (d,) = torch.autograd.grad(y[0, :5].sum(), x)
    assert d[0, [0, 1, 2, 3, 4]].tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    gate = torch.tensor([[-200.0, 200.0, 1.0, 1.0]])
    assert cpu_activation(gate, None, "swiglu").tolist() == [[0.0, 200.0]]


def test_strided_input(level):
    h = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    d = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).t()
    for kind in ("gelu", "swiglu"):
        found = []
        for function, leaf in ((cpu_activation, h.clone()), (activation, h.double())):
            leaf.requires_grad_()
            y = function(leaf.t(), None, kind)
            dy = (d if kind == "swiglu" else torch.cat((d, d), dim=1)).to(y.dtype)
            found.append((y.double(), torch.autograd.grad(y, leaf, dy)[0].double()))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_reference_sums_the_gradient_of_a_bias_in_fp32():
    h, b = torch.randn(4000, 8).to(BF16), torch.zeros(8, requires_grad=True)
    (got,) = torch.autograd.grad(activation(h, b, "gelu").float().sum(), b)
    (want,) = torch.autograd.grad(activation(h.double(), b.double(), "gelu").sum(), b)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=0)
    assert (got != got.bfloat16()).any()


@pytest.mark.parametrize(
    ("h", "bias", "kind", "error", "message"),
    [
        (torch.ones(2, 2, dtype=torch.float64), None, "gelu", TypeError, "float64"),
        (torch.ones(2, 4), torch.ones(3), "gelu", TypeError, r"\[3\]; wanted float32 \[4\]"),
        (torch.ones(2, 4), torch.ones(8)[::2], "gelu", TypeError, "contiguous"),
        (torch.ones(2, 3), None, "swiglu", ValueError, "even"),
        (torch.ones(2, 4), None, "relu", ValueError, "relu"),
        (torch.ones(2, 4, device="meta"), torch.ones(4), "gelu", ValueError, "run on CPU tensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(h, bias, kind, error, message):
    if h.is_meta:
        assert cpu_activation(h, None, kind).is_meta  # shapes alone
        return
    with pytest.raises(error, match=message):
        cpu_activation(h, bias, kind)
