"""The few numbers of a step that all ranks need, in one small all-reduce, and the norms that go into it."""

from collections.abc import Sequence

from torch import Tensor

from megaresnorm.optim import Gradient
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.mesh import ParallelContext


def sum_over_ranks(
    context: ParallelContext, loss: Tensor, squares: Tensor | None = None, *, stops: bool = False, tokens: int = 0
) -> Tensor:
    """Sums over all ranks, on the device: nothing waits for it here. Collective.

    Args:
        loss: sum of this rank's losses, FP64. Ranks of tp have the same.
        squares: ``own_squares``; None for 0.
        stops: whether this rank asks to stop.
        tokens: valid tokens of this rank's samples. Ranks of tp and pp have the same.

    Returns:
        [4] FP64: loss, squares, ranks that ask to stop, tokens.

    Communication:
        One all-reduce of 32 bytes over all ranks.
    """
    counts = context.tp.rank == 0
    vector = loss.new_tensor([0.0, 0.0, float(stops), tokens if counts and context.pp.rank == 0 else 0])
    if counts:
        vector[0] = loss
    if squares is not None:
        vector[1] = squares
    return all_reduce(vector, context.world)


def own_squares(gradients: Sequence[Gradient], norms: Tensor, context: ParallelContext) -> Tensor:
    """This rank's part of the sum of squares of all gradients; together the ranks count each element once.

    Args:
        norms: [n] FP64, of this rank's shares of the gradients.
    """
    first = context.dp_replicate.rank == 0
    own = [first and _counts(gradient, context) and not gradient.placement.copy for gradient in gradients]
    return (norms * norms.new_tensor(own)).square().sum()


def whole_norms(gradients: Sequence[Gradient], norms: Tensor, context: ParallelContext) -> Tensor:
    """Norms [n] FP64 of whole gradients from those of the ranks' shares. Collective.

    Communication:
        One all-reduce of n numbers FP64 over model_shards.
    """
    own = norms.new_tensor([_counts(gradient, context) for gradient in gradients])
    return all_reduce((norms * own).square(), context.model_shards).sqrt()


def _counts(gradient: Gradient, context: ParallelContext) -> bool:
    """Whether a share counts on this rank: what ranks of tp have alike does on the first."""
    return gradient.placement.split or context.tp.rank == 0
