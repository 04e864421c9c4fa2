"""Batches of samples. The whole state is one integer, the number of samples consumed, whatever the number of ranks."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaresnorm.data.dataset import PackedSamples
from megaresnorm.parallel.context import ParallelContext


class Batch(NamedTuple):
    """B sequences: tokens [B, S] and the tokens that follow them [B, S], int64; samples [B], their global numbers.

    documents: [B, S], the number of each token's document in its row, where documents are kept apart.
    """

    tokens: Tensor
    labels: Tensor
    samples: Tensor
    documents: Tensor | None = None


def microbatches(
    samples: PackedSamples, position: int, count: int, micro: int, context: ParallelContext, device: torch.device
) -> Iterator[Batch]:
    """This rank's share of samples position .. position + count - 1, in microbatches of ``micro`` (the last may be smaller)."""
    mine = range(position + context.data_rank, position + count, context.num_data_ranks)
    for start in range(0, len(mine), micro):
        numbers = list(mine[start : start + micro])
        rows = torch.from_numpy(np.stack([samples[i] for i in numbers])).to(device)
        yield Batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.tensor(numbers, device=device))
