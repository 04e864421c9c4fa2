"""Every gradient reduction that data parallelism does not do, in one explicit list."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.wide import no_gradient


class Reduction(NamedTuple):
    """Gradients to be summed over an axis once a step, after all microbatches and after data parallelism."""

    why: str
    axis: Axis
    parameters: tuple[nn.Parameter, ...]


def reductions(
    partial: Iterable[nn.Parameter], tied: nn.Parameter | None, *, tp: Axis, embedding: Axis
) -> list[Reduction]:
    """The reductions that a rank's stages need.

    Args:
        partial: parameters for which every tensor-parallel rank has a partial sum of the gradient.
        tied: this rank's copy of an embedding that is also the output matrix, on the first and last stage of a
            pipeline; None where it has none.
    """
    found = []
    if tp.size > 1 and (members := tuple(partial)):
        found.append(Reduction("partial sums over tp", tp, members))
    if embedding.size > 1 and tied is not None:
        found.append(Reduction("tied embeddings of the first and last stage", embedding, (tied,)))
    return found


def reduce_gradients(found: Sequence[Reduction]) -> None:
    """Sum the gradients in place. A parameter without a gradient counts as zeros. Collective.

    Communication:
        For each reduction one all-reduce of all its gradients together, or one for each dtype among them.
    """
    for reduction in found:
        for p in reduction.parameters:
            p.grad = no_gradient(p) if p.grad is None else p.grad
        gradients = [local(p.grad) for p in reduction.parameters if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            same = [g for g in gradients if g.dtype == dtype]
            summed = all_reduce(torch.cat([g.flatten() for g in same]), reduction.axis)
            for g, total in zip(same, summed.split([g.numel() for g in same]), strict=True):
                g.copy_(total.view_as(g))
