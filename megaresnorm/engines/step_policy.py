"""What becomes of a step, decided alike whatever engine has made its gradients.

The loss is divided by the global batch's tokens, norms are those of all ranks, clipping and the loss scale are ours,
and a step whose loss or norm is not finite, or a spike, changes nothing.
"""

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.clipping import GradientClipper
from megaresnorm.data.loader import SampleRange, StepBatch
from megaresnorm.engines.engine import StepStats
from megaresnorm.engines.state import numbers_of_parameters
from megaresnorm.engines.step_vector import (
    OwnShares,
    gradient_norms,
    own_shares,
    own_squares,
    stats_of,
    sum_over_ranks,
    whole_norms,
)
from megaresnorm.optim import Gradient
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.loss_scale import LossScale
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.spikes import Bounds


class Totals(NamedTuple):
    """A step's gradients in a few numbers, on the device.

    Attributes:
        vector: [4] FP64, of all ranks, see ``sum_over_ranks``.
        norms: [n] FP64, of this rank's shares of the gradients; None where there are none.
        refused: a number FP32, 1 where the step must change nothing.
    """

    vector: Tensor
    norms: Tensor | None
    refused: Tensor

    @property
    def norm(self) -> Tensor:
        """Norm of all gradients of all ranks, FP64."""
        return self.vector[1].sqrt()


class StepPolicy:
    """Number of tokens, norms, clipping, loss scale and counts of an engine's steps.

    Args:
        recipe: resolved.
        assembled: the model; its parameters of this rank, in their order, are what is clipped one by one.
        replicas: axis whose ranks have the same gradients.
        shards: axis whose ranks have parts of the same gradients, or for what is whole over tp the same.

    Attributes:
        replicas: axis whose ranks have the same gradients.
        bounds: a step above them is refused; None: only what is not finite is.
        clipper: clips gradients.
        loss_scale: of FP16; None where gradients need none.
        updates: steps that have been applied.
        unread: whether a rank could not read its samples of the next step, as all of them know after a step.
    """

    def __init__(self, recipe: Recipe, assembled: Assembled, *, replicas: Axis, shards: Axis) -> None:
        self._assembled, self._context = assembled, assembled.context
        self.replicas, self._shards = replicas, shards
        self._names = list(assembled.parameters())
        self.clipper = GradientClipper(recipe.optim, len(self._names), assembled.device)
        self.loss_scale = LossScale.of(recipe.precision)
        self.updates, self.unread = 0, False
        self.bounds: Bounds | None = None
        self._own: OwnShares | None = None  # known with the first gradients
        # The next step's samples and their valid tokens on all ranks, which the last step has summed.
        self._counted: tuple[SampleRange | None, int] | None = None

    @property
    def factor(self) -> float:
        """What the loss is multiplied by in backward, and gradients are to be divided by."""
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def valid_tokens(self, batch: StepBatch) -> int:
        """Number of valid labels of the global batch. Collective.

        Communication:
            One all-reduce of 8 bytes over dp, unless the step before has counted them.
        """
        if self._counted is not None and self._counted[0] == batch.samples:
            return self._counted[1]
        dp = self._context.dp
        if dp.size == 1:
            return batch.num_valid
        return int(all_reduce(torch.tensor([batch.num_valid], device=self._assembled.device), dp).item())

    @torch.no_grad()
    def sum_up(
        self, loss: Tensor, gradients: Sequence[Gradient], batch: StepBatch, tokens: int, *, stops: bool
    ) -> Totals:
        """The totals of a step. Collective.

        Args:
            loss: sum of this rank's losses, FP64.
            gradients: after every reduction, on the device or the host; none where the global batch has no tokens.
            tokens: of the global batch.
            stops: whether this rank asks to stop.

        Communication:
            That of ``sum_over_ranks``.
        """
        norms = gradient_norms([gradient.tensor for gradient in gradients]).to(loss.device) if gradients else None
        if self._own is None and gradients:
            self._own = own_shares(gradients, self._context.tp, self.replicas, loss.device)
        squares = None if norms is None or self._own is None else own_squares(norms, self._own)
        following = 0.0 if batch.following is None else batch.following[1]()
        vector = sum_over_ranks(self._context, loss, squares, stops=stops, tokens=following)
        refused = ~vector[:2].isfinite()
        if self.bounds is not None:
            for of_step, refuses, most in zip(vector, refused, self.bounds.of_sums(tokens), strict=False):
                refuses |= of_step > most
        return Totals(vector, norms, refused.any().float())

    @torch.no_grad()
    def clip(self, gradients: Sequence[Gradient], totals: Totals) -> Tensor | None:
        """Clip each gradient in place under ``clip: adagc``. Collective.

        Args:
            gradients: one for each parameter of this rank where each is clipped.

        Returns:
            What to divide all gradients by, see ``GradientClipper.divisor``.

        Communication:
            Under adagc that of ``whole_norms``.
        """
        if self.clipper.clips_each and self._own is not None and totals.norms is not None:
            whole = whole_norms(totals.norms, self._own, self._shards)
            self.clipper.clip_each([gradient.tensor for gradient in gradients], whole, totals.norm, totals.refused)
        return self.clipper.divisor(totals.norm)

    def settle(self, totals: Totals, batch: StepBatch, tokens: int) -> StepStats:
        """Read the totals, which waits for the device, and count the step.

        Args:
            tokens: of the global batch.
        """
        loss, squares, stops, next_tokens = totals.vector.tolist()
        self.unread = batch.following is not None and not isfinite(next_tokens)
        if batch.following is None or self.unread:
            self._counted = None
        else:
            self._counted = batch.following[0], int(next_tokens)
        stats = stats_of(loss, squares, tokens, self.loss_scale, stop=stops > 0, bounds=self.bounds)
        self.updates += stats.applied
        self.clipper.steps += stats.applied and self.clipper.clips_each
        return stats

    def mean_loss(self, loss: Tensor, batch: StepBatch) -> float | None:
        """Mean loss a token of an evaluation, in nats; None without labels. Collective.

        Args:
            loss: sum of this rank's losses, FP64.

        Communication:
            That of ``sum_over_ranks``.
        """
        total, _, _, tokens = sum_over_ranks(self._context, loss, tokens=batch.num_valid).tolist()
        return total / tokens if tokens else None

    def state(self) -> EngineState:
        """See ``Engine``."""
        scale = None if self.loss_scale is None else self.loss_scale.state
        return EngineState(updates=self.updates, clipper_steps=self.clipper.steps, loss_scale=scale)

    def load(self, state: EngineState) -> None:
        """Go on from the state of the engine that saved a checkpoint, whose tensors have been loaded."""
        self.updates = state.updates
        self.clipper.steps = state.clipper_steps if self.clipper.clips_each else 0
        if self.loss_scale is not None:
            self.loss_scale.load(state.loss_scale)

    def tensors(self) -> dict[str, dict[str, TensorSlices]]:
        """What a checkpoint has of it, as ``Engine.tensors``."""
        if not self.clipper.clips_each:
            return {}
        averages = dict(zip(self._names, self.clipper.averages.split(1), strict=True))
        return {"clipper": numbers_of_parameters(self._assembled, averages, self._assembled.table, 1)}
