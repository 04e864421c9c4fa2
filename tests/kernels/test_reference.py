"""The reference kernels against formulas in FP64."""

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights, add_norm
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.kernels.dropout import dropout
from megaresnorm.kernels.registry import choose_kernel, register_kernel

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
CPU = torch.device("cpu")


def textbook_norm(x, norm):
    """Two passes, in the type of x."""
    if norm.kind == "layernorm":
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    else:
        y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y * norm.weight.to(x.dtype)
    return y if norm.bias is None else y + norm.bias.to(x.dtype)


def inputs(rows, dim, dtype=F32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, delta = (torch.randn(rows, dim, generator=g).to(dtype) for _ in range(2))
    norms = [
        NormWeights(
            kind, 1 + 0.3 * torch.randn(dim, generator=g), 0.3 * torch.randn(dim, generator=g) if bias else None, 1e-5
        )
        for kind, bias in (("layernorm", True), ("rmsnorm", False))
    ]
    return x, delta, norms


@pytest.mark.parametrize("dim", [1, 7, 64, 192, 1128])
@pytest.mark.parametrize("norm", [None, 0, 1])
@pytest.mark.parametrize("next_norm", [None, 0, 1])
def test_add_norm_values_and_gradients(dim, norm, next_norm):
    """FP32 against the formula in FP64, for a vector gate; gradients of stream, branch, gate and norm weights."""
    x, delta, norms = inputs(9, dim)
    gate = torch.linspace(0.5, 1.5, dim)
    first, second = (None if i is None else norms[i] for i in (norm, next_norm))
    leaves = [x, delta, gate, *(w for n in norms for w in (n.weight, n.bias) if w is not None)]
    for leaf in leaves:
        leaf.requires_grad_()
    wide = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}

    def widen(n):
        return (
            None
            if n is None
            else n._replace(weight=wide[id(n.weight)], bias=None if n.bias is None else wide[id(n.bias)])
        )

    trunk, branch, *_ = add_norm(
        AddNormArgs(x, delta, alpha=2.5, gate=gate, norm=first, next_norm=second, residual_dtype=F32, out_dtype=F32)
    )
    z = 2.5 * wide[id(x)] + wide[id(gate)] * wide[id(delta)]
    want_trunk = z if first is None else textbook_norm(z, widen(first))
    want_branch = want_trunk if second is None else textbook_norm(want_trunk, widen(second))
    torch.testing.assert_close(trunk.double(), want_trunk, rtol=0, atol=2e-6 * want_trunk.abs().max().item())
    torch.testing.assert_close(branch.double(), want_branch, rtol=0, atol=2e-6 * want_branch.abs().max().item())
    if dim == 1 and (norm, next_norm) != (None, None):
        return  # a normalised single column is a constant or a sign: its gradient is rounding alone
    d_trunk, d_branch = torch.randn(9, dim), torch.randn(9, dim)
    (trunk * d_trunk + branch * d_branch).sum().backward()
    (want_trunk * d_trunk + want_branch * d_branch).sum().backward()
    for leaf in leaves:
        if leaf.grad is None:
            assert wide[id(leaf)].grad is None
        else:
            want = wide[id(leaf)].grad
            torch.testing.assert_close(leaf.grad.double(), want, rtol=0, atol=1e-5 * want.abs().max().item() + 1e-7)


def test_outputs_are_functions_of_what_is_stored():
    """In BF16 the norm reads the rounded sum: normalising the returned trunk again gives the same bits."""
    x, delta, (layer, _) = inputs(32, 64, BF16)
    trunk, branch, *_ = add_norm(AddNormArgs(x, delta, alpha=3.0, next_norm=layer, residual_dtype=BF16, out_dtype=BF16))
    assert trunk.dtype == branch.dtype == BF16
    assert torch.equal(trunk, torch.add(delta.float(), x.float(), alpha=3.0).bfloat16())
    again = add_norm(AddNormArgs(trunk, next_norm=layer, residual_dtype=BF16, out_dtype=BF16))
    assert torch.equal(again[0], trunk) and torch.equal(again[1], branch)


def test_fp32_stream_keeps_what_a_bf16_stream_loses():
    """A thousand adds of a branch at 2^-9 of the trunk: BF16 storage rounds every one of them away."""
    x, delta = torch.ones(1, 8), torch.full((1, 8), 2.0**-9).to(BF16)
    streams = {F32: x, BF16: x.to(BF16)}
    for dtype in streams:
        for _ in range(1000):
            streams[dtype] = add_norm(AddNormArgs(streams[dtype], delta, residual_dtype=dtype, out_dtype=BF16))[0]
    assert torch.equal(streams[BF16], x.to(BF16)) and torch.allclose(streams[F32], x + 1000 * 2.0**-9)


def test_statistics_survive_a_large_mean():
    """Row mean 100 times the deviation: E[x^2] - mean^2 in FP32 would be off by 1e-3."""
    x, _, (layer, _) = inputs(16, 256)
    x = x + 100
    _, branch, *_ = add_norm(AddNormArgs(x, next_norm=layer, residual_dtype=F32, out_dtype=F32))
    assert (branch - textbook_norm(x.double(), layer)).abs().max() < 3e-5


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_cross_entropy_sums(z_loss):
    logits = torch.randn(20, 11, dtype=F64, requires_grad=True)
    labels = torch.randint(11, (20,))
    labels[[3, 7]] = torch.tensor([-1, -100])
    nll, objective = cross_entropy_sums(logits, labels, z_loss)
    valid = [i for i in range(20) if labels[i] >= 0]
    log_z = logits.exp().sum(-1).log()
    want = sum(log_z[i] - logits[i, labels[i]] for i in valid)
    assert torch.allclose(nll, want, rtol=1e-13)
    want_objective = want + z_loss * sum(log_z[i] ** 2 for i in valid)
    assert torch.allclose(objective, want_objective, rtol=1e-13)
    (got,) = torch.autograd.grad(objective, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(want_objective, logits)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-13) and not got[[3, 7]].any()


def test_dropout_mask_is_a_function_of_key_row_and_column():
    x, rows = torch.ones(64, 32), torch.arange(1000, 1064)
    whole = dropout(x, 0.3, 12345, rows)
    assert torch.equal(whole[10:20], dropout(x[10:20], 0.3, 12345, rows[10:20]))  # other microbatches, same mask
    assert torch.equal(whole[:, :8], dropout(x[:, :8], 0.3, 12345, rows))
    assert not torch.equal(whole, dropout(x, 0.3, 12346, rows))
    for key in (3, 2**63 + 12345, 2**64 - 1):  # the same bits in an int64
        bits = torch.tensor(key - 2**64 if key >= 2**63 else key)
        assert torch.equal(dropout(x, 0.3, key, rows), dropout(x, 0.3, bits, rows))
    assert set(whole.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}


@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_drops_its_share_independently(probability):
    """2^20 elements: the share, and the agreement of neighbouring rows, columns and keys, each within 5 deviations."""
    x, rows = torch.ones(2048, 512), torch.arange(2048) + 2**33
    masks = [dropout(x, probability, key, rows) == 0 for key in (1, 2)]
    share = probability**2 + (1 - probability) ** 2
    for same in (masks[0][1:] == masks[0][:-1], masks[0][:, 1:] == masks[0][:, :-1], masks[0] == masks[1]):
        assert abs(same.float().mean().item() - share) < 5 * 2**-10 * 0.5
    assert abs(masks[0].float().mean().item() - probability) < 5 * 2**-10 * 0.5


def test_kernel_choice_says_which_and_why():
    @register_kernel(
        "test_op", "fast", requires=lambda device, dtype: "needs a GPU of this test" if device.type == "cpu" else None
    )
    def fast(): ...

    @register_kernel("test_op", "slow")
    def slow(): ...

    kernel, line = choose_kernel("test_op", "auto", CPU, F32)
    assert kernel.function is slow and "slow" in line and "not fast: needs a GPU of this test" in line
    assert choose_kernel("test_op", "auto", torch.device("cuda"), F32)[0].function is fast
    with pytest.raises(ConfigError, match=r"kernels.test_op=fast cannot run on cpu: needs a GPU"):
        choose_kernel("test_op", "fast", CPU, F32)
    with pytest.raises(ConfigError, match="wanted one of auto, fast, slow"):
        choose_kernel("test_op", "fats", CPU, F32)


def test_a_post_norm_reads_the_stored_sum():
    x, delta, norms = inputs(64, 64, BF16)
    for norm in norms:
        trunk, *_ = add_norm(AddNormArgs(x, delta, alpha=3.0, norm=norm, residual_dtype=BF16, out_dtype=BF16))
        stored, *_ = add_norm(AddNormArgs(x, delta, alpha=3.0, residual_dtype=BF16, out_dtype=BF16))
        assert (
            torch.equal(trunk, textbook_norm(stored.double(), norm).to(BF16))
            or (
                (trunk.double() - textbook_norm(stored.double(), norm)).abs() <= 2.0**-8 * trunk.double().abs() * 0.5001
            ).all()
        )
