"""Attention over whole sequences: torch's fused kernel, and products over blocks of queries, faster on some CPUs.

B batch   S queries   C keys (S, or more where earlier ones are cached)
N query heads   K key/value heads   H head width
"""

import functools
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import register_kernel

QUERIES = 128  # in one block; the keys after a block are never read


def rotate(x_BSNH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotate every head by its position; computed in the tables' type, returned in x's.

    Args:
        cos_SH: [S, H] or [B, S, H].
        sin_SH: likewise; its first half along H is negative, as model/rotary.py makes it.
    """
    exchanged = x_BSNH.roll(x_BSNH.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BSNH * cos_SH.unsqueeze(-2), exchanged, sin_SH.unsqueeze(-2)).to(x_BSNH.dtype)


class AttentionKernel(Protocol):
    """A backend of attention; ``split_attention`` says what its arguments are."""

    def __call__(
        self,
        qkv_BSJH: Tensor,
        kv_heads: int,
        /,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask_BSC: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal self-attention of whole sequences, [B, S, N, H]."""


def split_attention(attend: Callable[..., Tensor]) -> AttentionKernel:
    """Make an ``attention`` kernel from a function of separate, already rotated q, k and v."""

    def attention(
        qkv_BSJH: Tensor,
        kv_heads: int,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        mask_BSC: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal self-attention of whole sequences.

        Args:
            qkv_BSJH: [B, S, J, H], heads of q, then of k, then of v; J is N + 2 kv_heads.
            cos, sin: as ``rotate`` takes them; None for no rotation.
            mask_BSC: [B, S, S], True where a query sees a key; replaces the causal mask.
            scale: factor of the products q k; H^-0.5 when None.
            softcap: scores become softcap tanh(scores / softcap); None leaves them.
        Returns:
            [B, S, N, H].
        """
        heads = qkv_BSJH.shape[2] - 2 * kv_heads
        qk_BSJH, v_BSKH = qkv_BSJH.split((heads + kv_heads, kv_heads), dim=2)
        if cos is not None and sin is not None:
            qk_BSJH = rotate(qk_BSJH, cos, sin)
        q_BSNH, k_BSKH = qk_BSJH.split((heads, kv_heads), dim=2)
        scores = {"scale": scale} if softcap is None else {"scale": scale, "softcap": softcap}
        return attend(q_BSNH, k_BSKH, v_BSKH, causal=True, mask_BSC=mask_BSC, **scores)

    return attention


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
    causal: bool,
    mask_BSC: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention as ``sdpa_attention``, by matrix products over blocks of queries.

    Scores are rounded to the inputs' type. The probabilities are kept for the backward pass: B * N * S * C / 2 elements
    for causal attention.
    """
    batch, seq, heads, width = q_BSNH.shape
    group = heads // k_BCKH.shape[2]
    causal = causal and mask_BSC is None
    # P = B * N pairs: one batched product for all heads.
    q_PSH = q_BSNH.transpose(1, 2).reshape(batch * heads, seq, width)
    k_PCH, v_PCH = (
        t.repeat_interleave(group, dim=2).transpose(1, 2).flatten(0, 1)
        if group > 1
        else t.transpose(1, 2).reshape(batch * heads, -1, width)
        for t in (k_BCKH, v_BCKH)
    )
    bias = _bias(q_PSH, k_PCH.shape[1], causal, mask_BSC, heads)
    y_PSH = _Blocked.apply(q_PSH, k_PCH, v_PCH, bias, causal, width**-0.5 if scale is None else scale)
    return y_PSH.view(batch, heads, seq, width).transpose(1, 2)


def reference_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    causal: bool,
    mask_BSC: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention as ``sdpa_attention``, written out, in FP32 (or FP64). It alone caps scores.

    Args:
        softcap: scores become softcap tanh(scores / softcap); None leaves them.
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
    if mask_BSC is None and causal:
        mask_BSC = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril().unsqueeze(0)
    if mask_BSC is not None:
        scores = scores.masked_fill(~mask_BSC.unsqueeze(1), -inf)
    return torch.einsum("bnsc,bcnh->bsnh", torch.softmax(scores, dim=-1), v_BCNH).to(q_BSNH.dtype)


def sdpa_attention(
    q_BSNH: Tensor,
    k_BCKH: Tensor,
    v_BCKH: Tensor,
    *,
    causal: bool,
    mask_BSC: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v by torch's scaled_dot_product_attention, which caps no scores.

    Args:
        q_BSNH: N is a multiple of the K key/value heads, each of which serves N / K query heads.
        causal: query i sees keys 0 .. i, and then C must be S.
        mask_BSC: True where a query sees a key; replaces ``causal``.
        scale: H^-0.5 when None.
    Returns:
        [B, S, N, H].
    """
    return F.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BCKH.transpose(1, 2),
        v_BCKH.transpose(1, 2),
        attn_mask=None if mask_BSC is None else mask_BSC.unsqueeze(1),
        is_causal=causal and mask_BSC is None,
        scale=scale,
        enable_gqa=k_BCKH.shape[2] != q_BSNH.shape[2],
    ).transpose(1, 2)


def _bias(q_PSH: Tensor, keys: int, causal: bool, mask_BSC: Tensor | None, heads: int) -> Tensor:
    """Additive mask, 0 where a query sees a key and -inf elsewhere.

    Returns:
        [S, C], or [P, S, C] for a mask; [1, 1] where every key is seen.
    """
    seq = q_PSH.shape[1]
    if mask_BSC is not None:
        hidden = ~mask_BSC.repeat_interleave(heads, dim=0)
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


register_kernel("attention", "blocked", avoid=_avoid_blocked, kinds=("plain",))(split_attention(blocked_attention))
register_kernel("attention", "sdpa", kinds=("plain",))(split_attention(sdpa_attention))
register_kernel("attention", "reference")(split_attention(reference_attention))
