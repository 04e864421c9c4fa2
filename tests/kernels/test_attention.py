"""Attention by blocks of queries is attention: values and gradients, with and without masks, groups and cached keys."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import varlen

from megaresnorm.kernels import attention
from megaresnorm.kernels.attention import (
    QUERIES,
    Segments,
    blocked_attention,
    reference_attention,
    sdpa_attention,
)
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.attention import cpu_attention, fused_attention
from megaresnorm.kernels.registry import choose_kernel
from megaresnorm.kernels.rotary import rotate
from megaresnorm.model.rotary import rotary_tables
from megaresnorm.recipe import ModelRecipe

CPU = torch.device("cpu")


def textbook(q, k, v, visible, scale=None):
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bsnh,bcnh->bnsc", q, k) * (scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("bnsc,bcnh->bsnh", scores.softmax(-1), v), scores.detach().logsumexp(-1)


def inputs(seq, keys, heads=4, groups=2, width=8, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, heads, width), (batch, keys, groups, width), (batch, keys, groups, width)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kernel", [blocked_attention, sdpa_attention, reference_attention])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 7, QUERIES, QUERIES + 1, 3 * QUERIES - 5])
@pytest.mark.parametrize("kind", ["causal", "segments", "all", "whole segments"])
def test_values_and_gradients(kernel, groups, seq, kind, scale):
    q, k, v = inputs(seq, seq, groups=groups)
    visible = torch.ones(seq, seq, dtype=torch.bool)
    segments, causal = None, kind in ("causal", "segments")
    if causal:
        visible = visible.tril()
    if "segments" in kind:
        documents = (torch.arange(seq) * 3 // seq).expand(2, -1).clone()
        documents[1] = 0
        segments = Segments(documents)
        visible = ((documents.unsqueeze(2) == documents.unsqueeze(1)) & visible).unsqueeze(1)
    got, lse = kernel(q, k, v, segments=segments, causal=causal, scale=scale)
    want, sums = textbook(q, k, v, visible, scale)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if kernel is not blocked_attention:
        torch.testing.assert_close(lse, sums, rtol=0, atol=1e-12)
    d = torch.randn(want.shape, dtype=want.dtype)
    gradients = [torch.autograd.grad((y * d).sum(), (q, k, v)) for y in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", [blocked_attention, sdpa_attention, reference_attention])
def test_a_new_token_sees_all_cached_keys(kernel):
    q, k, v = inputs(1, 300)
    torch.testing.assert_close(
        kernel(q, k, v, causal=False)[0], textbook(q, k, v, torch.ones(1, 300, dtype=torch.bool))[0], rtol=0, atol=1e-12
    )


def test_in_bf16_it_is_as_near_the_truth_as_torch():
    """Scores are rounded to BF16; the error of values and gradients stays below twice that of the fused kernel."""
    q, k, v = inputs(256, 256, width=64, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    d = torch.randn(2, 256, 4, 64, dtype=torch.float64)
    want_y, _ = textbook(*exact, torch.ones(256, 256, dtype=torch.bool).tril())
    want = [want_y, *torch.autograd.grad((want_y * d).sum(), exact)]
    errors = {}
    for kernel in (sdpa_attention, blocked_attention):
        y, _ = kernel(q, k, v)
        found = [y, *torch.autograd.grad((y.double() * d).sum(), (q, k, v))]
        errors[kernel] = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, want, strict=True)]
    assert all(
        b < 2 * a and b < 0.02 for a, b in zip(errors[sdpa_attention], errors[blocked_attention], strict=True)
    ), errors


def test_in_fp16_torch_computes_in_fp32_and_rounds_once():
    q, k, v = inputs(64, 64, width=64, dtype=torch.float16)
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    d = torch.randn(2, 64, 4, 64)
    (y, _), (want_y, _) = sdpa_attention(q, k, v), sdpa_attention(*wide)
    assert torch.equal(y, want_y.half())
    for a, b in zip(torch.autograd.grad(y, (q, k, v), d.half()), torch.autograd.grad(want_y, wide, d), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=2e-3, atol=2e-3)  # the output's gradient was rounded


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
def test_in_c_with_rotary_positions_and_segments(level, heads, groups, width, seq, rotary, masked):
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
    segments = None
    if masked:
        segments = Segments(torch.stack((torch.arange(seq) * 3 // seq, torch.zeros(seq, dtype=torch.long))))

    def found(kernel, dtype):
        leaf = qkv.to(dtype).requires_grad_()
        wide = torch.promote_types(dtype, torch.float32)
        y, lse = kernel(leaf, groups, segments=segments, scale=0.4, **{name: t.to(wide) for name, t in tables.items()})
        return [t.double() for t in (y, lse, *torch.autograd.grad(y, leaf, d.to(dtype)))]

    def errors(kernel, dtype):
        return [
            ((a - b).norm() / b.norm().clamp(min=1e-3)).item() for a, b in zip(found(kernel, dtype), exact, strict=True)
        ]

    exact = found(in_steps, torch.float64)
    assert max(errors(fused_attention, torch.float32)) < 1e-6
    for ours, theirs in zip(errors(fused_attention, torch.bfloat16), errors(in_steps, torch.bfloat16), strict=True):
        assert ours <= 1.5 * theirs + 1e-4


def in_steps(qkv, kv_heads, cos=None, sin=None, segments=None, scale=None):
    """The fused form as torch's kernel, with rotary positions before it."""
    heads = qkv.shape[2] - 2 * kv_heads
    qk, v = qkv.split((heads + kv_heads, kv_heads), dim=2)
    q, k = (qk if cos is None else rotate(qk, cos, sin)).split((heads, kv_heads), dim=2)
    return sdpa_attention(q, k, v, segments=segments, scale=scale)


def test_in_c_on_separate_heads_and_what_it_refuses(level):
    q, k, v = inputs(40, 40, dtype=torch.float32)
    segments = Segments((torch.arange(40) // 9).expand(2, -1))
    got, lse = cpu_attention(q, k, v, segments=segments, scale=0.3)
    want, sums = sdpa_attention(q, k, v, segments=segments, scale=0.3)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, sums, rtol=0, atol=1e-5)
    d = torch.randn(got.shape)
    for a, b in zip(*(torch.autograd.grad(y, (q, k, v), d) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    for wrong in ({"softcap": 2.0}, {"causal": False}):
        with pytest.raises(ValueError, match="attention/cpu"):
            cpu_attention(q, k, v, **wrong)
    qkv, tables = torch.randn(1, 4, 6, 8), torch.ones(4, 8)
    short = Segments(torch.zeros(1, 3, dtype=torch.long))
    for wrong in (
        {"cos": tables.bfloat16(), "sin": tables}, {"cos": tables[:3], "sin": tables[:3]}, {"segments": short},
    ):  # fmt: skip
        with pytest.raises(TypeError, match="attention/cpu"):
            fused_attention(qkv, 2, **wrong)


def test_in_c_segments_whose_numbers_fall_are_no_memory_error(level):
    """Wrong numbers give wrong attention, and nothing is read or written elsewhere."""
    falling = Segments(torch.tensor([[5, 4, 3, 2, 1, 0] * 20]))
    y, _ = fused_attention(torch.randn(1, 120, 6, 8), 2, segments=falling)
    assert y.isfinite().all()


def of_torch_2_13(q, k, v, bounds_q, bounds_k, longest_q, longest_k, *, return_aux, scale, window_size, enable_gqa):
    assert enable_gqa and window_size == (-1, 0)
    return one_by_one(q, k, v, bounds_q, bounds_k, longest_q, longest_k, return_aux, scale)


def of_torch_2_11(q, k, v, bounds_q, bounds_k, longest_q, longest_k, is_causal=False, return_aux=None):
    assert is_causal and q.shape[1] == k.shape[1]
    return one_by_one(q, k, v, bounds_q, bounds_k, longest_q, longest_k, return_aux, None)


def one_by_one(q, k, v, bounds_q, bounds_k, longest_q, longest_k, return_aux, scale):
    assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k) and return_aux.lse
    assert (bounds_q.tolist(), longest_q, longest_k) == ([0, 2, 5, 6, 12], 6, 6)
    parts = [reference_attention(*(t[a:b].unsqueeze(0) for t in (q, k, v)), scale=scale) for a, b in pairwise(bounds_q)]
    return torch.cat([y[0] for y, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


@pytest.mark.parametrize("function", [of_torch_2_13, of_torch_2_11])
def test_torchs_kernel_for_segments_is_given_their_bounds(monkeypatch, function):
    """varlen_attn runs on GPUs alone: here its place is taken by attention of each sequence by itself."""
    monkeypatch.setattr(varlen, "varlen_attn", function)
    q, k, v = inputs(6, 6)
    segments = Segments(torch.tensor([[0, 0, 1, 1, 1, 3], [2, 2, 2, 2, 2, 2]]))
    got = attention._varlen_attention(q, k, v, segments, True, 0.3)
    want = reference_attention(q, k, v, segments=segments, scale=0.3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
