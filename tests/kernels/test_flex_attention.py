"""Attention by FlexAttention, eagerly, is the reference's: with capped scores, documents and groups of heads."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.attention import Segments, reference_attention
from megaresnorm.kernels.flex_attention import _compiled_blocks, block_mask_of, flex_attention
from megaresnorm.kernels.registry import choose_kernel

load_backends()
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Its gradients are for GPUs alone as long as it is compiled; without a compiler they are plain operators."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("seq", [9, 150])
def test_values_sums_and_gradients(heads, groups, softcap, documents, seq):
    g = torch.Generator().manual_seed(seq)
    shapes = [(2, seq, heads, 16), (2, seq, groups, 16), (2, seq, groups, 16)]
    qkv = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    d = torch.randn(shapes[0], generator=g)
    segments = Segments((torch.rand(2, seq, generator=g) < 0.1).long().cumsum(1)) if documents else None
    found = []
    for function, wide in ((flex_attention, qkv), (reference_attention, [t.detach().double() for t in qkv])):
        leaves = [t.requires_grad_() for t in wide]
        y, lse = function(*leaves, segments=segments, scale=0.5, softcap=softcap)
        found.append((y, lse, *torch.autograd.grad(y, leaves, d.to(y.dtype))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=2e-5)
    assert not found[0][1].requires_grad


def test_attention_that_is_not_causal():
    q, k, v = (torch.randn(1, 6, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for segments in (None, Segments(torch.tensor([[0, 0, 1, 1, 1, 2]]))):
        for got, want in zip(
            flex_attention(q, k, v, segments=segments, causal=False, softcap=3.0),
            reference_attention(q, k, v, segments=segments, causal=False, softcap=3.0),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_blocks_of_other_documents_are_skipped_and_found_once():
    segments = Segments((torch.arange(512) // 128).expand(1, 512).contiguous())
    mask = block_mask_of(segments, causal=True)
    assert block_mask_of(segments, causal=True) is mask
    assert mask.kv_num_blocks.sum() == 4  # of the ten that causal attention has


def test_auto_takes_it_for_capped_scores_on_a_gpu():
    assert choose_kernel("attention", "auto", CUDA, torch.bfloat16, "softcap")[0].backend == "flex"
    assert choose_kernel("attention", "auto", CUDA, torch.bfloat16, "plain")[0].backend == "sdpa"
    assert choose_kernel("attention", "auto", torch.device("cpu"), torch.float32, "softcap")[0].backend == "reference"
    assert choose_kernel("attention", "auto", CUDA, torch.float64, "softcap")[0].backend == "reference"


def test_a_compiler_makes_one_graph_for_all_batches():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    capped = torch.compile(
        lambda *qkv, segments: flex_attention(*qkv, segments=segments, softcap=2.0)[0], backend=counter, fullgraph=True
    )
    for documents in (False, True):
        for seed in range(2):
            g = torch.Generator().manual_seed(seed)
            qkv = [torch.randn(2, 150, heads, 16, generator=g) for heads in (4, 2, 2)]
            segments = Segments((torch.rand(2, 150, generator=g) < 0.1).long().cumsum(1)) if documents else None
            if documents:
                block_mask_of(segments, causal=True)  # as a model does, before its compiled blocks
            want = reference_attention(*qkv, segments=segments, softcap=2.0)[0]
            torch.testing.assert_close(capped(*qkv, segments=segments), want, rtol=0, atol=1e-5)
        assert counter.frame_count == 1 + documents


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [False, True])
def test_on_a_gpu(documents):
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 300, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64)]
    qkv = [torch.randn(s, generator=g, device="cuda").bfloat16().requires_grad_() for s in shapes]
    segments = Segments((torch.arange(300, device="cuda") // 70).expand(2, 300).contiguous()) if documents else None
    found = []
    for function, leaves in ((flex_attention, qkv), (reference_attention, [t.detach().double() for t in qkv])):
        leaves = [t.requires_grad_() for t in leaves]
        y, lse = function(*leaves, segments=segments, softcap=2.0)
        found.append((y, lse, *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    for got, want in zip(*found, strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm()


def test_blocks_of_documents_are_one_graph_for_all_batches():
    """More batches than Dynamo would compile anew; each with documents of its own, and the blocks of its own."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = _compiled_blocks(counter)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        segments = Segments(torch.randint(3, (2, 256), generator=g).cumsum(1) // 50)
        ids = segments.ids

        def sees(batch, head, query, key, ids=ids):
            return (ids[batch, query] == ids[batch, key]) & (key <= query)

        found, wanted = compiled(sees, 2, None, 256, 256, device="cpu"), block_mask_of(segments, causal=True)
        assert torch.equal(found.to_dense(), wanted.to_dense())
        assert torch.equal(found.full_kv_num_blocks, wanted.full_kv_num_blocks)
    assert counter.frame_count == 1
