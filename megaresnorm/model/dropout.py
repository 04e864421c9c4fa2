"""Dropout masks of a whole stream, the same in every parallel layout.

T tokens (batch * seq)
"""

import functools
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.dropout import dropout
from megaresnorm.parallel.layouts import TensorLayout


class DropoutKey(NamedTuple):
    """What the masks of a batch are a function of: the run's seed and the global number of every row [T]. A pipeline divides its
    tensors as it divides the batch.
    """

    seed: int
    rows: Tensor

    def of_stream(self, layout: TensorLayout, dim: int, num_blocks: int) -> "DropoutMasks":
        """The masks of what this rank has of a stream of width ``dim``."""
        keys = _keys(self.seed, 2 * num_blocks + 1, self.rows.device)
        return DropoutMasks(keys, layout.tokens(self.rows), layout.first_column(layout.width(dim)))


class DropoutMasks(NamedTuple):
    """Of a stream. keys: 64 random bits for every place of the model.   rows, first_column: global numbers, of every row [T] and of
    the first column.
    """

    keys: Tensor
    rows: Tensor
    first_column: int

    def drop(self, x: Tensor, probability: float, site: int) -> Tensor:
        """Dropout at one place of the model: site 2 i is the attention of block i, 2 i + 1 its FFN, and the embedding the last."""
        return dropout(x, probability, self.keys[site], self.rows, self.first_column)


@functools.lru_cache(maxsize=4)
def _keys(seed: int, num_sites: int, device: torch.device) -> Tensor:
    """A tensor, made once: torch.compile would take a number that differs between blocks for a float."""
    digests = (blake2b(f"{seed}/{site}".encode(), digest_size=8).digest() for site in range(num_sites))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=device)
