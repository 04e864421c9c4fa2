"""A run's parts that tell what they are at: wrapped from outside, single objects, for as long as a run lasts."""

from collections.abc import Callable
from dataclasses import fields
from time import monotonic_ns
from typing import Any

from torch import Tensor

from megaresnorm.model.block import Block
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.parallel.transport import Pending, Transport
from megaresnorm.resilience.beats import (
    ACTIVATIONS,
    AXES,
    AXIS,
    BLOCK,
    C_OPERATION,
    C_SIZE,
    C_WAITS_SINCE,
    COUNTS,
    GRADIENTS,
    MICROBATCH,
    OPERATION,
    SENDS,
    SEQUENCE,
    SIZE,
    WAITED,
    WAITS_SINCE,
    WRITES_SINCE,
    Beats,
    Place,
)
from megaresnorm.telemetry.wrapped import Wrapped

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = 1, 2, 3  # of ``OPERATIONS``


class TellingTransport:
    """The collectives of an axis, counted and told while a rank waits for them.

    Args:
        transport: sends.
        axis: name of the axis.
        own: this rank's slot.
    """

    def __init__(self, transport: Transport, axis: str, own: Any) -> None:
        self._transport, self._own, self._axis = transport, own, AXES.index(axis)
        self._count = COUNTS + self._axis
        self._told = self._told_over_control if axis == "control" else self._told_over_axis

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """See ``Transport``."""
        self._own[self._count] += 1
        return self._told(self._transport.start_all_reduce(x, overwrite=overwrite), ALL_REDUCE, x.nbytes)

    def start_all_gather(self, x: Tensor) -> Pending:
        """See ``Transport``."""
        self._own[self._count] += 1
        return self._told(self._transport.start_all_gather(x), ALL_GATHER, x.nbytes)

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """See ``Transport``."""
        self._own[self._count] += 1
        return self._told(self._transport.start_reduce_scatter(x_p), REDUCE_SCATTER, x_p.nbytes)

    def _told_over_axis(self, pending: Pending, operation: int, size: int) -> Pending:
        own, axis = self._own, self._axis

        def wait() -> Tensor:
            own[AXIS], own[OPERATION], own[SIZE] = axis, operation, size
            own[WAITS_SINCE] = start = monotonic_ns()
            result = pending()
            own[WAITS_SINCE] = 0
            own[WAITED] += monotonic_ns() - start
            return result

        return wait

    def _told_over_control(self, pending: Pending, operation: int, size: int) -> Pending:
        """Told in words of its own: a thread that writes a checkpoint may be the one that waits."""
        own = self._own

        def wait() -> Tensor:
            own[C_OPERATION], own[C_SIZE] = operation, size
            # Writing its own part, and waiting for the others, have a time each.
            own[C_WAITS_SINCE] = own[WRITES_SINCE] = monotonic_ns()
            result = pending()
            own[C_WAITS_SINCE], own[WRITES_SINCE] = 0, monotonic_ns()
            return result

        return wait


def tell_axes(context: ParallelContext, beats: Beats, wrapped: Wrapped, *, compiled: bool) -> None:
    """Let all axes tell their collectives.

    Args:
        compiled: whether blocks are compiled. What a compiler has seen of tp stays as it is.
    """
    for axis in (getattr(context, field.name) for field in fields(context) if field.name in AXES):
        if axis.transport is not None and not (compiled and axis is context.tp):
            wrapped.value(axis, "transport", TellingTransport(axis.transport, axis.name, beats.own))


def tell_passes(engine: Any, beats: Beats, wrapped: Wrapped) -> None:
    """Let an engine tell its passes, microbatches, the blocks of its model, and what its stages wait for."""
    wrapped.method(engine.passes, "train", lambda train: _passes(train, beats))
    wrapped.method(engine.policy, "sum_up", lambda method: _at(Place.UPDATE, method, beats))
    if engine.assembled.compiled == "none":
        for model in engine.assembled.models.values():
            for number, block in model.blocks.items():
                if isinstance(block, Block):
                    wrapped.method(block, "forward", _in_block(int(number), beats.own))
    if engine.pipeline is not None:
        wrapped.method(engine.pipeline, "run", lambda run: _pipeline(run, beats))
        wrapped.method(engine.pipeline, "schedule_for", lambda made: lambda *key: _schedule(made(*key), beats, wrapped))


def _passes(train: Callable, beats: Beats) -> Callable:
    own = beats.own

    def told(*arguments: Any, **options: Any) -> Any:
        own[MICROBATCH] += 1
        beats.at(Place.FORWARD)
        result = train(*arguments, **options)
        beats.at(Place.BACKWARD)
        return result

    return told


def _at(place: Place, method: Callable, beats: Beats) -> Callable:
    def told(*arguments: Any, **options: Any) -> Any:
        beats.at(place)
        return method(*arguments, **options)

    return told


def _in_block(number: int, own: Any) -> Callable[[Callable], Callable]:
    def around(forward: Callable) -> Callable:
        def told(*arguments: Any, **options: Any) -> Any:
            own[BLOCK] = number
            return forward(*arguments, **options)

        return told

    return around


def _pipeline(run: Callable, beats: Beats) -> Callable:
    """A batch through the stages; what they wait for is over when it is."""

    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return run(*arguments, **options)
        finally:
            beats.waited()

    return told


def _schedule(schedule: Any, beats: Beats, wrapped: Wrapped) -> Any:
    from megaresnorm.parallel.pipeline import stages_in  # imported by runs with stages alone

    for stage in stages_in(schedule):
        if "forward_one_chunk" not in vars(stage):
            wrapped.method(stage, "forward_one_chunk", lambda method: _chunk(Place.FORWARD, method, beats))
            wrapped.method(stage, "backward_one_chunk", lambda method: _chunk(Place.BACKWARD, method, beats))
            wrapped.method(stage, "get_fwd_recv_ops", lambda method: _receives(ACTIVATIONS, method, beats.own))
            wrapped.method(stage, "get_bwd_recv_ops", lambda method: _receives(GRADIENTS, method, beats.own))
    return schedule


def _chunk(place: Place, method: Callable, beats: Beats) -> Callable:
    """A microbatch's pass through a stage. Before the next one the stage waits for a neighbour."""
    own = beats.own

    def told(microbatch: int, *arguments: Any, **options: Any) -> Any:
        beats.waited()
        own[MICROBATCH] = microbatch
        beats.at(place)
        result = method(microbatch, *arguments, **options)
        _wait_for(own, microbatch, SENDS)
        return result

    return told


def _receives(operation: int, method: Callable, own: Any) -> Callable:
    def told(microbatch: int) -> Any:
        operations = method(microbatch)
        if operations:
            _wait_for(own, microbatch, operation)
        return operations

    return told


def _wait_for(own: Any, microbatch: int, operation: int) -> None:
    own[AXIS], own[SEQUENCE], own[OPERATION], own[SIZE] = 0, microbatch, operation, 0
    own[WAITS_SINCE] = own[WAITS_SINCE] or monotonic_ns()  # one wait, whatever comes of it first
