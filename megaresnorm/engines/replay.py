"""A step made twice on every rank: who computes two different gradients of the same samples computes wrongly.

Digests of replicas (digests.py) do not see a gradient that was wrong before it was reduced: the sum is wrong on all
ranks alike. A pass is a function of weights and samples; masks are hashes of places. So a rank compares itself with
itself, alone as well as among others, and finds a chip that errs now and then; one that always errs alike it does not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megaresnorm.data.loader import StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import ConfigError, CorruptionError
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.kernels.digest import digest
from megaresnorm.parallel.collectives import largest
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import host_name
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.wrapped import Wrapped


class Replay:
    """Makes some steps of the native engine twice, and compares the gradients of each rank before they are reduced.

    Args:
        recipe: resolved; ``guard.replay_every``. What cannot be replayed is refused when it is read.

    Raises:
        ConfigError: on GPUs, whose sums come in any order unless ``train.deterministic`` is set.
    """

    def __init__(self, recipe: Recipe, engine: Any) -> None:
        self._every, self._engine = recipe.guard.replay_every, engine
        if not self._every:
            return
        assert isinstance(engine, NativeEngine), "checked with the recipe"
        if engine.assembled.device.type == "cuda" and not recipe.train.deterministic:
            raise ConfigError(
                f"guard.replay_every={self._every} needs train.deterministic=true on GPUs, where two sound passes may "
                "differ; set it, or guard.replay_every=0"
            )
        self._parameters = engine.assembled.parameters()
        self._digests: list[Tensor] = []

    def due(self, step: int) -> bool:
        """Whether step ``step``, counted from 1, is made twice."""
        return bool(self._every) and step % self._every == 0

    @contextmanager
    def seen_in(self, step: int) -> Iterator[None]:
        """Make the step within twice, if it is due: its forward and backward passes, not its update. Collective.

        Raises:
            CorruptionError: a rank has computed two gradients; on all ranks, before anything is updated. The engine may
                make the step again.

        Communication:
            What the model sends over tp, once more; an all-gather of 8 bytes over all ranks; where gradients differ
            ``all_gather_json`` of names.
        """
        if not self.due(step):
            yield
            return
        self._digests.clear()
        with Wrapped() as wrapped:
            wrapped.method(self._engine, "backward", self._twice)
            wrapped.method(self._engine, "update", partial(self._checked, step))
            try:
                yield
            except CorruptionError:
                self._engine.drop_gradients()
                raise

    def _twice(self, backward: Callable) -> Callable:
        def both(batch: StepBatch, tokens: int) -> Tensor:
            if tokens:
                with self._digested():
                    self._local(batch, tokens)
                self._engine.drop_gradients()
            with self._digested():
                return backward(batch, tokens)

        return both

    def _local(self, batch: StepBatch, tokens: int) -> None:
        """Forward and backward of this rank's microbatches, by the bare model: data parallelism reduces nothing."""
        engine = self._engine
        for part in batch.microbatches:
            _, objective = engine.passes.train(engine.model, part, engine.policy.factor / tokens)
            differentiate(objective)

    @contextmanager
    def _digested(self) -> Iterator[None]:
        """Add up digests of each parameter's gradients of the microbatches within, as they come."""
        sums = torch.zeros(len(self._parameters), dtype=torch.int64, device=self._engine.assembled.device)

        def add(to: Tensor, gradient: Tensor) -> None:
            to.add_(digest(gradient))

        parameters = zip(sums, self._parameters.values(), strict=True)
        handles = [p.register_hook(partial(add, one)) for one, p in parameters if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._digests.append(sums)

    def _checked(self, step: int, update: Callable) -> Callable:
        def checked(*arguments: Any) -> None:
            first, second = self._digests
            differs = first != second
            world = self._engine.context.world
            if largest(differs.any().long().reshape(1), world).item():
                names = [name for name, one in zip(self._parameters, differs.tolist(), strict=True) if one]
                said = all_gather_json([host_name(), names[:1], len(names)], world, self._engine.assembled.device)
                error = CorruptionError(_line(step, said))
                error.found = [(rank, host) for rank, (host, _, count) in enumerate(said) if count]
                raise error
            update(*arguments)

        return checked


def _line(step: int, said: list[list[Any]]) -> str:
    """What is said of the ranks whose gradients differ, by rank: host, the first parameter, how many."""
    odd = [(rank, host, names[0], count) for rank, (host, names, count) in enumerate(said) if count]
    ranks = " and ".join(f"rank {rank} on {host}" for rank, host, _, _ in odd)
    _, _, name, count = max(odd, key=lambda one: one[3])
    more = f" and {count - 1} more" if count > 1 else ""
    return (
        f"step {step}: {ranks} computed two different gradients of the same samples ({name}{more}); nothing was updated"
    )
