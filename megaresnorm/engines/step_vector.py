"""The few numbers of a step that all ranks need, in one small all-reduce, and the norms that go into it.

Nothing here waits for a device, in either direction: a number is written by filling, and which gradients count on a
rank is put into tensors once, with the first gradients (``own_shares``).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.engines.engine import StepStats
from megaresnorm.optim import Gradient
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.precision.loss_scale import LossScale
from megaresnorm.resilience.spikes import Bounds

NORM_PIECE = 1 << 16  # elements whose squares may be added in FP32: the error is below 1e-6


class OwnShares(NamedTuple):
    """Which gradients count on this rank, 1 or 0 FP64 each, in the optimizer's order.

    Attributes:
        of_tensor: whether a share counts in the norm of its tensor: what ranks of tp have alike does on the first.
        of_all: likewise in the norm of all gradients: replicas, and copies of an embedding, count once.
    """

    of_tensor: Tensor
    of_all: Tensor


def own_shares(gradients: Sequence[Gradient], tp: Axis, replicas: Axis, device: torch.device) -> OwnShares:
    """Which of the gradients count on this rank, by their placement.

    Args:
        replicas: axis whose ranks have the same gradients.
        device: of the result.
    """
    of_tensor = [gradient.placement.split or tp.rank == 0 for gradient in gradients]
    first = replicas.rank == 0
    of_all = [counts and first and not g.placement.copy for counts, g in zip(of_tensor, gradients, strict=True)]
    return OwnShares(*(torch.tensor(each, dtype=torch.float64, device=device) for each in (of_tensor, of_all)))


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of every gradient, [n] FP64. The norm of all of them together is the norm of this vector.

    On CPUs torch adds the squares of a whole tensor in FP32, which loses 4e-3 of the norm of 5e7 numbers. Pieces of
    NORM_PIECE numbers keep seven digits; their squares are added in FP64, so that the norm does not depend on how
    tensors are packed.
    """
    large = [g.is_cpu and g.numel() > NORM_PIECE for g in gradients]
    pieces = [
        p for g, cut in zip(gradients, large, strict=True) for p in (g.flatten().split(NORM_PIECE) if cut else (g,))
    ]
    norms = torch.stack(torch._foreach_norm(pieces)).double()
    if len(pieces) == len(gradients):
        return norms
    counts = torch.tensor([max(1, -(-g.numel() // NORM_PIECE)) for g in gradients])
    of_gradient = torch.repeat_interleave(torch.arange(len(gradients)), counts)
    return norms.new_zeros(len(gradients)).index_add_(0, of_gradient, norms.square()).sqrt()


def own_squares(norms: Tensor, own: OwnShares) -> Tensor:
    """This rank's part of the sum of squares of all gradients; together the ranks count each element once.

    Args:
        norms: [n] FP64, of this rank's shares of the gradients.
    """
    return (norms * own.of_all).square().sum()


def whole_norms(norms: Tensor, own: OwnShares, shards: Axis) -> Tensor:
    """Norms [n] FP64 of whole gradients from those of the ranks' shares. Collective.

    Args:
        shards: axis whose ranks have these shares.

    Communication:
        One all-reduce of n numbers FP64 over ``shards``.
    """
    return all_reduce((norms * own.of_tensor).square(), shards).sqrt()


def sum_over_ranks(
    context: ParallelContext, loss: Tensor, squares: Tensor | None = None, *, stops: bool = False, tokens: float = 0
) -> Tensor:
    """Sums over all ranks. Collective.

    Args:
        loss: sum of this rank's losses, FP64. Ranks of tp have the same.
        squares: ``own_squares``; None for 0.
        stops: whether this rank asks to stop.
        tokens: valid tokens of this rank's samples. Ranks of tp and pp have the same, and one counts for them; but NaN,
            of samples that could not be read, counts wherever it is.

    Returns:
        [4] FP64: loss, squares, ranks that ask to stop, tokens.

    Communication:
        One all-reduce of 32 bytes over all ranks.
    """
    vector, counts = loss.new_zeros(4), context.tp.rank == 0
    if counts:
        vector[0] = loss
    if squares is not None:
        vector[1] = squares
    vector[2].fill_(float(stops))
    if (counts and context.pp.rank == 0) or not isfinite(tokens):
        vector[3].fill_(tokens)
    return all_reduce(vector, context.world)


def stats_of(
    loss: float, squares: float, tokens: int, scale: LossScale | None, *, stop: bool, bounds: Bounds | None = None
) -> StepStats:
    """What has become of a step, by its vector, and so on all ranks the loss scale of the next one.

    A loss that is not finite, or a spike, says nothing of the scale, which has no part in it.
    """
    if not tokens:  # nothing was to be learned: neither moments nor decay may move a weight
        stats = StepStats(None, 0.0, 0, applied=False, stop=stop)
        return stats if scale is None else replace(stats, loss_scale=scale.value, skipped=scale.state.skipped)
    is_finite = isfinite(loss) and isfinite(squares)
    most = (inf, inf) if bounds is None else bounds.of_sums(tokens)
    applied = is_finite and loss <= most[0] and squares <= most[1]
    stats = StepStats(loss / tokens, squares**0.5, tokens, applied, stop)
    if scale is None:
        return stats
    before, tells = scale.value, isfinite(loss) and (applied or not is_finite)
    lowered = tells and scale.update(overflowed=not is_finite)
    return replace(stats, loss_scale=before, lowered_to=scale.value if lowered else None, skipped=scale.state.skipped)
