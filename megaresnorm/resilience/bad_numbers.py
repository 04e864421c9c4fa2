"""Numbers that drills spoil: NaN, and single bits that are flipped, where chips, memory and kernels have made them."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaresnorm.model.stream import Stream
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import FaultRecipe
from megaresnorm.telemetry.depth.streams import blocks_of
from megaresnorm.telemetry.wrapped import Wrapped

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Fires = Callable[[], bool]


class BadNumbers:
    """Spoils numbers of one rank.

    Args:
        engine: its tensors, parameters and steps.
        seed: chooses tensors, elements and bits, with the step.
    """

    def __init__(self, engine: Any, context: ParallelContext, seed: int) -> None:
        self._engine, self._context, self._seed = engine, context, seed

    def spoil(self, fault: FaultRecipe, step: int, fires: Fires, wrapped: Wrapped) -> None:
        """Spoil a number of a step, wherever the fault has its place; of a weight where it has none.

        Args:
            fires: asked each time that it could happen.
        """
        chance = random.Random(f"{self._seed} {step} {fault.rank}")
        match fault.place:
            case None | "weight" | "moment":
                if fires():
                    spoil(self._stored(fault, chance), fault.kind, chance)
            case "reduced_gradient":
                wrapped.method(self._engine, "update", self._before_update(fault, fires, chance))
            case "gradient" | "activation":
                self._in_step(fault, fires, chance, wrapped)
            case _:
                raise AssertionError(f"checked with the recipe: {fault.place}")

    def poisoned(self, step: int, vocab_size: int, fires: Fires) -> Callable[[Callable], Callable]:
        """What makes of a loader's ``step`` one whose labels are random tokens, as on ranks with the same samples."""

        def around(load: Callable) -> Callable:
            def poisoned(*arguments: Any) -> Any:
                batch = load(*arguments)
                if fires():
                    generator = torch.Generator().manual_seed(self._seed + step + 1009 * self._context.dp.rank)
                    for part in batch.microbatches:
                        noise = torch.randint(vocab_size, part.labels.shape, generator=generator)
                        part.labels.copy_(torch.where(part.labels.cpu() < 0, -1, noise))
                return batch

            return poisoned

        return around

    def _stored(self, fault: FaultRecipe, chance: random.Random) -> Tensor:
        """A tensor of weights or moments that this rank holds."""
        members = self._engine.tensors["optimizer" if fault.place == "moment" else "weights"]
        names = [name for name, slices in members.items() if slices.local is not None and slices.local.numel()]
        inside = [name for name in names if f"blocks.{fault.block}." in name]
        return members[chance.choice(inside or names)].local

    def _before_update(self, fault: FaultRecipe, fires: Fires, chance: random.Random) -> Callable[[Callable], Callable]:
        def around(update: Callable) -> Callable:
            def spoilt(gradients: Any, *arguments: Any) -> None:
                if fires():
                    spoil(chance.choice(gradients).tensor, fault.kind, chance)
                update(gradients, *arguments)

            return spoilt

        return around

    def _in_step(self, fault: FaultRecipe, fires: Fires, chance: random.Random, wrapped: Wrapped) -> None:
        """Spoils a number the first time that each step of the engine comes to it: in its first microbatch."""
        # Its hooks come before those of whoever looks for it.
        blocks = dict(blocks_of(self._engine.assembled))
        number = fault.block if fault.block in blocks else chance.choice(sorted(blocks))
        parameter = chance.choice([p for p in blocks[number].parameters() if p.requires_grad])
        first, bits = [True], chance.getrandbits(32)

        def once(x: Tensor) -> Tensor:
            if not first[0] or not fires():
                return x
            first[0] = False
            x = x.clone()
            spoil(x, fault.kind, random.Random(bits))
            return x

        def of_stream(block: Any, arguments: Any, stream: Stream) -> Stream:
            return stream._replace(x=once(stream.x))

        def around(step: Callable) -> Callable:
            def spoilt(*arguments: Any) -> Any:
                first[0] = True
                return step(*arguments)

            return spoilt

        def of_gradient(block: Any, arguments: Any) -> None:
            if arguments[0].x.requires_grad:
                arguments[0].x.register_hook(once)

        if fault.place == "activation":
            handle = blocks[number].register_forward_hook(of_stream)
        elif self._engine.gathers_weights:  # gradients of parameters arrive at tensors that exist for a while
            handle = blocks[number].register_forward_pre_hook(of_gradient)
        else:
            handle = parameter.register_hook(once)
        wrapped.at_end(handle.remove)
        wrapped.method(self._engine, "step", around)


@torch.no_grad()
def spoil(x: Tensor, kind: str, chance: random.Random) -> None:
    """Make one element NaN, or flip one of its bits, in place.

    Args:
        kind: nan or flip.
    """
    at = chance.randrange(x.numel())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), x.shape))
    if kind == "nan":
        x[place] = float("nan")
        return
    bit = chance.randrange(8 * x.element_size())
    one = x[place].reshape(1).clone()
    flipped = one.view(INTEGERS[x.element_size()])
    flipped ^= torch.tensor([1], dtype=flipped.dtype, device=flipped.device) << bit
    x[place] = one[0]
