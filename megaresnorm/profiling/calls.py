"""What the methods of a model and an engine become in a step that is marked."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from megaresnorm.model.stream import Stream
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.profiling.rows import HOST, Phase, Row, Rows
from megaresnorm.profiling.timeline import Marks
from megaresnorm.recompute import is_running_again

Places = tuple[int, int, int]  # of a row's forward pass, its backward pass, and what is run again
_MARKED = "megaresnorm.profiling"  # in a node's metadata: it has its hook


class Calls:
    """Methods with marks around them. Each of these takes a method last, and returns what takes its place."""

    def __init__(self, rows: Rows, marks: Marks) -> None:
        self._rows, self._marks = rows, marks

    def places(self, row: Row) -> Places:
        """The places of a row."""
        place = self._rows.place
        return place(row, Phase.FORWARD), place(row, Phase.BACKWARD), place(row, Phase.RECOMPUTE)

    def whole(self, place: int, method: Callable, after: int | None = None) -> Callable:
        """All of it is of one place, but for what marks itself."""
        marks, after = self._marks, self._rows.other if after is None else after

        def call(*given: Any, **named: Any) -> Any:
            marks.mark(place)
            result = method(*given, **named)
            marks.mark(after)
            return result

        return call

    def followed(self, place: int, method: Callable) -> Callable:
        """What comes after it is of one place."""

        def call(*given: Any) -> Any:
            result = method(*given)
            self._marks.mark(place)
            return result

        return call

    def entered(self, place: int, method: Callable) -> Callable:
        """What it does before its parts, which mark themselves, is of one place."""

        def call(*given: Any) -> Any:
            self._marks.mark(place)
            return method(*given)

        return call

    def host_wait(self, settle: Callable) -> Callable:
        """The host waits within it for the device."""
        place = self._rows.place(HOST, Phase.FORWARD)

        def call(*given: Any) -> Any:
            self._marks.mark(place)
            start = perf_counter()
            result = settle(*given)
            self._marks.waited(perf_counter() - start)
            self._marks.mark(self._rows.other)
            return result

        return call

    def begins_at(self, place: int) -> Callable[[Tensor | None], None]:
        """What hooks the node of a tensor, so that its backward pass begins a place, unless another has hooked it."""
        mark = self._marks

        def hook(gradients: Any) -> None:
            mark.mark(place)

        def begin(x: Tensor | None) -> None:
            node: Any = None if x is None else x.grad_fn
            if node is not None and _MARKED not in node.metadata:
                node.metadata[_MARKED] = True
                node.register_prehook(hook)

        return begin

    def ends_at(self, place: int) -> Callable[[Tensor], None]:
        """What hooks the node of a tensor that a backward pass begins with, so that the place follows that pass."""
        after = partial(self._marks.mark, place)

        def hook(gradients: Any) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(after)

        def ends(x: Tensor) -> None:
            if x.grad_fn is not None:
                x.grad_fn.register_prehook(hook)

        return ends

    def again(self, place: int, method: Callable, given: tuple) -> Any:
        """Call a method within a recomputation, after which the place is what it was."""
        before = self._marks.current
        self._marks.mark(place)
        try:
            return method(*given)
        finally:
            self._marks.mark(before)

    def branch(self, row: Row, remakes: int, run: Callable) -> Callable:
        """A branch. To make its input again is of the place ``remakes``."""
        forward, backward, again = self.places(row)
        mark, begin, ran_again = self._marks, self.begins_at(backward), self._rows.again
        timed = partial(self.remake_timed, remakes)

        def call(x: Tensor | None, u: BranchInput, *given: Any) -> Tensor:
            if is_running_again():
                ran_again.setdefault(row, False)
                y = self.again(again, run, (x, u, *given))
                ran_again[row] = True  # else the last tensor that backward needs has ended it
                return y
            mark.mark(forward)
            y = run(x, timed(u) if u.remake is not None else u, *given)
            begin(y)
            return y

        return call

    def remake_timed(self, place: int, u: BranchInput) -> BranchInput:
        """The same input; to make it again is of a place."""
        remake = u.remake
        return u if remake is None else u._replace(remake=lambda sources: self.again(place, remake, (sources,)))

    def norm(self, places: Places, before: Callable[[Tensor | None], None] | None, method: Callable) -> Callable:
        """A norm, with the add before it.

        Args:
            before: hooks what the stream that it takes was made by.
        """
        forward, backward, again = places
        mark, begin = self._marks, self.begins_at(backward)

        def call(*given: Any) -> Any:
            if is_running_again():
                return self.again(again, method, given)
            mark.mark(forward)
            if before is not None:  # hooks that gather weights run between this node and those of the block before
                before(given[0].x)
                before(given[0].delta)
            result = method(*given)
            if isinstance(result, Stream):
                if result.delta is None:
                    begin(result.x)
            else:
                begin(result[0])
                begin(result[1].local)
            return result

        return call

    def part(self, places: Places, method: Callable, before: int | None = None) -> Callable:
        """A part of the model's ends, which returns a stream or a branch input.

        Args:
            before: what time is charged to between its backward pass and the next one's, where hooks gather weights;
                None: there are none.
        """
        begin = self.begins_at(places[1])
        leave = None if before is None else self.begins_at(before)

        def call(*given: Any) -> Any:
            self._marks.mark(places[0])
            if leave is not None:  # the hooks are those of the tensors given: this node comes before them
                given = (_with_nodes(given[0], leave), *given[1:])
            result = method(*given)
            begin(result.x if isinstance(result, Stream) else result.local)
            return result

        return call

    def head(self, places: Places, after_backward: int | None, gathers: int | None, method: Callable) -> Callable:
        """The output matrix with the loss, where the backward pass begins.

        Args:
            after_backward: what time is charged to when the backward pass has ended; None: whoever runs it says.
            gathers: likewise where hooks gather its weights, around its backward pass; None: there are none.
        """
        begin, leave = self.begins_at(places[1]), None if gathers is None else self.begins_at(gathers)
        ends = None if after_backward is None else self.ends_at(after_backward)

        def call(*given: Any) -> Any:
            self._marks.mark(places[0])
            if leave is not None:
                leave(given[0].local)  # a node of FSDP2's, if it has one here
            result = method(*given)
            objective = result[1] if isinstance(result, tuple) else result
            begin(objective)
            if ends is not None:
                ends(objective)
            self._marks.close()
            if gathers is not None:
                self._marks.mark(gathers)
            return result

        return call

    def run(self, numbers: tuple[int, int], stage: int | None, run: Callable, given: tuple) -> Any:
        """Call compiled blocks.

        Args:
            numbers: of the first and the last.
        """
        first, last = numbers
        name = f"block {first}" if first == last else f"blocks {first}-{last}"
        row = Row(name, "block", first, stage, last - first + 1)
        places = self.places(row)
        if is_running_again():
            self._rows.again[row] = True
            return self.again(places[2], run, given)
        self._marks.mark(places[0])
        stream, begin = run(*given), self.begins_at(places[1])
        begin(stream.x)
        begin(stream.delta)
        return stream


def _with_nodes(stream: Stream, hook: Callable[[Tensor | None], None]) -> Stream:
    """The same stream, of nodes of its own, which are hooked."""
    x, delta = (None if t is None else t.view_as(t) for t in (stream.x, stream.delta))
    hook(x)
    hook(delta)
    assert x is not None
    return stream._replace(x=x, delta=delta)
