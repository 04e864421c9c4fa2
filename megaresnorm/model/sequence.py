"""The sequences that the rows of the flat stream make up, and the cache of generation.

B batch   S seq   C cached tokens   K key/value heads   H head width
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaresnorm.kernels.attention import Segments


class SequenceInfo(NamedTuple):
    """The rows of the flat stream: ``batch`` sequences of ``seq`` tokens, each at a position of its document.

    Attributes:
        positions: [S], or [B, S] where documents are kept apart.
        cos, sin: rotary tables of the positions, [S, H] or [B, S, H]; None with other positions.
        segments: documents that are kept apart; None: a token sees all before it.
        cache: keys and values of earlier tokens, in generation.
    """

    batch: int
    seq: int
    positions: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    segments: Segments | None = None
    cache: "KeyValueCache | None" = None


class KeyValueCache:
    """Keys and values [B, C, K, H] of the tokens that every attention layer has seen, for generation.

    Attributes:
        num_tokens: C. The model counts it up once all layers have seen new tokens.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: nn.Module, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values, and return all of them, the oldest first."""
        if layer in self._seen:
            k_BSKH, v_BSKH = (torch.cat(both, dim=1) for both in zip(self._seen[layer], (k_BSKH, v_BSKH), strict=True))
        self._seen[layer] = k_BSKH, v_BSKH
        return k_BSKH, v_BSKH
