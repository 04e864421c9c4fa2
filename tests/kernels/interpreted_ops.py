"""The numbers of activation and rotary in Triton's interpreter, on CPU tensors.

test_gpu_ops.py runs this file in a process of its own with TRITON_INTERPRET=1. Casts to BF16 are replaced as in
interpreted_triton.py, which does that when it is imported.
"""

import interpreted_triton  # noqa: F401
import pytest
import torch
from ops_checks import FLOATS, KINDS, check_activation, check_rotary
from test_triton import pairwise

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import activation, fused_activation
from megaresnorm.kernels.gpu import activation as kernels
from megaresnorm.kernels.rotary import fused_rotary

load_backends()
activate, rotary = fused_activation("triton"), fused_rotary("triton")
ACTIVATIONS = (KINDS, [False, True], list(FLOATS), [(5, 40), (133, 17), (9, 300), (0, 8)], [False, True])
HEADS = [(4, 4, 16), (4, 2, 80), (9, 1, 20)]
ROTARIES = (HEADS, [None, "rmsnorm", "layernorm"], ["none", "row", "batch", "partial"], list(FLOATS))


@pytest.mark.parametrize(("kind", "bias", "dtype", "size", "strided"), pairwise(*ACTIVATIONS))
def test_activation(kind, bias, dtype, size, strided):
    check_activation(activate, *size, kind, bias, dtype, strided=strided)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_far_out(kind):
    """It is zero or the identity there, not NaN; where it is NaN it shows it."""
    x = torch.tensor([[-1e4, -200.0, 0.0, 20.0, 200.0, 1e4]])
    gated = kind in kernels.GATED
    x = torch.cat((x, torch.ones_like(x)), dim=1) if gated else x
    found = []
    for function in (activate, activation):
        leaf = x.clone().requires_grad_()
        y = function(leaf, None, kind)
        found.append((y, torch.autograd.grad(y.sum(), leaf)[0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-30)
    assert activate(torch.full((1, 2), float("nan")), None, kind).isnan().all()


def test_activation_of_more_rows_than_two_to_the_16(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_M", 8192)  # programs take the interpreter's time
    monkeypatch.setattr(kernels, "BLOCK_N", 2)
    check_activation(activate, 70_000, 2, "swiglu", True, "bf16")


@pytest.mark.parametrize(("heads", "norm", "tables", "dtype"), pairwise(*ROTARIES))
def test_rotary(heads, norm, tables, dtype):
    check_rotary(rotary, *heads, norm, tables, dtype)


@pytest.mark.parametrize("norm", [None, "layernorm"])
def test_rotary_of_several_blocks_strided_and_of_nothing(norm):
    check_rotary(rotary, 3, 1, 64, norm, "row", "bf16", batch=3, seq=50)
    check_rotary(rotary, 2, 2, 16, norm, "batch", "fp32", strided=True)
    check_rotary(rotary, 2, 1, 16, norm, "row", "fp32", seq=0)


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("norm", [None, "rmsnorm"])
def test_rotary_without_some_gradients(given, norm):
    check_rotary(rotary, 3, 1, 16, norm, "row", "fp32", given=given)


def test_rotary_of_more_tokens_than_two_to_the_16():
    check_rotary(rotary, 1, 1, 2, None, "row", "fp32", batch=2, seq=35_000)
