"""The numbers of activation, rotary and loss in Triton's interpreter, on CPU tensors.

test_gpu_ops.py runs this file in a process of its own with TRITON_INTERPRET=1. Casts to BF16 are replaced as in
interpreted_triton.py, which does that when it is imported.
"""

import interpreted_triton  # noqa: F401
import pytest
import torch
from loss_checks import FORMS, check_loss
from ops_checks import FLOATS, KINDS, WITHOUT_C, check_activation, check_rotary
from test_triton import pairwise

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import activation, fused_activation
from megaresnorm.kernels.cross_entropy import LogitForm, LossOfPieces, torch_pieces
from megaresnorm.kernels.gpu import activation as kernels
from megaresnorm.kernels.gpu import cross_entropy as loss
from megaresnorm.kernels.rotary import fused_rotary

load_backends()
activate, rotary = fused_activation("triton"), fused_rotary("triton")
ACTIVATIONS = (KINDS, [False, True], [*FLOATS, *WITHOUT_C], [(5, 40), (133, 17), (9, 300), (0, 8)], [False, True])
HEADS = [(4, 4, 16), (4, 2, 80), (9, 1, 20)]
ROTARIES = (HEADS, [None, "rmsnorm", "layernorm"], ["none", "row", "batch", "partial"], [*FLOATS, *WITHOUT_C])


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


LOSSES = (
    list(FORMS),
    [torch.float32, torch.bfloat16, torch.float16],
    [0.0, 1e-2],
    [1, 2],
    [(5, 24), (4, 600), (2, 70)],
)


@pytest.mark.parametrize(("form", "dtype", "z_loss", "ranks", "size"), pairwise(*LOSSES))
def test_loss(form, dtype, z_loss, ranks, size, monkeypatch):
    monkeypatch.setattr(loss, "GROUPS", 32)  # 256 columns in a block
    check_loss(loss.pieces, *size, form, dtype, z_loss, ranks)


def test_loss_of_nothing_of_strided_rows_and_of_numbers_that_are_none():
    form = LogitForm(20)
    for rows in (0, 3):
        found = []
        for pieces in (torch_pieces, loss.pieces):
            leaf = torch.linspace(-2, 5, 3 * 48).view(3, 48)[:rows].requires_grad_()
            nll, objective = LossOfPieces(pieces, form)((leaf * 1.0)[:, :24], torch.tensor([3, -1, 19])[:rows])
            found.append((nll, torch.autograd.grad(objective, leaf)[0]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    for bad in (float("nan"), float("inf")):
        outputs = torch.ones(2, 20)
        outputs[0, 4] = bad
        nll = [LossOfPieces(loss.pieces, form)(outputs.clone(), torch.tensor(y))[0] for y in ([1, 2], [-1, 2])]
        assert not nll[0].isfinite() and nll[1].isfinite()
