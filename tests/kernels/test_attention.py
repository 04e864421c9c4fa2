"""Attention by blocks of queries is attention: values and gradients, with and without masks, groups and cached keys."""

import pytest
import torch

from megaresnorm.kernels.attention import (
    QUERIES,
    blocked_attention,
    reference_attention,
    sdpa_attention,
    split_attention,
)
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.attention import cpu_attention
from megaresnorm.kernels.registry import choose_kernel
from megaresnorm.model.rotary import rotary_tables
from megaresnorm.recipe import ModelRecipe

CPU = torch.device("cpu")


def textbook(q, k, v, visible, scale=None):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bsnh,bcnh->bnsc", q, k) * (scale or q.shape[-1] ** -0.5)
    p = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bnsc,bcnh->bsnh", p, v)


def inputs(seq, keys, heads=4, groups=2, width=8, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, heads, width), (batch, keys, groups, width), (batch, keys, groups, width)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kernel", [blocked_attention, sdpa_attention, reference_attention])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 7, QUERIES, QUERIES + 1, 3 * QUERIES - 5])
@pytest.mark.parametrize("kind", ["causal", "mask", "all"])
def test_values_and_gradients(kernel, groups, seq, kind, scale):
    q, k, v = inputs(seq, seq, groups=groups)
    visible = torch.ones(seq, seq, dtype=torch.bool)
    mask = None
    if kind != "all":
        visible = visible.tril()
    if kind == "mask":
        documents = (torch.arange(seq) * 3 // seq).expand(2, -1).clone()
        documents[1] = 0
        mask = ((documents.unsqueeze(2) == documents.unsqueeze(1)) & visible).contiguous()
        visible = mask.unsqueeze(1)
    got = kernel(q, k, v, causal=kind == "causal", mask_BSC=mask, scale=scale)
    want = textbook(q, k, v, visible, scale)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    d = torch.randn(want.shape, dtype=want.dtype)
    gradients = [torch.autograd.grad((y * d).sum(), (q, k, v)) for y in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", [blocked_attention, sdpa_attention, reference_attention])
def test_a_new_token_sees_all_cached_keys(kernel):
    q, k, v = inputs(1, 300)
    torch.testing.assert_close(
        kernel(q, k, v, causal=False), textbook(q, k, v, torch.ones(1, 300, dtype=torch.bool)), rtol=0, atol=1e-12
    )


def test_in_bf16_it_is_as_near_the_truth_as_torch():
    """Scores are rounded to BF16; the error of values and gradients stays below twice that of the fused kernel."""
    q, k, v = inputs(256, 256, width=64, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    d = torch.randn(2, 256, 4, 64, dtype=torch.float64)
    want_y = textbook(*exact, torch.ones(256, 256, dtype=torch.bool).tril())
    want = [want_y, *torch.autograd.grad((want_y * d).sum(), exact)]
    errors = {}
    for kernel in (sdpa_attention, blocked_attention):
        y = kernel(q, k, v, causal=True)
        found = [y, *torch.autograd.grad((y.double() * d).sum(), (q, k, v))]
        errors[kernel] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, want, strict=True)]
    assert all(
        b < 2 * a and b < 0.02 for a, b in zip(errors[sdpa_attention], errors[blocked_attention], strict=True)
    ), errors


def test_auto_takes_the_c_kernel_then_blocks_for_bf16_on_cpus_and_says_why(monkeypatch):
    if build.unavailable() is None:
        assert choose_kernel("attention", "auto", CPU, torch.bfloat16)[0].function is cpu_attention
        assert choose_kernel("attention", "auto", CPU, torch.float32)[0].function is cpu_attention
    monkeypatch.setattr(build, "unavailable", lambda: "no compiler in this test")
    kernel, line = choose_kernel("attention", "auto", CPU, torch.bfloat16)
    assert kernel.backend == "blocked" and "not cpu: no compiler in this test" in line
    kernel, line = choose_kernel("attention", "auto", CPU, torch.float32)
    assert kernel.backend == "sdpa" and "not blocked: only BF16 gains from it" in line
    assert choose_kernel("attention", "auto", torch.device("cuda"), torch.bfloat16)[0].backend == "sdpa"
    assert choose_kernel("attention", "blocked", CPU, torch.float32)[0].backend == "blocked"


@pytest.fixture(params=build.levels())
def level(request, monkeypatch):
    if build.unavailable() is not None:
        pytest.skip("no C compiler")
    library = build.load(request.param)
    monkeypatch.setattr(build, "load", lambda: library)


@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 4, 32), (4, 2, 6), (3, 1, 20)])
@pytest.mark.parametrize("seq", [1, 7, 31, 33, 100])
@pytest.mark.parametrize("rotary", ["none", "shared", "per sequence"])
@pytest.mark.parametrize("masked", [False, True])
def test_in_c_with_rotary_positions_and_masks(level, heads, groups, width, seq, rotary, masked):
    """From fused q, k, v, values and gradients: FP32 within 1e-6 of FP64, BF16 no further off than torch's kernel."""
    g = torch.Generator().manual_seed(seq)
    qkv = torch.randn(2, seq, heads + 2 * groups, width, generator=g, dtype=torch.float64)
    d = torch.randn(2, seq, heads, width, generator=g, dtype=torch.float64)
    tables = {}
    if rotary != "none":
        rotating = ModelRecipe(dim=width, num_blocks=1, num_heads=1, seq_len=seq)
        tables = dict(zip(("cos", "sin"), rotary_tables(rotating, seq, torch.float64, CPU), strict=True))
    if rotary == "per sequence":
        tables = {name: torch.stack((t, t.flip(0))) for name, t in tables.items()}
    mask = None
    if masked:
        documents = torch.stack((torch.arange(seq) * 3 // seq, torch.zeros(seq, dtype=torch.long)))
        mask = (documents.unsqueeze(2) == documents.unsqueeze(1)).tril()

    def found(kernel, dtype):
        leaf = qkv.to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        y = kernel(leaf, groups, mask_BSC=mask, scale=0.4, **{name: t.to(wide) for name, t in tables.items()})
        return [t.double() for t in (y, *torch.autograd.grad(y, leaf, d.to(dtype)))]

    def errors(kernel, dtype):
        return [
            ((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(found(kernel, dtype), exact, strict=True)
        ]

    torch_kernel = split_attention(sdpa_attention)
    exact = found(torch_kernel, torch.float64)
    assert max(errors(cpu_attention, torch.float32)) < 1e-6
    for ours, theirs in zip(errors(cpu_attention, torch.bfloat16), errors(torch_kernel, torch.bfloat16), strict=True):
        assert ours <= 1.5 * theirs + 1e-4


def test_in_c_a_query_that_sees_nothing_gets_zero_and_wrong_tables_are_refused():
    if build.unavailable() is not None:
        pytest.skip("no C compiler")
    qkv = torch.randn(1, 4, 6, 8, requires_grad=True)
    mask = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    mask[0, 2] = False
    y = cpu_attention(qkv, 2, mask_BSC=mask)
    assert not y[0, 2].any() and y.isfinite().all()
    (gradient,) = torch.autograd.grad(y.sum(), qkv)
    assert gradient.isfinite().all() and not gradient[0, 2, :2].any()
    tables = torch.ones(4, 8)
    for wrong in (
        {"cos": tables.bfloat16(), "sin": tables},
        {"cos": tables[:3], "sin": tables[:3]},
        {"mask_BSC": mask.float()},
    ):
        with pytest.raises(TypeError, match="attention/cpu"):
            cpu_attention(qkv, 2, **wrong)


def test_in_c_a_mask_may_show_later_keys():
    if build.unavailable() is not None:
        pytest.skip("no C compiler")
    qkv = torch.randn(1, 40, 6, 8, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(1, 40, 40, dtype=torch.bool)
    want = split_attention(sdpa_attention)(qkv, 2, mask_BSC=everything)
    torch.testing.assert_close(cpu_attention(qkv, 2, mask_BSC=everything), want, rtol=0, atol=1e-6)


def test_a_mask_counts_instead_of_causal():
    q, k, v = inputs(300, 300)
    everything = torch.ones(2, 300, 300, dtype=torch.bool)
    want = sdpa_attention(q, k, v, causal=False)
    for kernel in (sdpa_attention, blocked_attention):
        torch.testing.assert_close(kernel(q, k, v, causal=True, mask_BSC=everything), want, rtol=0, atol=1e-12)
