"""The loss whose gradient takes the logits' place, against the reference."""

import pytest
import torch

from megaresnorm.kernels.cross_entropy import CACHED_ELEMENTS, chunked_cross_entropy
from megaresnorm.kernels.reference import cross_entropy_sums

TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("rows", [1, 5, 2 * (CACHED_ELEMENTS // 3001) + 3])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_values_and_gradients(rows, z_loss, ignored, dtype):
    g = torch.Generator().manual_seed(rows)
    leaf = (3 * torch.randn(rows, 3001, generator=g)).to(dtype)
    labels = torch.randint(3001, (rows,), generator=g)
    if ignored:
        labels[::2] = -1
    found = []
    for kernel in (cross_entropy_sums, chunked_cross_entropy):
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
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)


def test_without_a_gradient_nothing_is_consumed():
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, -1, 3])
    kept = logits.clone()
    with torch.no_grad():
        nll, _ = chunked_cross_entropy(logits, labels)
    assert torch.equal(logits, kept) and nll.item() == pytest.approx(
        cross_entropy_sums(logits, labels)[0].item(), rel=1e-6
    )


def test_a_second_backward_is_refused():
    x = torch.randn(2, 5, requires_grad=True)
    objective = chunked_cross_entropy(x * 1.0, torch.tensor([0, 1]))[1]
    objective.backward(retain_graph=True)
    with pytest.raises((RuntimeError, AssertionError)):
        objective.backward()


def test_tensors_that_need_the_logits_later_are_noticed():
    """The output of tanh is what its own gradient reads: torch refuses. Softcapped logits are a product of it, and right."""
    x = torch.randn(3, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        chunked_cross_entropy(torch.tanh(x), torch.tensor([0, 1, 2]))[1].backward()
    g = torch.Generator().manual_seed(0)
    leaf, labels = torch.randn(6, 20, generator=g, dtype=torch.float64), torch.randint(20, (6,), generator=g)
    gradients = []
    for kernel in (cross_entropy_sums, chunked_cross_entropy):
        x = leaf.clone().requires_grad_()
        kernel(5.0 * torch.tanh(x / 5.0), labels)[1].backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
