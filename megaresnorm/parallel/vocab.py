"""Embedding and loss whose vocabulary is sharded over a tensor-parallel axis; on one rank they are the plain ones.

T tokens   V vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.kernels.cross_entropy import CrossEntropyKernel, GradientInPlace, row_chunks
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.mesh import Axis


class Embedding(nn.Module):
    """Rows of a table [num_rows, dim], looked up by number.

    F.embedding and not ``weight[ids]``: the backward of indexing adds in an order that differs from run to run when
    there are several threads.
    """

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Rows [*ids.shape, dim]."""
        return F.embedding(ids, self.weight)


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


def vocab_parallel_cross_entropy(axis: Axis, first: int) -> CrossEntropyKernel:
    """``cross_entropy_sums`` of logits whose vocabulary is sharded over the axis.

    The kernel takes [T, V / p] logits, those of the tokens from ``first`` on, and consumes them; labels are of the
    whole vocabulary.

    Args:
        first: the token of this rank's first logit.

    Communication:
        One all-gather of 3 floats a token; nothing in backward.
    """

    def cross_entropy(
        logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        return _VocabParallelCrossEntropy.apply(logits_TV, labels_T, z_loss, scale, first, axis)

    return cross_entropy


class _VocabParallelCrossEntropy(GradientInPlace):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float, first: int, axis: Axis
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        in_place = ctx.needs_input_grad[0] and logits_TV.dtype == wide
        local = labels_T - first
        absent = (local < 0) | (local >= logits_TV.shape[1])
        local = local.masked_fill(absent, 0).unsqueeze(-1)
        label_logit = logits_TV.gather(-1, local).squeeze(-1).to(wide).masked_fill_(absent, 0.0)
        largest = logits_TV.amax(-1).to(wide)
        sums = torch.empty_like(largest)
        for rows in row_chunks(logits_TV):
            p = _shifted_exp(logits_TV[rows], largest[rows], in_place)
            torch.sum(p, -1, out=sums[rows])
        largest_pT, sums_pT, label_pT = all_gather_blocks(
            torch.stack((largest, sums, label_logit), dim=-1), axis
        ).unbind(-1)
        top, valid = largest_pT.amax(0), labels_T >= 0
        log_z = (sums_pT * (largest_pT - top).exp()).sum(0).log_() + top
        nll = torch.where(valid, log_z - label_pT.sum(0), 0.0).sum()
        penalty = torch.where(valid, log_z.square(), 0.0).sum()
        if ctx.needs_input_grad[0]:
            factor = scale * valid.to(wide)
            at_label = (-factor * ~absent).unsqueeze(-1)
            of_p = (factor * (largest - log_z).exp() * (1.0 + 2.0 * z_loss * log_z)).unsqueeze(-1)
            for rows in row_chunks(logits_TV):
                p = logits_TV[rows] if in_place else _shifted_exp(logits_TV[rows], largest[rows], False)
                gradient = p.mul_(of_p[rows]).scatter_add_(-1, local[rows], at_label[rows])
                if not in_place:
                    logits_TV[rows] = gradient
            ctx.gradient = logits_TV
        ctx.mark_non_differentiable(nll)
        return nll, scale * (nll + z_loss * penalty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *GradientInPlace.backward(ctx, *grads), None, None


def _shifted_exp(logits: Tensor, largest: Tensor, in_place: bool) -> Tensor:
    """exp(logits - largest) of every row, in the type of ``largest``."""
    wide = logits if in_place else logits.to(largest.dtype, copy=True)
    return wide.sub_(largest.unsqueeze(-1)).exp_()
