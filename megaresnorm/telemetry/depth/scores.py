"""Attention's scores beside the kernel that computes them: the largest, and the entropy of its probabilities.

N query heads   K key/value heads   G = N / K   H head width   B batch   S seq   Q queries of a chunk   C keys of them
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.model.branches.attention import Attention
from megaresnorm.recompute import is_running_again
from megaresnorm.telemetry.depth.rows import stride_of
from megaresnorm.telemetry.depth.scratch import Scratch
from megaresnorm.telemetry.depth.streams import blocks_of
from megaresnorm.telemetry.wrapped import Wrapped

SCORES = 1 << 22  # that are in memory at a time
QUERIES = 64  # of a sequence, at most, whose entropy is taken

Seen = Callable[[int, Tensor, Tensor, Mapping[str, Any]], None]


class AttentionWatch:
    """Watches the attention of every block of this rank.

    Args:
        seen: called with (block, q [N, B, S, H], k [K, B, S, H], options) where attention is computed for the first
            time. The heads are normalised and rotated, contiguous, and not to be kept; options has scale, segments and
            softcap, where there are some.
    """

    def __init__(self, assembled: Assembled, seen: Seen) -> None:
        self._assembled, self._seen, self._scratch = assembled, seen, Scratch(assembled.device)

    def wrap(self, wrapped: Wrapped) -> None:
        """Begin to watch."""
        for number, block in blocks_of(self._assembled):
            for residual in block.sublayers:
                if isinstance(branch := residual.branch, Attention):
                    wrapped.method(branch, "attend", self._around_rotated(number))
                    if branch.fused_attention is not None:
                        wrapped.method(branch, "fused_attention", self._around_fused(number))

    def _around_rotated(self, block: int) -> Callable[[Callable], Callable]:
        def around(attend: Callable) -> Callable:
            def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
                if not is_running_again():
                    with torch.no_grad():
                        self._seen(block, self._by_head("q", q), self._by_head("k", k), options)
                return attend(q, k, v, **options)

            return watched

        return around

    def _around_fused(self, block: int) -> Callable[[Callable], Callable]:
        def around(fused: Callable) -> Callable:
            def watched(qkv: Tensor, kv_heads: int, **options: Any) -> Any:
                if not is_running_again():
                    with torch.no_grad():
                        qk = self._by_head("q", qkv[:, :, : qkv.shape[2] - kv_heads])
                        if (cos := options.get("cos")) is not None:
                            qk = self._rotated(qk, cos, options["sin"])
                        self._seen(block, qk[:-kv_heads], qk[-kv_heads:], options)
                return fused(qkv, kv_heads, **options)

            return watched

        return around

    def _by_head(self, name: str, x_BSNH: Tensor) -> Tensor:
        """[N, B, S, H], contiguous, so that tables of positions and products have their rows one after the other."""
        x = x_BSNH.permute(2, 0, 1, 3)
        return self._scratch(name, x.shape, x.dtype).copy_(x)

    def _rotated(self, x_NBSH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As ``rotate`` of kernels/rotary.py."""
        exchanged, half = self._scratch("exchanged", x_NBSH.shape, x_NBSH.dtype), x_NBSH.shape[-1] // 2
        exchanged[..., :half].copy_(x_NBSH[..., half:])
        exchanged[..., half:].copy_(x_NBSH[..., :half])
        turned = torch.mul(x_NBSH, cos, out=self._scratch("turned", x_NBSH.shape, cos.dtype))
        return turned.addcmul_(exchanged, sin).to(x_NBSH.dtype)


class LargestScores:
    """The largest score of each block in a step."""

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self._num_blocks, self._device, self._scratch = num_blocks, device, Scratch(device)
        self._found: list[tuple[int, Tensor]] = []

    @torch.no_grad()
    def see(self, block: int, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        """Take note of the scores of a pass: over its heads and all pairs that attention allows, before a softcap."""
        self._found += [(block, scores.amax()) for scores in _scores(q, k, options, self._scratch)]

    def largest(self) -> Tensor:
        """[num_blocks] FP64; -inf where there was none."""
        largest = torch.full((self._num_blocks,), -inf, dtype=torch.float64, device=self._device)
        if self._found:
            blocks, found = zip(*self._found, strict=True)
            largest.scatter_reduce_(0, torch.tensor(blocks, device=self._device), torch.stack(found).double(), "amax")
        return largest


class Entropies:
    """The entropy of attention's probabilities, in nats, of every n-th query.

    Attributes:
        sums: [num_blocks, 2] FP64: over heads and queries of this rank, and how many there were.

    Source:
        Zhai et al., arXiv:2303.06296, section 2.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_blocks, 2, dtype=torch.float64, device=device)
        self._scratch = Scratch(device)

    @torch.no_grad()
    def see(self, block: int, q: Tensor, k: Tensor, options: Mapping[str, Any]) -> None:
        """Add those of a pass, of scores that are capped where the model caps them."""
        stride = stride_of(1, q.shape[2], QUERIES)
        for scores in _scores(q, k, options, self._scratch, options.get("softcap"), stride):
            entropies = torch.special.entr(scores.softmax(-1)).sum(-1)
            self.sums[block, 0] += entropies.sum().double()
            self.sums[block, 1] += entropies.numel()


def _scores(
    q: Tensor, k: Tensor, options: Mapping[str, Any], scratch: Scratch, softcap: float | None = None, stride: int = 1
) -> Iterator[Tensor]:
    """Scaled scores [K, B, G, Q, C] of every ``stride``-th query, in FP32 or wider, -inf where a key is not seen.

    Queries come in chunks, so that at most ``SCORES`` numbers are in memory, or those of one query.
    """
    (heads, batch, seq, width), kv_heads = q.shape, len(k)
    wide = torch.promote_types(q.dtype, torch.float32)
    scale, segments, group = options.get("scale"), options.get("segments"), heads // kv_heads
    scale = width**-0.5 if scale is None else scale
    keys = k.to(wide).view(kv_heads * batch, seq, width).transpose(1, 2)
    count = stride * max(1, SCORES // (batch * heads * seq))
    for start in range(0, seq, count):
        queries = range(seq)[start : start + count : stride]
        end = queries[-1] + 1
        part = q if len(queries) == seq else q[:, :, start:end:stride]
        part = part.to(wide).view(kv_heads, group, batch, len(queries), width).transpose(1, 2)
        part = part.reshape(kv_heads * batch, -1, width)
        hidden = _causal_bias(start, end, stride, group, wide, q.device)
        out = scratch("scores", (kv_heads * batch, group * len(queries), end), wide)
        scores = torch.baddbmm(hidden, part, keys[..., :end], beta=int(softcap is None), alpha=scale, out=out)
        scores = scores.view(kv_heads, batch, group, len(queries), end)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap).add_(hidden.view(group, len(queries), end))
        if segments is not None:
            first = segments.first[:, start:end:stride]
            earlier = torch.arange(end, device=q.device) < first.unsqueeze(-1)
            scores.masked_fill_(earlier.unsqueeze(1), -inf)
        yield scores


@functools.lru_cache(maxsize=2)
def _causal_bias(start: int, stop: int, stride: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[G * Q, C], -inf where queries do not see a key that comes after them; made once for all blocks."""
    queries = torch.arange(start, stop, stride, device=device)
    later = torch.arange(stop, device=device) > queries.unsqueeze(1)
    return torch.zeros(later.shape, dtype=dtype, device=device).masked_fill_(later, -inf).repeat(group, 1)
