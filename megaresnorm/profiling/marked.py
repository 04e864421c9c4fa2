"""Where a step is marked: a model's parts and an engine's phases, wrapped from outside for single steps.

Forward passes are marked where a part's method is called. Backward passes are marked by hooks before autograd's nodes:
that of a part's output begins its backward pass. A node takes no time for that, where hooks of whole modules would
wrap their inputs and outputs. Blocks that are compiled are marked around the compiled code alone.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor

from megaresnorm.engines.engine import Engine
from megaresnorm.model.block import Block
from megaresnorm.model.compiled import BlockRun, CompiledSpan
from megaresnorm.model.residual import Residual
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.profiling.rows import Phase, Row, Rows, in_phase
from megaresnorm.profiling.timeline import Marks
from megaresnorm.profiling.traffic import MarkedLinear, MarkedTransport
from megaresnorm.recompute import is_running_again
from megaresnorm.telemetry.wrapped import Wrapped

GRADIENTS = Row("gradients", "gradients")
OPTIMIZER = Row("optimizer", "optimizer")
HOST = Row("host", "host")
DATA = Row("data", "data")
BUBBLE = Row("bubble", "bubble")
WEIGHTS = Row("weights", "weights")
_MARKED = "megaresnorm.profiling"  # in a node's metadata: it has its hook


class MarkedRun:
    """A compiled or sharded run of blocks as a model calls it, marked around the call.

    Attributes:
        blocks: as of the run, whose number the model asks for.
    """

    def __init__(self, run: Callable, blocks: Any, around: Callable[[Callable, tuple], Any]) -> None:
        self._run, self.blocks, self._around = run, blocks, around

    def __call__(self, *arguments: Any) -> Any:
        """What the run returns."""
        return self._around(self._run, arguments)


class Marking:
    """Wraps what is to be marked in one step.

    Args:
        marks: takes the marks.
        splits: whether products of backward are told apart. Layers whose products torch differentiates as a whole then
            compute them one by one.
    """

    def __init__(self, engine: Engine, rows: Rows, marks: Marks, *, splits: bool = False) -> None:
        self._engine, self._rows, self._marks, self._splits = engine, rows, marks, splits
        self._context = engine.assembled.context
        self._compiled = engine.assembled.compiled != "none"
        # Weights are gathered by hooks between the blocks: of FSDP2, or of ZeRO-3.
        self._gathers = engine.gathers_weights
        self._after_backward = rows.place(GRADIENTS, Phase.EXPOSED if self._context.dp.size > 1 else Phase.BACKWARD)

    def wrap(self, wrapped: Wrapped, next_batch: Any) -> None:
        """Wrap the engine, its models, and what gives batches: an object with ``next_batch``."""
        self._wrap_step(wrapped, next_batch)
        self._wrap_axes(wrapped, self._context)
        for number, model in self._engine.assembled.models.items():
            stage = number if self._context.pp.size > 1 else None
            self._wrap_model(wrapped, model, stage)

    def _wrap_step(self, wrapped: Wrapped, next_batch: Any) -> None:
        place, engine = self._rows.place, self._engine
        gradients = place(GRADIENTS, Phase.BACKWARD)
        wrapped.method(next_batch, "next_batch", partial(self._whole, place(DATA, Phase.FORWARD)))
        wrapped.method(engine.policy, "sum_up", partial(self._whole, gradients))
        wrapped.method(engine, "update", partial(self._whole, place(OPTIMIZER, Phase.FORWARD)))
        wrapped.method(engine.policy, "settle", self._host_wait)
        first = place(WEIGHTS, Phase.EXPOSED) if self._gathers else self._rows.other
        wrapped.method(engine.passes, "train", partial(self._entered, first))
        if engine.pipeline is not None:
            wrapped.method(engine.pipeline, "run", partial(self._whole, place(BUBBLE, Phase.FORWARD), after=gradients))
            wrapped.method(
                engine.pipeline, "schedule_for", lambda made: lambda *key: self._schedule(wrapped, made(*key))
            )

    def _wrap_axes(self, wrapped: Wrapped, context: ParallelContext) -> None:
        unmarked = {"control", "mesh"} | ({"tp"} if self._compiled else set())  # what a compiler has seen stays
        axes = (getattr(context, field.name) for field in fields(context) if field.name not in unmarked)
        for axis in {id(axis): axis for axis in axes}.values():
            if axis.transport is not None:
                # All ranks meet once a step. Where there are stages, they wait there for the last of them.
                waits = axis is context.world and context.pp.size > 1
                bubble = self._rows.place(BUBBLE, Phase.EXPOSED) if waits else None
                wrapped.value(axis, "transport", MarkedTransport(axis.transport, self._marks, bubble))

    def _wrap_model(self, wrapped: Wrapped, model: Transformer, stage: int | None) -> None:
        def row(name: str, part: str) -> tuple[int, int, int]:
            return self._places(Row(name, part, None, stage))

        if model.embedding is not None:
            wrapped.method(model, "embed", partial(self._part, row("embedding", "embedding")))
        if model.head is not None:
            if model.final_norm is not None:
                wrapped.method(model, "finish", partial(self._part, row("final norm", "norm")))
            wrapped.method(model.head, "forward", partial(self._head, row("output matrix", "head")))
        runs = dict(model.runs) if model.compiled is None else dict(model.compiled.runs)
        if model.compiled is None and not self._compiled:
            for number, block in model.blocks.items():
                self._wrap_block(wrapped, cast(Block, block), int(number), stage)
        elif model.compiled is None:  # each block is compiled in its place, between FSDP2's hooks
            marked = {n: MarkedRun(run, [run], partial(self._run, (n, n), stage)) for n, run in runs.items()}
            wrapped.value(model, "runs", marked)
        else:
            self._wrap_compiled(wrapped, model.compiled, runs, stage)

    def _wrap_compiled(self, wrapped: Wrapped, owner: Any, runs: dict[int, Any], stage: int | None) -> None:
        for first, run in runs.items():
            if isinstance(run, CompiledSpan):
                self._wrap_compiled(wrapped, run, dict(run.runs), stage)
            elif isinstance(run, BlockRun):
                last = first + len(run.blocks) - 1
                runs[first] = MarkedRun(run, run.blocks, partial(self._run, (first, last), stage))
        wrapped.value(owner, "runs", runs)

    def _wrap_block(self, wrapped: Wrapped, block: Block, number: int, stage: int | None) -> None:
        norm = self._places(Row(f"block {number} norm", "norm", number, stage))
        weights = self._rows.place(Row(f"block {number} weights", "weights", number, stage), Phase.EXPOSED)
        if self._gathers:
            mark = self._marks.mark
            for handle in (
                block.register_forward_pre_hook(lambda module, given: mark(weights), prepend=True),
                block.register_forward_hook(lambda module, given, result: mark(weights), prepend=True),
            ):
                wrapped.at_end(handle.remove)
        for kind, residual in zip(SUBLAYERS, block.sublayers, strict=True):
            row = Row(f"block {number} {kind}", kind, number, stage)
            branch, remakes = self._places(row), in_phase(norm[0], Phase.RECOMPUTE)
            if residual.reruns and self._context.tp.size > 1:  # it gathers its input before what is run again
                wrapped.method(residual, "run", partial(self._entered, in_phase(branch[0], Phase.EXPOSED)))
            wrapped.method(residual, "_run", partial(self._branch, row, remakes))
            before = self._begins_at(weights) if self._gathers and residual is block.sublayers[0] else None
            wrapped.method(residual, "open", partial(self._norm, norm, before))
            for name in ("close_and_open", "close"):
                wrapped.method(residual, name, partial(self._norm, norm, None))
            self._wrap_branch(wrapped, residual, branch)

    def _wrap_branch(self, wrapped: Wrapped, residual: Residual, places: tuple[int, int, int]) -> None:
        if hasattr(residual.branch, "_remade"):
            timed = partial(self._remake_timed, places[2])
            wrapped.method(residual.branch, "_remade", lambda made: lambda *given: timed(made(*given)))
        if self._splits:
            for layer in residual.branch.modules():
                if isinstance(layer, Linear):
                    wrapped.value(layer, "kernel", MarkedLinear(layer.kernel, self._marks))

    def _places(self, row: Row) -> tuple[int, int, int]:
        """Those of its forward pass, its backward pass, and what is run again."""
        place = self._rows.place
        return place(row, Phase.FORWARD), place(row, Phase.BACKWARD), place(row, Phase.RECOMPUTE)

    # What the methods become.

    def _whole(self, place: int, method: Callable, after: int | None = None) -> Callable:
        """All of it is of one place, but for what marks itself."""
        marks, after = self._marks, self._rows.other if after is None else after

        def call(*given: Any, **named: Any) -> Any:
            marks.mark(place)
            result = method(*given, **named)
            marks.mark(after)
            return result

        return call

    def _entered(self, place: int, method: Callable) -> Callable:
        """What it does before its parts, which mark themselves."""

        def call(*given: Any) -> Any:
            self._marks.mark(place)
            return method(*given)

        return call

    def _host_wait(self, settle: Callable) -> Callable:
        place = self._rows.place(HOST, Phase.FORWARD)

        def call(*given: Any) -> Any:
            self._marks.mark(place)
            start = perf_counter()
            result = settle(*given)
            self._marks.waited(perf_counter() - start)
            self._marks.mark(self._rows.other)
            return result

        return call

    def _begins_at(self, place: int) -> Callable[[Tensor | None], None]:
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

    def _again(self, place: int, method: Callable, given: tuple) -> Any:
        """Run within a recomputation, after which the place is what it was."""
        before = self._marks.current
        self._marks.mark(place)
        try:
            return method(*given)
        finally:
            self._marks.mark(before)

    def _branch(self, row: Row, remakes: int, run: Callable) -> Callable:
        """A branch, whose input may be made again, which is the norm's work."""
        forward, backward, again = self._places(row)
        mark, begin, ran_again = self._marks, self._begins_at(backward), self._rows.again
        timed = partial(self._remake_timed, remakes)

        def call(x: Tensor | None, u: BranchInput, *given: Any) -> Tensor:
            if is_running_again():
                ran_again.setdefault(row, False)
                y = self._again(again, run, (x, u, *given))
                ran_again[row] = True  # else the last tensor that backward needs has ended it
                return y
            mark.mark(forward)
            y = run(x, timed(u) if u.remake is not None else u, *given)
            begin(y)
            return y

        return call

    def _remake_timed(self, place: int, u: BranchInput) -> BranchInput:
        remake = u.remake
        return u if remake is None else u._replace(remake=lambda sources: self._again(place, remake, (sources,)))

    def _norm(
        self, places: tuple[int, int, int], before: Callable[[Tensor | None], None] | None, method: Callable
    ) -> Callable:
        forward, backward, again = places
        mark, begin = self._marks, self._begins_at(backward)

        def call(*given: Any) -> Any:
            if is_running_again():
                return self._again(again, method, given)
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

    def _part(self, places: tuple[int, int, int], method: Callable) -> Callable:
        """Of a model's end: a stream or a branch input is returned."""
        begin = self._begins_at(places[1])

        def call(*given: Any) -> Any:
            self._marks.mark(places[0])
            result = method(*given)
            begin(result.x if isinstance(result, Stream) else result.local)
            return result

        return call

    def _head(self, places: tuple[int, int, int], method: Callable) -> Callable:
        begin, after = self._begins_at(places[1]), partial(self._marks.mark, self._after_backward)

        def ends(gradients: Any) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(after)

        def call(*given: Any) -> Any:
            self._marks.mark(places[0])
            result = method(*given)
            objective = result[1] if isinstance(result, tuple) else result
            begin(objective)
            if objective.grad_fn is not None and self._context.pp.size == 1:
                objective.grad_fn.register_prehook(ends)
            return result

        return call

    def _run(self, numbers: tuple[int, int], stage: int | None, run: Callable, given: tuple) -> Any:
        """A call of compiled blocks."""
        first, last = numbers
        name = f"block {first}" if first == last else f"blocks {first}-{last}"
        row = Row(name, "block", first, stage)
        places = self._places(row)
        if is_running_again():
            self._rows.again[row] = True
            return self._again(places[2], run, given)
        self._marks.mark(places[0])
        stream, begin = run(*given), self._begins_at(places[1])
        begin(stream.x)
        begin(stream.delta)
        return stream

    def _schedule(self, wrapped: Wrapped, schedule: Any) -> Any:
        from megaresnorm.parallel.pipeline import stages_in  # imported by runs with stages alone

        for stage in stages_in(schedule):
            for kind, name in (("F", "forward_one_chunk"), ("B", "backward_one_chunk")):
                if name not in vars(stage):
                    wrapped.method(stage, name, partial(self._chunk, kind, stage.stage_index))
        return schedule

    def _chunk(self, kind: str, stage: int, method: Callable) -> Callable:
        """A microbatch's pass through a stage; between them the pipeline waits."""
        model = self._engine.assembled.models[stage]
        place = self._rows.other
        if self._gathers:
            place = self._rows.place(WEIGHTS, Phase.EXPOSED)
        elif model.stage.blocks and not self._compiled:  # to which the stream's ends belong
            number = model.stage.blocks[0 if kind == "F" else -1]
            phase = Phase.FORWARD if kind == "F" else Phase.BACKWARD
            place = self._rows.place(Row(f"block {number} norm", "norm", number, stage), phase)
        bubble, marks = self._rows.place(BUBBLE, Phase.FORWARD), self._marks

        def call(microbatch: int, *given: Any, **named: Any) -> Any:
            marks.mark(place)
            start = marks.now()
            result = method(microbatch, *given, **named)
            marks.chunk(kind, stage, microbatch, start)
            marks.mark(bubble)
            return result

        return call
