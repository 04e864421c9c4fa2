"""Rows of the stream that are looked at one by one, the same ones in every layout, and their angles.

T tokens (batch * seq)   R rows that are sampled   N blocks
"""

from math import pi

import torch
from torch import Tensor

from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.parallel.layouts import TensorLayout

ROWS = 256  # of a microbatch, at most
KEPT = 1 << 20  # elements of sampled rows that wait for the next blocks', so that many angles are a few operations


class SampledRows:
    """Every n-th token of each sequence, so that at most ``ROWS`` of a microbatch are looked at.

    Attributes:
        rows: [R] int64, this rank's among them, as indices of its part of the stream.
    """

    rows: Tensor

    def __init__(self, layout: TensorLayout, device: torch.device) -> None:
        self._layout, self._device = layout, device
        self._known: dict[tuple[int, int], Tensor] = {}

    def begin(self, of: SequenceInfo) -> None:
        """The next rows are those of these sequences."""
        key = of.batch, of.seq
        if key not in self._known:
            chosen = torch.zeros(of.batch, of.seq, dtype=torch.bool)
            chosen[:, :: stride_of(of.batch, of.seq, ROWS)] = True
            self._known[key] = self._layout.tokens(chosen.flatten()).nonzero().flatten().to(self._device)
        self.rows = self._known[key]


def stride_of(batch: int, seq: int, rows: int) -> int:
    """The distance of sampled tokens of a sequence, so that there are at most ``rows``, or one of each sequence.

    >>> stride_of(8, 64, 256), stride_of(1, 4096, 256), stride_of(512, 64, 256)
    (2, 16, 64)
    """
    return -(-seq // max(1, min(seq, rows // batch)))


def angles_of(sums: Tensor) -> Tensor:
    """Cosine and angular distance of rows a and b.

    Args:
        sums: [N, 3, R] of whole rows: a a, a e and e e with e = b - a, by which small angles keep their digits.

    Returns:
        [N, 3]: sums over rows of cos and of arccos(cos) / pi, and the number of rows.

    Source:
        Gromov et al., arXiv:2403.17887 (the angular distance); ShortGPT, arXiv:2403.03853 (1 - cos).
    """
    aa, ae, ee = sums.double().unbind(1)
    cosine = (aa + ae) / (aa * (aa + 2 * ae + ee)).sqrt()
    angle = torch.atan2((aa * ee - ae.square()).clamp(min=0).sqrt(), aa + ae) / pi
    return torch.stack((cosine.sum(1), angle.sum(1), torch.full_like(cosine[:, 0], sums.shape[2])), 1)


class BlockAngles:
    """What angles between the inputs and outputs of consecutive blocks are made of, for one pass through them.

    Attributes:
        found: for blocks (first, last + 1) their sums [n, 3, R], see ``angles_of``.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int, Tensor]] = []
        self._waiting: list[Tensor] = []
        self._first = 0

    def enter(self, block: int, rows_RD: Tensor) -> None:
        """Take the rows at the input of a block, which are those at the output of the block before it."""
        if not self._waiting:
            self._first = block
        self._waiting.append(rows_RD)
        if len(self._waiting) > 1 and len(self._waiting) * rows_RD.numel() >= KEPT:
            self._add_up()
            self._waiting, self._first = [rows_RD], block

    def leave(self, rows_RD: Tensor) -> None:
        """Take the rows at the output of the last block."""
        self._waiting.append(rows_RD)
        self._add_up()
        self._waiting = []

    def _add_up(self) -> None:
        rows = torch.stack(self._waiting)
        a, e = rows[:-1], rows[1:] - rows[:-1]
        sums = torch.stack([(one * other).sum(-1) for one, other in ((a, a), (a, e), (e, e))], 1)
        self.found.append((self._first, self._first + len(a), sums))
