"""Embedding and loss whose vocabulary is sharded over a tensor-parallel axis; on one rank they are the plain ones.

T tokens   V vocabulary
"""

import torch
from torch import Tensor, nn

from megaresnorm.kernels.cross_entropy import CrossEntropyKernel, LogitForm, LossOfPieces, LossPieces
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.wide import look_up


class Embedding(nn.Module):
    """Rows of a table [num_rows, dim], looked up by number.

    F.embedding and not ``weight[ids]``: the backward of indexing adds in an order that differs from run to run when
    there are several threads.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [*ids.shape, dim]; those of a table in BF16 in FP32."""
        return look_up(ids, self.weight)


def first_row(num_rows: int, axis: Axis) -> int:
    """The token of this rank's first row of ``num_rows`` that are sharded over the axis, and of its first logit."""
    return axis.rank * (num_rows // axis.size)


class VocabEmbedding(Embedding):
    """An embedding whose rows are sharded over the axis.

    Args:
        num_rows: rows of the whole table.
    """

    def __init__(self, num_rows: int, dim: int, axis: Axis) -> None:
        assert num_rows % axis.size == 0, "checked with the recipe"
        super().__init__(num_rows // axis.size, dim)
        self.axis = axis

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [*ids.shape, dim] as a partial sum, which is zero where another rank has the row. Nothing is sent."""
        if self.axis.size == 1:
            return super().forward(ids)
        rows = self.weight.shape[0]
        local = ids - rows * self.axis.rank
        absent = (local < 0) | (local >= rows)
        return super().forward(local.masked_fill(absent, 0)).masked_fill(absent.unsqueeze(-1), 0.0)


def vocab_parallel_loss(
    pieces: LossPieces, form: LogitForm, axis: Axis, first: int, vocabulary: int
) -> CrossEntropyKernel:
    """The loss of [T, V / p] outputs, whose vocabulary is sharded over the axis; labels are of the whole vocabulary.

    Args:
        form: its columns are those of this rank.
        first: the token of this rank's first column.
        vocabulary: number of tokens on all ranks.

    Communication:
        One all-gather of 3 floats a token; nothing in backward.
    """
    return LossOfPieces(pieces, form, first, vocabulary, lambda statistics_T3: all_gather_blocks(statistics_T3, axis))
