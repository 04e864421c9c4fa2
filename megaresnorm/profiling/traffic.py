"""Collectives and products of linear layers as they mark a step's time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaresnorm.parallel.linear_kernel import LinearKernel, LinearOver
from megaresnorm.parallel.transport import Pending, Transport
from megaresnorm.profiling.rows import Phase, in_phase
from megaresnorm.profiling.timeline import Marks


class MarkedTransport:
    """The collectives of a group, whose time is charged to the row that starts them and to that which waits.

    Starting and waiting are exposed. What lies between is hidden: the message was under way behind a computation, all
    that time where waiting took any, and at most that time where it did not.

    Args:
        transport: sends.
        place: to which exposed time is charged; None: to the row that is under way.
    """

    def __init__(self, transport: Transport, marks: Marks, place: int | None = None) -> None:
        self._transport, self._marks, self._place = transport, marks, place

    def start_all_reduce(self, x: Tensor, *, overwrite: bool) -> Pending:
        """See ``Transport``."""
        return self._marked(lambda: self._transport.start_all_reduce(x, overwrite=overwrite))

    def start_all_gather(self, x: Tensor) -> Pending:
        """See ``Transport``."""
        return self._marked(lambda: self._transport.start_all_gather(x))

    def start_reduce_scatter(self, x_p: Tensor) -> Pending:
        """See ``Transport``."""
        return self._marked(lambda: self._transport.start_reduce_scatter(x_p))

    def _marked(self, start: Callable[[], Pending]) -> Pending:
        marks = self._marks
        starts = marks.current
        marks.mark(self._exposed(starts))
        pending = start()
        marks.mark(starts)
        started = marks.now()

        def wait() -> Tensor:
            waits = marks.current
            marks.overlap(starts, started)
            marks.mark(self._exposed(waits))
            result = pending()
            marks.mark(waits)
            return result

        return wait

    def _exposed(self, place: int) -> int:
        return in_phase(place, Phase.EXPOSED) if self._place is None else self._place


class MarkedLinear(LinearOver):
    """The products of another kernel, of which those of backward are charged to phases of their own."""

    def __init__(self, kernel: LinearKernel, marks: Marks) -> None:
        super().__init__(kernel)
        self._marks = marks

    def input_grad(self, dy: Any, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return self._in(Phase.INPUT_GRAD, lambda: self._kernel.input_grad(dy, operand))

    def weight_grad(self, dy: Any, x: Any, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return self._in(Phase.WEIGHT_GRAD, lambda: self._kernel.weight_grad(dy, x, dtype))

    def add_weight_grad(self, total: Tensor, dy: Any, x: Any) -> None:
        """See ``LinearKernel``."""
        self._in(Phase.WEIGHT_GRAD, lambda: self._kernel.add_weight_grad(total, dy, x))

    def _in(self, phase: Phase, work: Callable[[], Any]) -> Any:
        before = self._marks.current
        self._marks.mark(in_phase(before, phase))
        result = work()
        self._marks.mark(before)
        return result
