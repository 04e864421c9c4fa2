"""Where in a step the first number arises that is not finite: rank, block, tensor and samples.

The step is made again for it. What it computes is looked at from outside (telemetry/wrapped.py), and no value changes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import is_finite
from megaresnorm.data.loader import StepBatch
from megaresnorm.engines.engine import Engine
from megaresnorm.model.block import Block
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import host_name
from megaresnorm.parallel.transport import Pending, Transport
from megaresnorm.recompute import is_running_again
from megaresnorm.telemetry.depth.streams import blocks_of
from megaresnorm.telemetry.wrapped import Wrapped

WEIGHTS, FORWARD, BACKWARD = range(3)


class Finding(NamedTuple):
    """The first number of a step that is not finite.

    Attributes:
        rank, host: where it arose; None where all that was looked at on every rank is finite.
        what: the tensor, in words.
        block: global number; None outside of blocks.
        samples: global numbers of the microbatch's; empty for a weight.
        in_weights: whether it was there before the step.
    """

    rank: int | None
    host: str | None
    what: str
    block: int | None = None
    samples: tuple[int, ...] = ()
    in_weights: bool = False

    def __str__(self) -> str:
        place = "" if self.rank is None else f" on rank {self.rank} ({self.host})"
        samples = f", samples {shortened(self.samples)}" if self.samples else ""
        return f"{self.what}{place}{samples}"


IN_SUMS = Finding(None, None, "a sum over ranks, or what compiled blocks hide: all that was looked at is finite")


def shortened(numbers: tuple[int, ...], most: int = 8) -> str:
    """Numbers in few words.

    >>> shortened((3, 4, 5)), shortened(tuple(range(100)), most=2)
    ('3, 4, 5', '0, 1 and 98 more')
    """
    listed = ", ".join(map(str, numbers[:most]))
    return listed if len(numbers) <= most else f"{listed} and {len(numbers) - most} more"


class Attribution:
    """Looks at one step. In compiled blocks it sees what enters and leaves the model, and gradients of parameters.

    Args:
        engine: that makes the step.
        batch: of the step.
    """

    def __init__(self, engine: Engine, batch: StepBatch) -> None:
        self._engine, self._batch = engine, batch
        self._context = engine.assembled.context
        # (class, microbatch, stage in the order of the pass, number of this look), what, block
        self._first: tuple[tuple[int, int, int, int], str, int | None] | None = None
        self._looks, self._passes = 0, Counter[int]()
        self._microbatch = self._stage = 0
        self._where: tuple[str, int | None] = "the embedding", None
        self._returns: tuple[str, int | None] = "the gradient of the loss", None
        self._backward = 0  # microbatch of the backward pass at hand

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the step that is made within."""
        for name, slices in self._engine.tensors["weights"].items():
            if slices.local is not None and not is_finite(slices.local):
                self._note((WEIGHTS, 0, 0), f"weight {name}", block_of(name))
        with Wrapped() as wrapped:
            self._wrap_parameters(wrapped)
            for number, model in self._engine.assembled.models.items():
                self._wrap_model(wrapped, number, model)
            if self._engine.assembled.compiled == "none":
                for number, block in blocks_of(self._engine.assembled):
                    self._wrap_block(wrapped, number, block)
                self._wrap_sends(wrapped)
            yield

    def finding(self) -> Finding | None:
        """The first of all ranks; None where all numbers that were looked at are finite. Collective.

        Communication:
            That of ``all_gather_json`` over ``control``, which nothing else may use meanwhile.
        """
        mine = None
        if self._first is not None:
            order, what, block = self._first
            samples = [] if order[0] == WEIGHTS else self._samples(order[1])
            mine = [list(order), what, block, samples, host_name()]
        everyone = all_gather_json(mine, self._context.control)
        found = [(one[0], rank, one) for rank, one in enumerate(everyone) if one is not None]
        if not found:
            return None
        order, rank, (_, what, block, samples, host) = min(found, key=lambda one: one[:2])
        return Finding(rank, host, what, block, tuple(samples), order[0] == WEIGHTS)

    def _samples(self, microbatch: int) -> list[int]:
        parts, count = self._batch.microbatches, self._batch.num_microbatches
        if len(parts) == count:
            return parts[microbatch % count].samples.tolist()
        size = len(parts[0].samples) // count  # one batch of all of them
        return parts[0].samples[microbatch * size : (microbatch + 1) * size].tolist()

    def _note(self, order: tuple[int, int, int], what: str, block: int | None) -> None:
        self._looks += 1
        key = (*order, self._looks)
        if self._first is None or key < self._first[0]:
            self._first = key, what, block

    @torch.no_grad()
    def _look(self, x: Any, order: tuple[int, int, int], what: str, block: int | None) -> None:
        """Every rank of tp looks as often, so that the numbers of their looks can be compared."""
        self._looks += 1
        if isinstance(x, Tensor) and x.is_floating_point() and not is_finite(x.detach()):
            self._note(order, what, block)

    @property
    def _now(self) -> tuple[int, int, int]:
        return FORWARD, self._microbatch, self._stage

    def _wrap_model(self, wrapped: Wrapped, number: int, model: Transformer) -> None:
        def around(forward: Callable) -> Callable:
            def watched(*received: Any, **options: Any) -> Any:
                self._microbatch, self._stage = self._passes[number], number
                self._passes[number] += 1
                self._where = "the embedding", None
                if not model.stage.has_embedding:
                    self._look(received[0], self._now, "what was received from the stage before", None)
                result = forward(*received, **options)
                for x in result if isinstance(result, tuple) else (result,):
                    what = "the loss" if model.stage.has_head else f"{self._where[0]} as it is sent to the next stage"
                    self._look(x, self._now, what, None if model.stage.has_head else self._where[1])
                return result

            return watched

        wrapped.method(model, "forward", around)
        wrapped.method(model, "finish", lambda finish: lambda stream: self._entered(stream, None, finish))

    def _wrap_block(self, wrapped: Wrapped, number: int, block: Block) -> None:
        wrapped.method(block.sublayers[0], "open", lambda open_: lambda stream: self._entered(stream, number, open_))
        for place, (kind, residual) in enumerate(zip(SUBLAYERS, block.sublayers, strict=True)):
            last = place + 1 == len(block.sublayers)
            name = "close" if last else "close_and_open"
            wrapped.method(residual, name, partial(self._around_close, number, kind, last))

    def _entered(self, stream: Stream, number: int | None, method: Callable) -> Any:
        """A stream comes to a block, or to the final norm: it is what the block before has returned."""
        if not is_running_again():
            for x in (stream.x, stream.delta):
                self._look(x, self._now, f"the stream after {self._where[0]}", self._where[1])
            entered = "the output matrix" if number is None else f"block {number}"
            if stream.x.requires_grad:
                what, at = f"the gradient of the stream into {entered}", (BACKWARD, self._microbatch, -self._stage)
                stream.x.register_hook(partial(self._returned, at, what, number))
            if number is not None:
                self._where = f"block {number} {SUBLAYERS[0]}", number
        return method(stream)

    def _returned(self, order: tuple[int, int, int], what: str, block: int | None, gradient: Tensor) -> None:
        self._backward, self._returns = order[1], (what, block)
        self._look(gradient, order, what, block)

    def _around_close(self, number: int, kind: str, last: bool, close: Callable) -> Callable:
        def watched(*given: Any) -> Any:
            y = given[-2]  # of (x, y, masks), behind the residual that follows where there is one
            if not is_running_again():
                self._look(y, self._now, f"the branch of block {number} {kind}", number)
            result = close(*given)
            if not is_running_again():
                self._where = (f"block {number}" if last else f"block {number} {SUBLAYERS[1]}"), number
            return result

        return watched

    def _wrap_parameters(self, wrapped: Wrapped) -> None:
        counts = Counter[str]()

        def see(name: str, stage: int, gradient: Tensor) -> None:
            order = (BACKWARD, counts[name], -stage)
            counts[name] += 1
            self._look(gradient, order, f"the gradient of {name}", block_of(name))

        if self._engine.gathers_weights:  # gradients arrive at tensors that exist for a while
            return
        names = {id(parameter): name for name, parameter in self._engine.assembled.parameters().items()}
        for number, model in self._engine.assembled.models.items():
            for parameter in model.parameters():
                if parameter.requires_grad and id(parameter) in names:
                    wrapped.at_end(parameter.register_hook(partial(see, names[id(parameter)], number)).remove)

    def _wrap_sends(self, wrapped: Wrapped) -> None:
        for field in fields(self._context):
            axis = getattr(self._context, field.name)
            if field.name == "tp" and axis.transport is not None:
                wrapped.value(axis, "transport", _Seen(axis.transport, self._sent))

    def _sent(self, x: Tensor) -> None:
        """What this rank sends to the others of tp, who have it in their own numbers afterwards."""
        if torch._C._current_graph_task_id() >= 0:
            what, block = self._returns
            self._look(x, (BACKWARD, self._backward, -self._stage), f"what is sent below {what}", block)
        else:
            self._look(x, self._now, f"what {self._where[0]} sends over tp", self._where[1])


class _Seen:
    """A transport that shows what is sent."""

    def __init__(self, transport: Transport, see: Callable[[Tensor], None]) -> None:
        self._transport, self._see = transport, see

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """See ``Transport``."""
        self._see(x)
        return self._transport.start_all_reduce(x, overwrite=overwrite)

    def start_all_gather(self, x: Tensor) -> Pending:
        """See ``Transport``."""
        self._see(x)
        return self._transport.start_all_gather(x)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """See ``Transport``."""
        self._see(x_p)
        return self._transport.start_reduce_scatter(x_p)


def block_of(name: str) -> int | None:
    """The global number of the block that a parameter belongs to.

    >>> block_of("blocks.12.ffn.up.weight"), block_of("embedding.weight")
    (12, None)
    """
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None
