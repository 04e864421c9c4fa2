"""Norms of single parameters' gradients and updates, in steps that are watched (telemetry/depth)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
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
    """Elements of parameters that are updated alike, about a piece of them.

    Attributes:
        numbers: [n] int64, the parameters.
        bounds: [n], where the elements of each are.
        members: what makes one flat tensor each of weights, moments and their squares.
        room: [2, n or more], to compute in.
    """

    settings: Settings
    numbers: Tensor
    bounds: list[tuple[int, int]]
    members: list[Callable[[], Tensor]]
    room: Tensor


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
        for chunk in self._chunks:
            found.index_add_(0, chunk.numbers, self._squares(chunk, lr))
        return found * self._own.unsqueeze(1)

    def _counted(self, tensors: list[Tensor]) -> Tensor:
        return gradient_norms(tensors).to(self._device).square() * self._own

    def _make_chunks(self, settings: Sequence[Settings]) -> Iterator[_Chunk]:
        """Tensors that lie in the same memory come one after the other, as a packed group's do."""
        groups: dict[tuple, list[int]] = {}
        for number, one in enumerate(self._updated):
            if one.weight.numel():
                key = settings[number], one.weight.device, one.weight.dtype, one.weight.untyped_storage().data_ptr()
                groups.setdefault(key, []).append(number)
        together: dict[tuple, list[int]] = {}
        rooms: dict[tuple, Tensor] = {}
        for key, numbers in groups.items():
            together.setdefault(key[:-1], []).extend(sorted(numbers, key=self._offset))
        for (alike, device, _), numbers in together.items():
            sizes = [self._updated[number].weight.numel() for number in numbers]
            for part in pieces_of(sizes, CPU_PIECE if device.type == "cpu" else GPU_PIECE):
                yield self._chunk(alike, [(numbers[index], piece) for index, piece in part], rooms)

    def _chunk(self, settings: Settings, part: list[tuple[int, slice]], rooms: dict[tuple, Tensor]) -> _Chunk:
        wholes = [self._updated[number] for number, _ in part]
        tensors = [[one.weight for one in wholes], *([one.state[key] for one in wholes] for key in AdamW.names)]
        parts = [[t.reshape(-1)[piece] for t, (_, piece) in zip(each, part, strict=True)] for each in tensors]
        bounds = bounds_of(parts[0])
        lies_together = bounds is not None and all(bounds_of(each) == bounds for each in parts[1:])
        if bounds is None or not lies_together:
            ends = list(accumulate(map(len, parts[0])))
            bounds = list(zip([0, *ends], ends, strict=False))
        average, size = parts[1][0], bounds[-1][1]
        key = average.dtype, average.device
        if key not in rooms or rooms[key].shape[1] < size:
            rooms[key] = average.new_empty(2, size)
        numbers = torch.tensor([number for number, _ in part], device=self._device)
        members = [_joined(each, size if lies_together else None) for each in parts]
        return _Chunk(settings, numbers, bounds, members, rooms[key])

    def _offset(self, number: int) -> int:
        return int(self._updated[number].weight.storage_offset())

    def _squares(self, chunk: _Chunk, lr: float) -> Tensor:
        """[n, 2] FP64 of the update and of the weights before it."""
        weight, average, square = (make() for make in chunk.members)
        direction, before = chunk.room[:, : len(weight)]
        settings, count = chunk.settings, self._policy.updates
        rate, correction = lr * settings.lr_multiplier, (1 - self._recipe.beta2**count) ** 0.5
        step = rate * correction / (1 - self._recipe.beta1**count)  # of m / (v^1/2 + eps * correction)
        torch.sqrt(square, out=direction).add_(settings.eps * correction)
        torch.div(average, direction, out=direction)
        torch.add(weight, direction, alpha=step, out=before)
        if settings.weight_decay:
            direction.add_(weight, alpha=settings.weight_decay * rate / step if step else 0.0)
        pieces = [whole[start:stop] for whole in (direction, before) for start, stop in chunk.bounds]
        norms = gradient_norms(pieces).to(self._device).view(2, -1)
        norms[0] *= step
        return (norms / (1 - rate * settings.weight_decay)).square().t()


def bounds_of(tensors: Sequence[Tensor]) -> list[tuple[int, int]] | None:
    """Where flat tensors lie that are one after the other in the same memory, with little between them; else None."""
    first = tensors[0]
    starts = [int(tensor.storage_offset() - first.storage_offset()) for tensor in tensors]
    bounds = [(start, start + len(tensor)) for start, tensor in zip(starts, tensors, strict=True)]
    memory, total = first.untyped_storage().data_ptr(), sum(map(len, tensors))
    lie_together = all(tensor.untyped_storage().data_ptr() == memory for tensor in tensors)
    return bounds if lie_together and starts == sorted(starts) and bounds[-1][1] <= 1.1 * total else None


def _joined(tensors: list[Tensor], span: int | None) -> Callable[[], Tensor]:
    """What makes one tensor of several: a view of ``span`` elements of their memory, or a copy."""
    if span is None:
        return lambda: torch.cat(tensors)
    view = tensors[0].as_strided((span,), (1,))
    return lambda: view


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
