"""Norms of single parameters' gradients and updates, in steps that are watched (telemetry/depth)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaresnorm.engines.engine import Engine
from megaresnorm.engines.step_vector import gradient_norms, own_shares
from megaresnorm.optim import Gradient, Settings, settings_of
from megaresnorm.recipe import OptimRecipe
from megaresnorm.telemetry.wrapped import Wrapped

AT_ONCE = 1 << 22  # elements whose updates are in memory at a time, four times over


class TensorNorms:
    """Squares of norms, of each of this rank's parameters; what several ranks have alike counts on one.

    Args:
        recipe: settings of the optimizer.

    Attributes:
        names: of the parameters, in the order of the results.
    """

    def __init__(self, engine: Engine, recipe: OptimRecipe) -> None:
        assembled = engine.assembled
        self._updated, self._policy, self._recipe, self._device = engine.updated(), engine.policy, recipe, assembled.device
        self.names = [one.name for one in self._updated]
        self._settings = [settings_of(assembled.table[name], recipe) for name in self.names]
        gradients = [Gradient(one.weight, one.placement) for one in self._updated]
        self._own = own_shares(gradients, assembled.context.tp, self._policy.replicas, assembled.device).of_all
        self._gradients: Tensor | None = None
        self._updates = self._policy.updates

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is multiplied by in backward."""
        return self._policy.factor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the gradients of the step that is made within, unclipped, after every reduction."""
        self._gradients, self._updates = None, self._policy.updates
        with Wrapped() as wrapped:
            wrapped.method(self._policy, "sum_up", self._around)
            yield

    def _around(self, sum_up: Callable) -> Callable:
        def watched(loss: Tensor, gradients: Sequence[Gradient], *arguments: Any, **options: Any) -> Any:
            if gradients:
                self._gradients = self._counted([one.gradient() for one in self._updated])
            return sum_up(loss, gradients, *arguments, **options)

        return watched

    @property
    def gradients(self) -> Tensor | None:
        """[n] FP64, squares of the gradients of the step that was watched last; None where it had none."""
        return self._gradients

    @torch.no_grad()
    def updates(self, lr: float) -> Tensor | None:
        """Squares of the update that the watched step has made, and of the weights before it.

        It follows from the weights and moments after the update: theta_old = (theta_new + A) / (1 - k), where A is lr
        m^ / (v^^1/2 + eps) and k = lr * weight_decay; the update is -(A + k theta_new) / (1 - k). Of weights in BF16
        it is the update before their rounding, to about the size of that rounding.

        Args:
            lr: the schedule's of that step.

        Returns:
            [n, 2] FP64; None where the step was refused.

        Source:
            AdamW, arXiv:1711.05101, algorithm 2.
        """
        if self._policy.updates == self._updates:
            return None
        found = torch.zeros(len(self._updated), 2, dtype=torch.float64, device=self._device)
        for numbers, settings in self._groups():
            for chunk in self._chunks(numbers):
                squares = self._chunk_squares(chunk, settings, lr)
                found.index_add_(0, torch.tensor([number for number, _ in chunk], device=self._device), squares)
        return found * self._own.unsqueeze(1)

    def _counted(self, tensors: list[Tensor]) -> Tensor:
        return gradient_norms(tensors).to(self._device).square() * self._own

    def _groups(self) -> Iterator[tuple[list[int], Settings]]:
        """The parameters that are updated alike, on one device and in one type."""
        groups: dict[tuple, list[int]] = {}
        for number, (one, settings) in enumerate(zip(self._updated, self._settings, strict=True)):
            if one.weight.numel():
                groups.setdefault((settings, one.weight.device, one.weight.dtype), []).append(number)
        return ((numbers, key[0]) for key, numbers in groups.items())

    def _chunks(self, numbers: list[int]) -> Iterator[list[tuple[int, slice]]]:
        """Elements of consecutive parameters, AT_ONCE at most together."""
        chunk: list[tuple[int, slice]] = []
        room = AT_ONCE
        for number in numbers:
            start, size = 0, self._updated[number].weight.numel()
            while start < size:
                stop = min(size, start + room)
                chunk.append((number, slice(start, stop)))
                room -= stop - start
                start = stop
                if not room:
                    yield chunk
                    chunk, room = [], AT_ONCE
        if chunk:
            yield chunk

    def _chunk_squares(self, chunk: list[tuple[int, slice]], settings: Settings, lr: float) -> Tensor:
        """[pieces, 2] FP64 of the update and of the weights before it."""
        wholes = [(self._updated[number], part) for number, part in chunk]
        average, square = (
            torch.cat([one.state[key].reshape(-1)[part] for one, part in wholes]) for key in ("exp_avg", "exp_avg_sq")
        )
        weight = torch.cat([one.weight.reshape(-1)[part] for one, part in wholes]).to(average.dtype)
        count, shrinks = self._policy.updates, lr * settings.lr_multiplier * settings.weight_decay
        step = lr * settings.lr_multiplier / (1 - self._recipe.beta1**count)
        denominator = square.sqrt_().div_((1 - self._recipe.beta2**count) ** 0.5).add_(settings.eps)
        moved = average.div_(denominator).mul_(step)
        before = moved + weight
        change = moved.add_(weight, alpha=shrinks) if shrinks else moved
        sizes = [part.stop - part.start for _, part in chunk]
        norms = [gradient_norms(each.split(sizes)).to(self._device) for each in (change, before)]
        return (torch.stack(norms, 1) / (1 - shrinks)).square()
