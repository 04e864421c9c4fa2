"""Attention's scores beside the kernel that computes them: the largest, and the entropy of its probabilities.

B batch   S queries   N query heads   K key/value heads   G = N / K   H head width   Q queries of a chunk   C keys
"""

from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.kernels.attention import Segments
from megaresnorm.kernels.rotary import rotate
from megaresnorm.recompute import is_running_again
from megaresnorm.telemetry.depth.rows import stride_of
from megaresnorm.telemetry.wrapped import Wrapped

SCORES = 1 << 22  # that are in memory at a time
QUERIES = 64  # of a sequence, at most, whose entropy is taken

Seen = Callable[[int, Tensor, Tensor, Mapping[str, Any]], None]


def wrap_attention(wrapped: Wrapped, assembled: Assembled, seen: Seen) -> None:
    """Begin to watch the attention of every block of this rank.

    Args:
        seen: called with (block, q [B, S, N, H], k [B, S, K, H], options) where attention is computed for the first
            time. The heads are normalised and rotated; options has scale, and where there are some segments and
            softcap.
    """
    for model in assembled.models.values():
        for number, block in model.blocks.items():
            for residual in block.sublayers:  # type: ignore[union-attr]
                if hasattr(residual.branch, "attend"):
                    wrapped.method(residual.branch, "attend", _around_rotated(int(number), seen))
                    if residual.branch.fused_attention is not None:
                        wrapped.method(residual.branch, "fused_attention", _around_fused(int(number), seen))


def _around_rotated(block: int, seen: Seen) -> Callable[[Callable], Callable]:
    def around(attend: Callable) -> Callable:
        def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            if not is_running_again():
                seen(block, q.detach(), k.detach(), options)
            return attend(q, k, v, **options)

        return watched

    return around


def _around_fused(block: int, seen: Seen) -> Callable[[Callable], Callable]:
    def around(fused: Callable) -> Callable:
        def watched(qkv: Tensor, kv_heads: int, **options: Any) -> Any:
            if not is_running_again():
                with torch.no_grad():
                    qk = qkv.detach()[:, :, : qkv.shape[2] - kv_heads]
                    if options.get("cos") is not None:
                        qk = rotate(qk, options["cos"], options["sin"])
                    seen(block, qk[:, :, :-kv_heads], qk[:, :, -kv_heads:], options)
            return fused(qkv, kv_heads, **options)

        return watched

    return around


class LargestScores:
    """The largest score of each block in a step.

    Attributes:
        largest: [num_blocks] FP64; -inf where there was none.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.largest = torch.full((num_blocks,), -inf, device=device, dtype=torch.float64)

    @torch.no_grad()
    def see(self, block: int, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        """Take note of the scores of a pass: over its heads and all pairs that attention allows, before a softcap."""
        here = self.largest[block]
        for scores in _scores(q, k, options):
            torch.maximum(here, scores.amax().double(), out=here)


class Entropies:
    """The entropy of attention's probabilities, in nats, of every n-th query.

    Attributes:
        sums: [num_blocks, 2] FP64: over heads and queries of this rank, and how many there were.

    Source:
        Zhai et al., arXiv:2303.06296, section 2.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_blocks, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(self, block: int, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        """Add those of a pass, of scores that are capped where the model caps them."""
        for scores in _scores(q, k, options, options.get("softcap"), stride_of(1, q.shape[1], QUERIES)):
            entropies = torch.special.entr(scores.softmax(-1)).sum(-1)
            self.sums[block, 0] += entropies.sum().double()
            self.sums[block, 1] += entropies.numel()


def _scores(
    q: Tensor, k: Tensor, options: Mapping[str, Any], softcap: float | None = None, stride: int = 1
) -> Iterator[Tensor]:
    """Scaled scores [B, K, G, Q, C] of every ``stride``-th query, in FP32 or wider, -inf where a key is not seen.

    Queries come in chunks, so that at most ``SCORES`` numbers are in memory, or those of one query.
    """
    (batch, seq, heads, width), kv_heads = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    scale, segments = options.get("scale"), options.get("segments")
    scale = width**-0.5 if scale is None else scale
    keys = k.to(wide).permute(0, 2, 3, 1).reshape(batch * kv_heads, width, seq)
    count = stride * max(1, SCORES // (batch * heads * seq))
    for start in range(0, seq, count):
        queries = range(seq)[start : start + count : stride]
        part = q[:, queries.start : queries[-1] + 1 : stride].to(wide) * scale
        part = part.view(batch, len(queries), kv_heads, -1, width).permute(0, 2, 3, 1, 4)
        scores = torch.bmm(part.reshape(batch * kv_heads, -1, width), keys[..., : queries[-1] + 1])
        scores = scores.view(batch, kv_heads, -1, len(queries), queries[-1] + 1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        yield scores.masked_fill_(_hidden(queries, segments, q.device), -inf)


def _hidden(queries: range, segments: Segments | None, device: torch.device) -> Tensor:
    """Which keys these queries do not see, [Q, C], with segments [B, 1, 1, Q, C]."""
    keys = torch.arange(queries[-1] + 1, device=device)
    hidden = keys > torch.arange(queries.start, queries.stop, queries.step, device=device).unsqueeze(1)
    if segments is None:
        return hidden
    first = segments.first[:, queries.start : queries[-1] + 1 : queries.step]
    return (hidden | (keys < first.unsqueeze(-1)))[:, None, None]
