"""Products in BF16 and FP16 on FP32 weights: close to FP32 for every topology, and every setting obeyed."""

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.precision.dtypes import half_dtype
from megaresnorm.precision.half import HalfCopies
from megaresnorm.recipe import KernelRecipe, ModelRecipe, PrecisionRecipe


def backward(topology, compute, residual=None, attention="auto", **settings):
    """Loss and gradients of one batch; the perturbed weights are cast again for products of 16-bit numbers."""
    recipe = ModelRecipe(
        dim=32,
        num_blocks=4,
        num_heads=4,
        num_kv_heads=2,
        seq_len=16,
        vocab_size=64,
        topology=topology,
        qk_norm="head",
        bias=True,
        **settings,
    )
    precision = PrecisionRecipe(compute=compute, residual_dtype=residual)
    assembled = build_model(recipe, precision, KernelRecipe(attention=attention))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # away from gates of 0 and 1e-6, behind which nothing could be seen
        for p in assembled.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    if (half := half_dtype(precision)) is not None:
        HalfCopies(assembled.model, half)
    tokens, labels = torch.randint(64, (2, 4, 16), generator=generator)
    loss = cross_entropy_sums(assembled.model(tokens), labels.flatten(), 1e-3)[1] / labels.numel()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in assembled.model.named_parameters()}


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("residual", ["fp32", "bf16"])
def test_bf16_follows_fp32(topology, residual):
    exact_loss, exact = backward(topology, "fp32")
    loss, got = backward(topology, "bf16", residual, "sdpa")
    assert loss == pytest.approx(exact_loss, rel=0.01)
    floor = 1e-2 * max(g.norm() for g in exact.values())  # key biases and single gates are sums that cancel
    for name, gradient in exact.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() <= 0.08 * torch.maximum(gradient.norm(), floor), name


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_fp16_follows_fp32_eight_times_as_closely_as_bf16(topology):
    """It has three bits more. The loss is of order one, and so small a model's gradients fit without a scale."""
    exact_loss, exact = backward(topology, "fp32")
    loss, got = backward(topology, "fp16")
    assert loss == pytest.approx(exact_loss, rel=0.01 / 8)
    floor = 1e-2 * max(g.norm() for g in exact.values())
    for name, gradient in exact.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() <= 0.08 / 8 * torch.maximum(gradient.norm(), floor), name


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_blocks_of_queries_cost_little_accuracy(topology):
    """Their scores are rounded to BF16: over all gradients at most 1.15 times the error of torch's kernel."""
    _, exact = backward(topology, "fp32")
    errors = []
    for attention in ("sdpa", "blocked"):
        _, got = backward(topology, "bf16", "fp32", attention)
        errors.append(sum((got[n] - g).square().sum() for n, g in exact.items()).sqrt().item())
    assert 0 < errors[1] <= 1.15 * errors[0]


def test_residual_dtype_is_the_type_that_is_stored():
    for residual, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        recipe = ModelRecipe(dim=32, num_blocks=2, num_heads=4, seq_len=8, vocab_size=64, topology="pre")
        model = build_model(recipe, PrecisionRecipe(compute="bf16", residual_dtype=residual)).model
        seen = []
        model.blocks["1"].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].x.dtype))
        assert model(torch.zeros(1, 8, dtype=torch.long)).dtype == torch.bfloat16
        assert seen == [dtype]


def test_tied_weights_share_one_copy_and_sum_their_gradients():
    recipe = ModelRecipe(dim=32, num_blocks=1, num_heads=4, seq_len=8, vocab_size=64, tied_embeddings=True)
    exact, rounded = (build_model(recipe, PrecisionRecipe(compute=c)) for c in ("fp32", "bf16"))
    tokens = torch.arange(8).unsqueeze(0)
    HalfCopies(rounded.model, torch.bfloat16)
    for assembled in (exact, rounded):
        cross_entropy_sums(assembled.model(tokens), tokens.flatten() + 1)[0].backward()
    want, got = exact.model.embedding.weight.grad, rounded.model.embedding.weight.grad
    assert (got - want).norm() < 0.03 * want.norm()


def test_biases_get_their_gradient_and_token_gates_mix_in_fp32():
    _, exact = backward("gated", "fp32")
    _, got = backward("gated", "bf16", "fp32")
    for name in ("blocks.0.attention.branch.out.bias", "blocks.3.ffn.branch.down.bias"):
        assert (got[name] - exact[name]).norm() < 0.05 * exact[name].norm() != 0
    recipe = ModelRecipe(dim=32, num_blocks=1, num_heads=4, seq_len=8, vocab_size=64, topology="gated")
    model = build_model(recipe, PrecisionRecipe(compute="bf16", residual_dtype="fp32")).model
    tokens = torch.arange(8).unsqueeze(0)
    residual = model.blocks["0"].attention
    x, u = residual.open(model.embed(tokens, model.rows(tokens)))
    assert u.local.dtype == torch.bfloat16 and residual.run(x, u, model.rows(tokens), None).dtype == torch.float32
