"""Where a step is marked: a model's parts and an engine's phases, wrapped from outside for single steps.

Forward passes are marked where a part's method is called. Backward passes are marked by hooks before autograd's nodes:
that of a part's output begins its backward pass. A node takes no time for that, where hooks of whole modules would
wrap their inputs and outputs. Blocks that are compiled are marked around the compiled code alone.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, cast

from megaresnorm.engines.engine import Engine
from megaresnorm.model.block import Block
from megaresnorm.model.branches.ffn import FeedForward
from megaresnorm.model.compiled import BlockRun, CompiledSpan
from megaresnorm.model.residual import Residual
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.profiling.calls import Calls, Places
from megaresnorm.profiling.rows import (
    BUBBLE,
    DATA,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Phase,
    Row,
    Rows,
    in_phase,
)
from megaresnorm.profiling.timeline import Marks
from megaresnorm.profiling.traffic import MarkedLinear, MarkedTransport
from megaresnorm.telemetry.wrapped import Wrapped


class MarkedRun:
    """A compiled run of blocks as a model calls it, marked around the call.

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
        self._calls = Calls(rows, marks)
        self._stages: set[int] = set()  # whose passes are marked
        self._compiled = engine.assembled.compiled != "none"
        # Weights are gathered by hooks between the blocks: of FSDP2, or of ZeRO-3.
        self._gathers = engine.gathers_weights
        self._after_backward: int | None = None
        if self._context.pp.size == 1:
            phase = Phase.EXPOSED if self._context.dp.size > 1 else Phase.BACKWARD
            self._after_backward = rows.place(GRADIENTS, phase)

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
        wrapped.method(next_batch, "next_batch", partial(self._calls.whole, place(DATA, Phase.FORWARD)))
        wrapped.method(engine, "backward", partial(self._calls.followed, gradients))
        wrapped.method(engine.policy, "sum_up", partial(self._calls.whole, gradients))
        wrapped.method(engine, "update", partial(self._calls.whole, place(OPTIMIZER, Phase.FORWARD)))
        wrapped.method(engine.policy, "settle", self._calls.host_wait)
        first = place(WEIGHTS, Phase.EXPOSED) if self._gathers else self._rows.other
        wrapped.method(engine.passes, "train", partial(self._calls.entered, first))
        if engine.pipeline is not None:
            wrapped.method(
                engine.pipeline, "run", partial(self._calls.whole, place(BUBBLE, Phase.FORWARD), after=gradients)
            )
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
        def row(name: str, part: str) -> Places:
            return self._calls.places(Row(name, part, None, stage))

        if model.embedding is not None:
            wrapped.method(model, "embed", partial(self._calls.part, row("embedding", "embedding")))
        if model.head is not None:
            gathered = self._gathered_before(list(model.stage.blocks), stage)
            if model.final_norm is not None:
                final = partial(self._calls.part, row("final norm", "norm"), before=gathered)
                wrapped.method(model, "finish", final)
            around = self._rows.place(WEIGHTS, Phase.EXPOSED) if self._gathers else None
            head = partial(self._calls.head, row("output matrix", "head"), self._after_backward, around)
            wrapped.method(model.head, "forward", head)
        runs = dict(model.runs) if model.compiled is None else dict(model.compiled.runs)
        if model.compiled is None and not self._compiled:
            for number, block in model.blocks.items():
                self._wrap_block(wrapped, cast(Block, block), int(number), stage)
        elif model.compiled is None:  # each block is compiled in its place, between FSDP2's hooks
            marked = {n: MarkedRun(run, [run], partial(self._calls.run, (n, n), stage)) for n, run in runs.items()}
            wrapped.value(model, "runs", marked)
        else:
            self._wrap_compiled(wrapped, model.compiled, runs, stage)

    def _gathered_before(self, blocks: list[int], stage: int | None) -> int | None:
        """Where the gathers belong that backward makes before the last block; None where there are none."""
        if not self._gathers or not blocks:
            return None
        return self._rows.place(Row(f"block {blocks[-1]} weights", "weights", blocks[-1], stage), Phase.EXPOSED)

    def _wrap_compiled(self, wrapped: Wrapped, owner: Any, runs: dict[int, Any], stage: int | None) -> None:
        for first, run in runs.items():
            if isinstance(run, CompiledSpan):
                self._wrap_compiled(wrapped, run, dict(run.runs), stage)
            elif isinstance(run, BlockRun):
                last = first + len(run.blocks) - 1
                runs[first] = MarkedRun(run, run.blocks, partial(self._calls.run, (first, last), stage))
        wrapped.value(owner, "runs", runs)

    def _wrap_block(self, wrapped: Wrapped, block: Block, number: int, stage: int | None) -> None:
        norm = self._calls.places(Row(f"block {number} norm", "norm", number, stage))
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
            branch, remakes = self._calls.places(row), in_phase(norm[0], Phase.RECOMPUTE)
            if residual.reruns and self._context.tp.size > 1:  # it gathers its input before what is run again
                wrapped.method(residual, "run", partial(self._calls.entered, in_phase(branch[0], Phase.EXPOSED)))
            wrapped.method(residual, "run_once", partial(self._calls.branch, row, remakes))
            before = self._calls.begins_at(weights) if self._gathers and residual is block.sublayers[0] else None
            wrapped.method(residual, "open", partial(self._calls.norm, norm, before))
            for name in ("close_and_open", "close"):
                wrapped.method(residual, name, partial(self._calls.norm, norm, None))
            self._wrap_branch(wrapped, residual, branch)

    def _wrap_branch(self, wrapped: Wrapped, residual: Residual, places: Places) -> None:
        if isinstance(residual.branch, FeedForward):
            timed = partial(self._calls.remake_timed, places[2])
            wrapped.method(residual.branch, "remade", lambda made: lambda *given: timed(made(*given)))
        if self._splits:
            for layer in residual.branch.modules():
                if isinstance(layer, Linear):
                    wrapped.value(layer, "kernel", MarkedLinear(layer.kernel, self._marks))

    def _schedule(self, wrapped: Wrapped, schedule: Any) -> Any:
        from megaresnorm.parallel.pipeline import stages_in  # imported by runs with stages alone

        for stage in stages_in(schedule):
            if id(stage) not in self._stages:  # which schedules have in common
                self._stages.add(id(stage))
                for kind, name in (("F", "forward_one_chunk"), ("B", "backward_one_chunk")):
                    wrapped.method(stage, name, partial(self._chunk, kind, stage.stage_index))
        return schedule

    def _chunk(self, kind: str, stage: int, method: Callable) -> Callable:
        """A microbatch's pass through a stage; between them the pipeline waits.

        What torch does around the passes of the model's parts is the stage's own.
        """
        row = Row(f"stage {stage}", "stage", None, stage)
        forward, backward, _ = self._calls.places(row)
        # FSDP2 gathers what belongs to no block before the first of them.
        first = self._rows.place(WEIGHTS, Phase.EXPOSED) if self._gathers else forward
        place, ends = first if kind == "F" else backward, self._calls.ends_at(backward)
        bubble, marks = self._rows.place(BUBBLE, Phase.FORWARD), self._marks

        def call(microbatch: int, *given: Any, **named: Any) -> Any:
            marks.mark(place)
            start = marks.now()
            result = method(microbatch, *given, **named)
            if kind == "F":  # of the last stage the objective comes last
                ends(result[-1] if isinstance(result, tuple | list) else result)
            marks.chunk(kind, stage, microbatch, start)
            marks.mark(bubble)
            return result

        return call
