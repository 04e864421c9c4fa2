"""Norms of single parameters' gradients and updates, in steps that are watched (telemetry/depth)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.engines.engine import Engine
from megaresnorm.engines.garbage import no_garbage_collection
from megaresnorm.engines.step_vector import gradient_norms, own_shares
from megaresnorm.optim import AdamW, Gradient, Settings, settings_of
from megaresnorm.recipe import OptimRecipe
from megaresnorm.telemetry.wrapped import Wrapped

# Elements whose updates are in memory at a time, four times over: on a CPU in its caches, on a GPU enough to be fast.
CPU_PIECE, GPU_PIECE = 1 << 18, 1 << 22


class _Chunk(NamedTuple):
    """Elements of parameters that are updated alike, at most a piece of them.

    Attributes:
        numbers: [n] int64, the parameters.
        members: [n] of weights, moments and their squares, flat: live memory.
    """

    settings: Settings
    numbers: Tensor
    members: list[tuple[Tensor, Tensor, Tensor]]


class TensorNorms:
    """Squares of norms, of each of this rank's parameters; what several ranks have alike counts on one.

    Args:
        recipe: settings of the optimizer.

    Attributes:
        names: of the parameters, in the order of the results.
    """

    def __init__(self, engine: Engine, recipe: OptimRecipe) -> None:
        assembled = engine.assembled
        self._updated, self._policy, self._recipe, self._device = (
            engine.updated(),
            engine.policy,
            recipe,
            assembled.device,
        )
        self.names = [one.name for one in self._updated]
        self._chunks = list(self._make_chunks([settings_of(assembled.table[name], recipe) for name in self.names]))
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
        """Measure the gradients of the step that is made within, unclipped, after every reduction.

        Nothing that watches is in a cycle, but it is many small objects: Python does not look for cycles meanwhile.
        """
        self._gradients, self._updates = None, self._policy.updates
        with no_garbage_collection(), Wrapped() as wrapped:
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
        rooms: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for chunk in self._chunks:
            average = chunk.members[0][1]
            if (key := (average.dtype, average.device)) not in rooms:
                rooms[key] = average.new_empty(4, piece_on(average.device))
            found.index_add_(0, chunk.numbers, self._squares(chunk, lr, rooms[key]))
        return found * self._own.unsqueeze(1)

    def _counted(self, tensors: list[Tensor]) -> Tensor:
        return gradient_norms(tensors).to(self._device).square() * self._own

    def _make_chunks(self, settings: Sequence[Settings]) -> Iterator[_Chunk]:
        groups: dict[tuple, list[int]] = {}
        for number, one in enumerate(self._updated):
            if one.weight.numel():
                groups.setdefault((settings[number], one.weight.device, one.weight.dtype), []).append(number)
        for (alike, device, _), numbers in groups.items():
            sizes = [self._updated[number].weight.numel() for number in numbers]
            for part in pieces_of(sizes, piece_on(device)):
                members = [self._members(numbers[index], piece) for index, piece in part]
                yield _Chunk(alike, torch.tensor([numbers[index] for index, _ in part], device=self._device), members)

    def _members(self, number: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        one = self._updated[number]
        weight, average, square = (t.reshape(-1)[part] for t in (one.weight, *(one.state[k] for k in AdamW.names)))
        return weight, average, square

    def _squares(self, chunk: _Chunk, lr: float, room: Tensor) -> Tensor:
        """[n, 2] FP64 of the update and of the weights before it, computed in ``room`` [4, a piece]."""
        weights, averages, squares = (list(each) for each in zip(*chunk.members, strict=True))
        sizes = [len(each) for each in weights]
        weight, average, square, before = room[:, : sum(sizes)]
        for parts, whole in ((weights, weight), (averages, average), (squares, square)):
            torch.cat(parts, out=whole)
        settings, count = chunk.settings, self._policy.updates
        rate, correction = lr * settings.lr_multiplier, (1 - self._recipe.beta2**count) ** 0.5
        step = rate * correction / (1 - self._recipe.beta1**count)  # of m / (v^1/2 + eps * correction)
        direction = average.div_(square.sqrt_().add_(settings.eps * correction))
        torch.add(weight, direction, alpha=step, out=before)
        if settings.weight_decay:
            direction.add_(weight, alpha=settings.weight_decay * rate / step if step else 0.0)
        changed, size = (gradient_norms(each.split(sizes)).to(self._device) for each in (direction, before))
        return (torch.stack((changed * step, size), 1) / (1 - rate * settings.weight_decay)).square()


def piece_on(device: torch.device) -> int:
    """Elements that are updated at a time."""
    return CPU_PIECE if device.type == "cpu" else GPU_PIECE


def pieces_of(sizes: Sequence[int], most: int) -> Iterator[list[tuple[int, slice]]]:
    """Consecutive elements of several tensors in parts of ``most`` elements, the last of fewer.

    Yields:
        For each part the tensors that it has elements of, and which.

    >>> list(pieces_of([3, 4], 5))
    [[(0, slice(0, 3, None)), (1, slice(0, 2, None))], [(1, slice(2, 4, None))]]
    """
    part: list[tuple[int, slice]] = []
    room = most
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            part.append((index, slice(start, stop)))
            room -= stop - start
            start = stop
            if not room:
                yield part
                part, room = [], most
    if part:
        yield part
