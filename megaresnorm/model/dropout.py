"""Dropout masks of a whole stream, the same in every parallel layout.

T tokens (batch * seq)
"""

import functools
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.dropout import Dropout
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.parallel.layouts import TensorLayout


class DropoutKey(NamedTuple):
    """All that the masks of a batch depend on. A pipeline splits its tensors into microbatches as it splits the batch.

    Attributes:
        seed: the run's.
        rows: the global number of every row, [T].
    """

    seed: int
    rows: Tensor

    @classmethod
    def of_samples(cls, seed: int, samples: Tensor, seq_len: int) -> "DropoutKey":
        """That of samples by their number in the data, of ``seq_len`` tokens each."""
        rows = samples.unsqueeze(1) * seq_len + torch.arange(seq_len, device=samples.device)
        return cls(seed, rows.flatten())

    def of_stream(self, layout: TensorLayout, dim: int, num_sublayers: int) -> "DropoutMasks":
        """The masks of this rank's share of a stream of width ``dim``."""
        keys = _keys(self.seed, num_sublayers + 1, self.rows.device)
        return DropoutMasks(keys, layout.tokens(self.rows), layout.first_column(layout.width(dim)))


class DropoutMasks(NamedTuple):
    """The dropout masks of a stream, or of a rank's share of it.

    Attributes:
        keys: 64 random bits for every place of the model, or of some of its blocks.
        rows: the global number of every row, [T].
        first_column: the global number of the first column.
    """

    keys: Tensor
    rows: Tensor
    first_column: int

    def of_blocks(self, first: int, count: int) -> "DropoutMasks":
        """The masks of some blocks. Their numbers are gone: equal blocks then differ in the keys' values alone."""
        sites = slice(first * len(SUBLAYERS), (first + count) * len(SUBLAYERS))
        return self._replace(keys=self.keys[sites])

    def at(self, site: int, probability: float) -> Dropout:
        """Dropout at one place of the model.

        Args:
            site: the index of the sub-layer among those that ``keys`` are of, or after the model's last the embedding.
        """
        return Dropout(probability, self.keys[site], self.rows, self.first_column)


@functools.lru_cache(maxsize=4)
def _keys(seed: int, num_sites: int, device: torch.device) -> Tensor:
    """A tensor, made once: torch.compile would take a number that differs between blocks for a float."""
    digests = (blake2b(f"{seed}/{site}".encode(), digest_size=8).digest() for site in range(num_sites))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=device)
