"""The loss whose gradient takes the logits' place, against the reference."""

import pytest
import torch

from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.cross_entropy import cpu_cross_entropy
from megaresnorm.kernels.cross_entropy import (
    CACHED_ELEMENTS,
    LogitForm,
    LossOfPieces,
    _LossOfPieces,
    chunked_cross_entropy,
    cross_entropy_sums,
    torch_pieces,
)

KERNELS = [chunked_cross_entropy] + ([cpu_cross_entropy] if build.unavailable() is None else [])
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("rows", [1, 5, 2 * (CACHED_ELEMENTS // 3001) + 3])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("chosen", KERNELS)
def test_values_and_gradients(chosen, rows, z_loss, ignored, dtype):
    if chosen is cpu_cross_entropy and dtype == torch.float64:
        with pytest.raises(TypeError, match="float64"):
            chosen(torch.ones(1, 2, dtype=dtype), torch.zeros(1, dtype=torch.long))
        return
    g = torch.Generator().manual_seed(rows)
    leaf = (3 * torch.randn(rows, 3001, generator=g)).to(dtype)
    labels = torch.randint(3001, (rows,), generator=g)
    if ignored:
        labels[::2] = -1
    found = []
    for kernel in (cross_entropy_sums, chosen):
        x = leaf.clone().requires_grad_()
        nll, objective = kernel(x * 1.0, labels, z_loss)
        (objective / 7).backward()
        found.append((nll.item(), objective.item(), x.grad))
    (nll, objective, want), (got_nll, got_objective, got) = found
    assert got_nll == pytest.approx(nll, rel=1e-6, abs=1e-6) and got_objective == pytest.approx(
        objective, rel=1e-6, abs=1e-6
    )
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])
    assert not ignored or not got[::2].any()


def test_a_slice_of_padded_logits_and_a_scaled_objective():
    g = torch.Generator().manual_seed(0)
    leaf, labels = torch.randn(6, 64, generator=g, dtype=torch.float64), torch.randint(50, (6,), generator=g)
    gradients = []
    for kernel in (cross_entropy_sums, chunked_cross_entropy):
        x = leaf.clone().requires_grad_()
        (5.0 * kernel((x * 1.0)[:, :50], labels)[1]).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13 if leaf.dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("chunked_cross_entropy", KERNELS)
def test_without_a_gradient_nothing_is_consumed(chunked_cross_entropy):
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, -1, 3])
    kept = logits.clone()
    with torch.no_grad():
        nll, _ = chunked_cross_entropy(logits, labels)
    assert torch.equal(logits, kept) and nll.item() == pytest.approx(
        cross_entropy_sums(logits, labels)[0].item(), rel=1e-6
    )


@pytest.mark.parametrize("chunked_cross_entropy", KERNELS)
def test_a_second_backward_is_refused(chunked_cross_entropy):
    x = torch.randn(2, 5, requires_grad=True)
    objective = chunked_cross_entropy(x * 1.0, torch.tensor([0, 1]))[1]
    objective.backward(retain_graph=True)
    with pytest.raises((RuntimeError, AssertionError)):
        objective.backward()


@pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
def test_in_c_a_label_outside_of_the_vocabulary_is_refused():
    with pytest.raises(IndexError, match="label 50 of a vocabulary of 50"):
        cpu_cross_entropy(torch.randn(2, 64)[:, :50], torch.tensor([0, 50]))
    with pytest.raises(ValueError, match=r"shape \[3\]; wanted \[2\]"):
        cpu_cross_entropy(torch.randn(2, 5), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("chosen", KERNELS)
def test_a_scale_goes_into_objective_and_gradient(chosen):
    leaf, labels = torch.randn(6, 20, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, -1, 3, 4, 19])
    found = []
    for kernel in (cross_entropy_sums, chosen):
        x = leaf.clone().requires_grad_()
        nll, objective = kernel(x * 1.0, labels, 0.01, 0.125)
        (objective * 3.0).backward()
        found.append((nll.detach(), objective.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
@pytest.mark.parametrize("level", build.levels())
def test_in_c_padded_columns_stay_and_nan_is_seen(level, monkeypatch):
    library = build.load(level)
    monkeypatch.setattr(build, "load", lambda: library)
    leaf = torch.randn(6, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 49, -1, 7, 8, 9])
    padded = leaf * 1.0
    nll, objective = cpu_cross_entropy(padded[:, :50], labels, 0.01)
    want_nll, want = cross_entropy_sums(leaf.double()[:, :50], labels, 0.01)
    (got_gradient,), (gradient,) = (torch.autograd.grad(o, leaf, retain_graph=True) for o in (objective, want))
    assert nll.item() == pytest.approx(want_nll.item(), rel=1e-6) and objective.item() == pytest.approx(
        want.item(), rel=1e-6
    )
    torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=3e-7)
    assert torch.equal(padded[:, 50:], leaf[:, 50:])
    for bad in (float("nan"), float("inf")):
        logits = torch.zeros(2, 5)
        logits[1, 3] = bad
        assert not cpu_cross_entropy(logits, torch.tensor([0, 0]))[0].isfinite()


@pytest.mark.parametrize("chunked_cross_entropy", KERNELS)
def test_tensors_that_need_the_logits_later_are_noticed(chunked_cross_entropy):
    """The gradient of tanh reads its own output: torch refuses. Softcapped logits are a product of it, and right."""
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunked_cross_entropy(torch.tanh(x), torch.tensor([0, 1, 2]))[1].backward()
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if chunked_cross_entropy is cpu_cross_entropy else torch.float64
    leaf, labels = torch.randn(6, 20, generator=g, dtype=dtype), torch.randint(20, (6,), generator=g)
    gradients = []
    for kernel in (cross_entropy_sums, chunked_cross_entropy):
        x = leaf.clone().requires_grad_()
        kernel(5.0 * torch.tanh(x / 5.0), labels)[1].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13 if leaf.dtype == torch.float64 else 1e-6)


def test_a_label_that_is_no_token_is_an_error_or_makes_the_loss_nan():
    """On a CPU it is refused; on a GPU, which would have to be asked, the step will be."""
    labels = torch.tensor([0, 5])
    with pytest.raises(IndexError, match="label 5 of a vocabulary of 5"):
        chunked_cross_entropy(torch.randn(2, 5), labels)
    loss = LossOfPieces(torch_pieces, LogitForm(5))
    assert _LossOfPieces.apply(torch.randn(2, 5), labels, 0.0, 1.0, loss)[0].isnan()
    assert _LossOfPieces.apply(torch.randn(2, 5), labels - 5, 0.0, 1.0, loss)[0].isfinite()
