"""Norms of heads and rotary positions in Triton: one pass over the fused q, k, v forward, one backward.

A program has a block of tokens and up to GROUP heads, which are all of q, or of k, or of v: the rows of the tables that
its tokens need stay in registers while it goes from head to head. A head is two tiles, its halves, which are rotated
against each other. In backward a program writes its sums for the norm's weights as one row of FP32; these rows are
added in a fixed order: no atomics.

B batch   S seq   T tokens (B * S)   J all heads, N of queries and 2 K of keys and values   H head width
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.custom_op import launcher
from megaresnorm.kernels.rotary import RotarySpec

NORMS = {"none": 0, "rmsnorm": 1, "layernorm": 2}
GROUP = 8


@triton.jit
def _part(HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of tokens in int64, number of its group, whose heads they are (0 q, 1 k, 2 v) and which."""
    q_groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    k_groups: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    block = tl.program_id(0) // (q_groups + 2 * k_groups)
    group = tl.program_id(0) - block * (q_groups + 2 * k_groups)
    part = (group >= q_groups).to(tl.int32) + (group >= q_groups + k_groups).to(tl.int32)
    first = group * GROUP
    end = HEADS
    if part > 0:
        first = (group - q_groups - (part - 1) * k_groups) * GROUP
        end = KV_HEADS
    return block.to(tl.int64), group, part, first, tl.minimum(first + GROUP, end)


@triton.jit
def _tables(cos, sin, token, seq, cols, mask, HALF: tl.constexpr, EACH: tl.constexpr):
    """cos and sin of every token, those of the second half of a head; EACH: of every token of a batch, not of a row."""
    row = token
    if not EACH:
        row = (token.to(tl.int32) % seq).to(tl.int64)
    at = row[:, None] * (2 * HALF) + cols[None, :]
    return tl.load(cos + HALF + at, mask=mask, other=0.0), tl.load(sin + HALF + at, mask=mask, other=0.0)


@triton.jit
def _halves(ptr, at, mask, HALF: tl.constexpr):
    """Both halves of a head in FP32."""
    low = tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)
    return low, tl.load(ptr + HALF + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, at, low, high, mask, HALF: tl.constexpr):
    tl.store(ptr + at, low.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + HALF + at, high.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unit(low, high, mask, eps, HALF: tl.constexpr, NORM: tl.constexpr):
    """A head with mean 0 (LayerNorm) and mean square 1, and 1 / deviation; in two passes over registers."""
    if NORM == 2:
        mean = ((tl.sum(low, 1) + tl.sum(high, 1)) / (2 * HALF))[:, None]
        low = tl.where(mask, low - mean, 0.0)
        high = tl.where(mask, high - mean, 0.0)
    variance = tl.sum(low * low + high * high, 1) / (2 * HALF)
    reciprocal = tl.div_rn(variance * 0.0 + 1.0, tl.sqrt_rn(variance + eps))[:, None]
    return low * reciprocal, high * reciprocal, reciprocal


@triton.jit
def _vectors(ptr, cols, col_mask, HALF: tl.constexpr):
    """Both halves of a row of FP32 numbers, one a column."""
    low = tl.load(ptr + cols, mask=col_mask, other=0.0)[None, :]
    return low, tl.load(ptr + HALF + cols, mask=col_mask, other=0.0)[None, :]


@triton.jit(do_not_specialize=["tokens", "seq"])
def forward_kernel(
    qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, q, k, v, tokens, seq, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EACH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """q = rotated(norm(q)), k likewise, v copied; cos and sin are None for no rotation, weights without a norm.

    Reads qkv and writes q, k and v, each once: 4 bytes an element in BF16. Tables are FP32, H numbers a token and group
    of heads.
    """
    block, _group, part, first, end = _part(HEADS, KV_HEADS, GROUP)
    token, cols = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    col_mask = cols < HALF
    mask = (token < tokens)[:, None] & col_mask[None, :]
    out, heads, before = q, HEADS, 0
    if part == 1:
        out, heads, before = k, KV_HEADS, HEADS
    if part == 2:
        out, heads, before = v, KV_HEADS, HEADS + KV_HEADS
    source = token[:, None] * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + cols[None, :]
    target = token[:, None] * (heads * (2 * HALF)) + cols[None, :]
    if part == 2:
        for head in range(first, end):
            low, high = _halves(qkv, source + (before + head) * (2 * HALF), mask, HALF)
            _store(out, target + head * (2 * HALF), low, high, mask, HALF)
    else:
        if cos is not None:
            c, s = _tables(cos, sin, token, seq, cols, mask, HALF, EACH)
        if NORM:
            weight = q_weight
            if part == 1:
                weight = k_weight
            w_low, w_high = _vectors(weight, cols, col_mask, HALF)
            if q_bias is not None:
                bias = q_bias
                if part == 1:
                    bias = k_bias
                b_low, b_high = _vectors(bias, cols, col_mask, HALF)
        for head in range(first, end):
            low, high = _halves(qkv, source + (before + head) * (2 * HALF), mask, HALF)
            if NORM:
                low, high, _reciprocal = _unit(low, high, mask, eps, HALF, NORM)
                low, high = low * w_low, high * w_high
                if q_bias is not None:
                    low, high = low + b_low, high + b_high
                low = low.to(out.dtype.element_ty).to(tl.float32)
                high = high.to(out.dtype.element_ty).to(tl.float32)
            if cos is not None:
                low, high = low * c - high * s, high * c + low * s
            _store(out, target + head * (2 * HALF), low, high, mask, HALF)


@triton.jit
def _norm_gradient(low, high, unit_low, unit_high, reciprocal, HALF: tl.constexpr, NORM: tl.constexpr):
    """(g - mean(g) - unit mean(g unit)) / deviation, without mean(g) for RMSNorm."""
    inner = (tl.sum(low * unit_low + high * unit_high, 1) / (2 * HALF))[:, None]
    if NORM == 2:
        mean = (tl.sum(low + high, 1) / (2 * HALF))[:, None]
        low, high = low - mean, high - mean
    return (low - unit_low * inner) * reciprocal, (high - unit_high * inner) * reciprocal


@triton.jit(do_not_specialize=["tokens", "seq"])
def backward_kernel(
    dq, dk, dv, qkv, cos, sin, q_weight, k_weight, d_qkv, partial, tokens, seq, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    EACH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """d_qkv, and this program's shares of the gradients of weight and bias in ``partial`` [2, groups, blocks, H].

    Those are the groups of q, then of k. With unit = (x - mean) / deviation and g the gradient that was rotated back,
    d_weight = sum of g unit, d_bias = sum of g; and the head's own, with g weight in the place of g,
    (g - mean(g) - unit mean(g unit)) / deviation, without mean(g) for RMSNorm.

    Reads dq, dk and dv, with a norm q and k, and writes d_qkv, each once: 4 bytes an element in BF16, 6 of q and k with
    a norm.
    """
    block, group, part, first, end = _part(HEADS, KV_HEADS, GROUP)
    token, cols = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    col_mask = cols < HALF
    mask = (token < tokens)[:, None] & col_mask[None, :]
    given, heads, before = dq, HEADS, 0
    if part == 1:
        given, heads, before = dk, KV_HEADS, HEADS
    if part == 2:
        given, heads, before = dv, KV_HEADS, HEADS + KV_HEADS
    source = token[:, None] * (heads * (2 * HALF)) + cols[None, :]
    target = token[:, None] * ((HEADS + 2 * KV_HEADS) * 2 * HALF) + cols[None, :]
    if part == 2:
        for head in range(first, end):
            low, high = _halves(given, source + head * (2 * HALF), mask, HALF)
            _store(d_qkv, target + (before + head) * (2 * HALF), low, high, mask, HALF)
    else:
        if cos is not None:
            c, s = _tables(cos, sin, token, seq, cols, mask, HALF, EACH)
        if NORM:
            weight = q_weight
            if part == 1:
                weight = k_weight
            w_low, w_high = _vectors(weight, cols, col_mask, HALF)
        a_low = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        a_high = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        b_low = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        b_high = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        for head in range(first, end):
            low, high = _halves(given, source + head * (2 * HALF), mask, HALF)
            if NORM:
                x_low, x_high = _halves(qkv, target + (before + head) * (2 * HALF), mask, HALF)
            if cos is not None:
                low, high = low * c + high * s, high * c - low * s
            if NORM:
                x_low, x_high, reciprocal = _unit(x_low, x_high, mask, eps, HALF, NORM)
                a_low += low * x_low
                a_high += high * x_high
                if BIASED:
                    b_low += low
                    b_high += high
                low, high = low * w_low, high * w_high
                low, high = _norm_gradient(low, high, x_low, x_high, reciprocal, HALF, NORM)
            _store(d_qkv, target + (before + head) * (2 * HALF), low, high, mask, HALF)
        if NORM:
            groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP + (KV_HEADS + GROUP - 1) // GROUP
            blocks = tl.cdiv(tokens, BLOCK_T)
            at = partial + (group * blocks + block) * (2 * HALF) + cols
            _store(at, 0, tl.sum(a_low, 0), tl.sum(a_high, 0), col_mask, HALF)
            if BIASED:
                bias_at = groups * blocks * (2 * HALF)
                _store(at, bias_at, tl.sum(b_low, 0), tl.sum(b_high, 0), col_mask, HALF)


def _shape(width: int, numbers: int) -> tuple[int, int]:
    """Tokens and padded columns of half a head, of which a tile has ``numbers``."""
    block_h = triton.next_power_of_2(width // 2)
    return max(1, numbers // block_h), block_h


def _groups(heads: int, kv_heads: int) -> tuple[int, int]:
    return triton.cdiv(heads, GROUP), triton.cdiv(kv_heads, GROUP)


def forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, q_weight: Tensor | None, q_bias: Tensor | None,
    k_weight: Tensor | None, k_bias: Tensor | None, spec: RotarySpec, q: Tensor, k: Tensor, v: Tensor,
) -> None:  # fmt: skip
    """Fill q, k and v, as ``RotaryBackend.forward``."""
    batch, seq, heads, width = q.shape
    tokens, (q_groups, k_groups) = batch * seq, _groups(heads, spec.kv_heads)
    if tokens == 0:
        return
    block_t, block_h = _shape(width, 2048)
    launcher(forward_kernel)[(triton.cdiv(tokens, block_t) * (q_groups + 2 * k_groups),)](
        qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, q, k, v, tokens, seq, spec.eps,
        heads, spec.kv_heads, width // 2, NORMS[spec.norm], cos is not None and cos.dim() == 3,
        block_t, block_h, GROUP, num_warps=4,
    )  # fmt: skip


def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, spec: RotarySpec, d_qkv: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fill d_qkv and return the weights' gradients, as ``RotaryBackend.backward``."""
    batch, seq, heads, width = dq.shape
    tokens, (q_groups, k_groups) = batch * seq, _groups(heads, spec.kv_heads)
    normed = spec.norm != "none"
    block_t, block_h = _shape(width, 1024 if normed else 2048)
    blocks = triton.cdiv(tokens, block_t)
    partial = None
    if normed:
        partial = dq.new_empty((1 + spec.biased, q_groups + k_groups, blocks, width), dtype=torch.float32)
    if tokens:
        launcher(backward_kernel)[(blocks * (q_groups + 2 * k_groups),)](
            dq, dk, dv, qkv, cos, sin, q_weight, k_weight, d_qkv, partial, tokens, seq, spec.eps,
            heads, spec.kv_heads, width // 2, NORMS[spec.norm], spec.biased, cos is not None and cos.dim() == 3,
            block_t, block_h, GROUP, num_warps=4,
        )  # fmt: skip
    if partial is None:
        return ()
    return tuple(part.flatten(0, 1).sum(0) for sums in partial for part in sums.split((q_groups, k_groups)))
