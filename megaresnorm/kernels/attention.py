"""Attention over whole sequences: torch's fused kernels, and products over blocks of queries, faster on some CPUs.

Every backend is called with heads that are rotated already (rotary.py), and may have a form that reads a layer's fused
q, k, v and rotates them itself (``FusedAttention``).

B batch   S queries   C keys (S, or more where earlier ones are cached)
N query heads   K key/value heads   H head width
"""

import functools
import inspect
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import register_kernel

QUERIES = 128  # in one block; the keys after a block are never read


class Segments:
    """Documents in the rows of a batch, kept apart: a query sees keys of its own segment alone.

    Args:
        ids: [B, S], the number of every token's segment, not falling along a row.

    Attributes:
        first: [B, S] int64, the index in its row of the first token of each token's segment.
        blocks: FlexAttention's causal block mask, where it was made (flex_attention.py); else None.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.first = ids, torch.searchsorted(ids, ids)
        self.blocks: Any = None
        self._mask: Tensor | None = None
        self._lengths: tuple[Tensor, int] | None = None

    def mask(self, causal: bool) -> Tensor:
        """[B, S, S], True where a query sees a key; for backends without a kernel for segments.

        The causal one is made once for all layers.
        """
        if self._mask is not None and causal:
            return self._mask
        same = self.ids.unsqueeze(2) == self.ids.unsqueeze(1)
        if not causal:
            return same
        mask = same.tril()
        if not torch.compiler.is_compiling():
            self._mask = mask
        return mask

    def lengths(self) -> tuple[Tensor, int]:
        """Where segments begin and end among all B * S tokens, [segments + 1] int32, and the longest one's tokens.

        Made once for all layers. It waits for the device, which alone knows the number of segments.
        """
        if self._lengths is None:
            starts = self.first == torch.arange(self.first.shape[1], device=self.first.device)
            bounds = torch.cat(
                (starts.flatten().nonzero().flatten(), starts.new_full((1,), starts.numel(), dtype=torch.int64))
            )
            self._lengths = bounds.to(torch.int32), int(bounds.diff().max())
        return self._lengths


class AttentionKernel(Protocol):
    """A backend of attention."""

    def __call__(
        self,
        q_BSNH: Tensor,
        k_BCKH: Tensor,
        v_BCKH: Tensor,
        /,
        *,
        segments: Segments | None = None,
        causal: bool = True,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(scale q k^T) v.

        Args:
            q_BSNH: N is a multiple of the K key/value heads, each of which serves N / K query heads.
            segments: which keys a query sees; then C is S. None: a row is one segment.
            causal: query i sees no key after i, and C is S.
            scale: factor of the products q k; H^-0.5 when None.
            softcap: scores become softcap tanh(scores / softcap); None leaves them.

        Returns:
            [B, S, N, H], and [B, N, S] the logarithm of the sum of exponentials of every query's scores, in FP32 (FP64
            for FP64), without a gradient; None where a kernel does not give it.
        """


class FusedAttention(Protocol):
    """A backend's form that reads fused q, k, v and rotates q and k itself."""

    def __call__(
        self,
        qkv_BSJH: Tensor,
        kv_heads: int,
        /,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        segments: Segments | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Causal self-attention of whole sequences.

        Args:
            qkv_BSJH: [B, S, J, H], heads of q, then of k, then of v; J is N + 2 kv_heads.
            cos: as ``rotary`` takes it; None for no rotation.
            sin: likewise.
            segments: as of ``AttentionKernel``.
            scale: likewise.

        Returns:
            As ``AttentionKernel``.
        """


def _avoid_blocked(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "made for CPUs"
    if dtype != torch.bfloat16:
        return "only BF16 gains from it"
    return None


def blocked_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by matrix products over blocks of queries. It caps no scores.

    Scores are rounded to the inputs' type. The probabilities are kept for the backward pass: B * N * S * C / 2 elements
    for causal attention.
    """
    assert softcap is None, "registered without"
    batch, seq, heads, width = q_BSNH.shape
    group = heads // k_BCKH.shape[2]
    # P = B * N pairs: one batched product for all heads.
    q_PSH = q_BSNH.transpose(1, 2).reshape(batch * heads, seq, width)
    k_PCH, v_PCH = (
        t.repeat_interleave(group, dim=2).transpose(1, 2).flatten(0, 1)
        if group > 1
        else t.transpose(1, 2).reshape(batch * heads, -1, width)
        for t in (k_BCKH, v_BCKH)
    )
    bias = _bias(q_PSH, k_PCH.shape[1], causal, segments, heads)
    y_PSH = _Blocked.apply(q_PSH, k_PCH, v_PCH, bias, causal, width**-0.5 if scale is None else scale)
    return y_PSH.view(batch, heads, seq, width).transpose(1, 2), None


def reference_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention written out, in FP32 (or FP64); scores may be capped.

    Source:
        Gemma 2, arXiv:2408.00118, eq. 1 (the cap).
    """
    wide = torch.promote_types(q_BSNH.dtype, torch.float32)
    group = q_BSNH.shape[2] // k_BCKH.shape[2]
    k_BCNH, v_BCNH = (t.repeat_interleave(group, dim=2).to(wide) for t in (k_BCKH, v_BCKH))
    scores = torch.einsum("bsnh,bcnh->bnsc", q_BSNH.to(wide), k_BCNH)
    scores = scores * (q_BSNH.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    mask_BSC = None if segments is None else segments.mask(causal)
    if segments is None and causal:
        mask_BSC = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril().unsqueeze(0)
    if mask_BSC is not None:
        scores = scores.masked_fill(~mask_BSC.unsqueeze(1), -inf)
    y = torch.einsum("bnsc,bcnh->bsnh", torch.softmax(scores, dim=-1), v_BCNH).to(q_BSNH.dtype)
    return y, scores.detach().logsumexp(-1)


def sdpa_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention by torch's kernels, which cap no scores.

    It is scaled_dot_product_attention, and for segments on GPUs varlen_attn. On CPUs torch has no kernel for segments:
    there their mask is made in every layer. The logarithm of sums is given on CPUs, and for segments on GPUs.
    """
    assert softcap is None, "registered without"
    if segments is not None and q_BSNH.is_cuda and q_BSNH.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q_BSNH, k_BCKH, v_BCKH, segments, causal, scale)
    q, k, v = (t.transpose(1, 2) for t in (q_BSNH, k_BCKH, v_BCKH))
    if q.device.type == "cpu":
        if (dtype := q.dtype) == torch.float16:  # of which torch's kernel makes products in plain loops
            q, k, v = q.float(), k.float(), v.float()
        bias = None
        if segments is not None:
            bias = q.new_zeros(()).where(segments.mask(causal), -inf).unsqueeze(1)
        # What scaled_dot_product_attention takes on CPUs, with the sums that it hides.
        y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal and segments is None, attn_mask=bias, scale=scale
        )
        return y.transpose(1, 2).to(dtype), lse.detach()
    mask = None if segments is None else segments.mask(causal).unsqueeze(1)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )
    return y.transpose(1, 2), None


@functools.cache
def _arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _varlen_attention(
    q_BSNH: Tensor, k_BCKH: Tensor, v_BCKH: Tensor, segments: Segments, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Every segment as a sequence of its own, by torch's flash attention for sequences of several lengths."""
    from torch.nn.attention import varlen  # a second's imports, for GPUs alone

    batch, seq, heads, width = q_BSNH.shape
    known = _arguments_of(varlen.varlen_attn)
    if "scale" not in known and scale is not None:  # torch 2.11
        q_BSNH = q_BSNH * (scale * width**0.5)
    bounds, longest = segments.lengths()
    q, k, v = (t.flatten(0, 1) for t in (q_BSNH, k_BCKH, v_BCKH))
    options: dict[str, Any] = {"return_aux": varlen.AuxRequest(lse=True)}
    options |= {"is_causal": causal} if "is_causal" in known else {"window_size": (-1, 0) if causal else (-1, -1)}
    if "scale" in known:
        options["scale"] = scale
    if "enable_gqa" in known:
        options["enable_gqa"] = k.shape[1] != heads
    elif k.shape[1] != heads:
        k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    y, lse_NT = varlen.varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
    return y.view(batch, seq, heads, width), lse_NT.detach().view(heads, batch, seq).transpose(0, 1)


def _bias(q_PSH: Tensor, keys: int, causal: bool, segments: Segments | None, heads: int) -> Tensor:
    """Additive mask, 0 where a query sees a key and -inf elsewhere.

    Returns:
        [S, C], or [P, S, C] with segments; [1, 1] where every key is seen.
    """
    seq = q_PSH.shape[1]
    if segments is not None:
        hidden = ~segments.mask(causal).repeat_interleave(heads, dim=0)
        return q_PSH.new_zeros(hidden.shape).masked_fill_(hidden, -inf)
    if causal:
        assert keys == seq, "causal attention is over whole sequences"
        return _causal_bias(seq, q_PSH.dtype, q_PSH.device)
    return q_PSH.new_zeros(1, 1)


@functools.lru_cache(maxsize=4)
def _causal_bias(seq: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Causal additive mask [S, S], made once per shape and shared by all layers and steps."""
    return torch.full((seq, seq), -inf, dtype=dtype, device=device).triu_(1)


class _Blocked(torch.autograd.Function):
    """softmax(scale q k^T + bias) v, a block of queries at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool, scale: float) -> Tensor:
        y, probabilities = torch.empty_like(q), []
        for start, stop, seen in _blocks(q, k, causal):
            scores = torch.baddbmm(
                _part(bias, start, stop, seen), q[:, start:stop], k[:, :seen].transpose(1, 2), alpha=scale
            )
            p = torch.softmax(scores, dim=-1)
            y[:, start:stop] = torch.bmm(p, v[:, :seen])
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, *probabilities)
        ctx.causal, ctx.scale = causal, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (dy,) = grads
        q, k, v, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (start, stop, seen), p in zip(_blocks(q, k, ctx.causal), probabilities, strict=True):
            dy_block = dy[:, start:stop]
            dv[:, :seen].baddbmm_(p.transpose(1, 2), dy_block)
            dp = torch.bmm(dy_block, v[:, :seen].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            dq[:, start:stop] = torch.bmm(ds, k[:, :seen])
            dk[:, :seen].baddbmm_(ds.transpose(1, 2), q[:, start:stop])
        return dq, dk, dv, None, None, None


def _blocks(q: Tensor, k: Tensor, causal: bool) -> list[tuple[int, int, int]]:
    """(first query, end, number of keys that these queries may see) of every block."""
    seq, keys = q.shape[1], k.shape[1]
    ends = [(start, min(start + QUERIES, seq)) for start in range(0, seq, QUERIES)]
    return [(start, stop, stop if causal else keys) for start, stop in ends]


def _part(bias: Tensor, start: int, stop: int, seen: int) -> Tensor:
    return bias if bias.shape[-2:] == (1, 1) else bias[..., start:stop, :seen]


def _lengths_for_varlen(segments: Segments, dtype: torch.dtype) -> None:
    if segments.ids.is_cuda and dtype in (torch.bfloat16, torch.float16):
        segments.lengths()


# What backends ask of the segments of a batch and the compute type before the first layer, where no compiler looks.
PREPARATIONS: dict[str, Callable[[Segments, torch.dtype], object]] = {"sdpa": _lengths_for_varlen}
register_kernel("attention", "blocked", avoid=_avoid_blocked, kinds=("plain",))(blocked_attention)
register_kernel("attention", "sdpa", kinds=("plain",))(sdpa_attention)
register_kernel("attention", "reference")(reference_attention)
