"""Batches of samples. The loader's state is one integer: the samples consumed so far, whatever the number of ranks."""

from collections.abc import Iterator
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaresnorm.data.samples import Samples
from megaresnorm.parallel.mesh import ParallelContext


class Batch(NamedTuple):
    """B sequences of S tokens.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64, the token that follows each one; -1 where there is none to predict.
        samples: [B], their global numbers.
        documents: [B, S], the number of each token's document in its row; None where documents are not kept apart.
    """

    tokens: Tensor
    labels: Tensor
    samples: Tensor
    documents: Tensor | None = None


def microbatches(
    samples: Samples,
    position: int,
    count: int,
    micro: int,
    context: ParallelContext,
    device: torch.device,
    *,
    mask_documents: bool = False,
) -> Iterator[Batch]:
    """This rank's share of samples ``position`` to ``position + count - 1``, in microbatches.

    With several ranks all have the same number of microbatches, all of the same shape: where samples are missing,
    others stand in without labels.

    Args:
        position: number of samples consumed before.
        count: samples on all dp ranks together.
        micro: samples of a microbatch; on a single rank the last one may be smaller.
        mask_documents: keep documents apart; the first token of the next document is then no label.
    """
    data = context.dp
    mine = list(range(position + data.rank, position + count, data.size))
    wanted = len(mine)
    if context.world.size > 1:
        wanted = ceil(ceil(count / data.size) / micro) * micro
    fillers = wanted - len(mine)
    mine += [position] * fillers
    for start in range(0, wanted, micro):
        numbers = mine[start : start + micro]
        tokens, documents = (
            torch.from_numpy(np.stack(column)).to(device) for column in zip(*(samples[i] for i in numbers), strict=True)
        )
        labels = tokens[:, 1:].clone()  # written below; .contiguous() of a single row would still be a view of tokens
        if mask_documents:
            labels = labels.masked_fill(documents[:, 1:] != documents[:, :-1], -1)
        empty = max(0, start + len(numbers) - (wanted - fillers))
        if empty:
            labels[len(numbers) - min(empty, len(numbers)) :] = -1
        inside = documents[:, :-1].contiguous() if mask_documents else None
        yield Batch(tokens[:, :-1], labels, torch.tensor(numbers, device=device), inside)
