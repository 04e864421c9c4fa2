"""A window of a run's steps that is measured: which steps how, and what is written when it ends."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.errors import TrainingError
from megaresnorm.model.cost import training_flops
from megaresnorm.parallel.control import all_gather_json, all_or_raise
from megaresnorm.parallel.environment import host_name, under_nsight
from megaresnorm.parallel.stages import bubble
from megaresnorm.profiling.marked import Marking
from megaresnorm.profiling.measures import measures_of_rank, statistics
from megaresnorm.profiling.memory import Bytes, MemoryStep
from megaresnorm.profiling.outputs import to_tensorboard, write_profile
from megaresnorm.profiling.profile import FILE, merged
from megaresnorm.profiling.rows import Row, Rows
from megaresnorm.profiling.show import summary_lines
from megaresnorm.profiling.timeline import Marks, Measured, Ranges, Timeline, clock_of
from megaresnorm.profiling.trace import slices_of
from megaresnorm.recipe.training import ProfileRecipe
from megaresnorm.schedule import learning_rate
from megaresnorm.telemetry.depth.figures import DepthFigures
from megaresnorm.telemetry.depth.watch import DepthWatch
from megaresnorm.telemetry.describe import describe_ranks
from megaresnorm.telemetry.log import log_lines
from megaresnorm.telemetry.throughput import peak_tflops, product_tflops
from megaresnorm.telemetry.wrapped import Wrapped

if TYPE_CHECKING:
    from megaresnorm.run import Run

PAIRS = 10  # steps without marks, in turn with those that are timed
SPLIT = 3  # steps whose products of backward are told apart
TRACED = 3  # timed steps in the trace


def kinds_of(steps: int, *, compiled: bool) -> list[str]:
    """What is done in each step of a window: timed, plain (for the cost of the marks), split, memory, watched.

    Args:
        steps: that are timed.
        compiled: whether what is split and watched is inside compiled blocks, and not seen.
    """
    pairs = min(steps, PAIRS)
    seen = [] if compiled else ["split"] * SPLIT + ["watched"]
    return ["timed", "plain"] * pairs + ["timed"] * (steps - pairs) + seen + ["memory"]


def first_step(start: int, count: int, done: int) -> int:
    """Where a window begins, counted from 1; 0 where it has been measured.

    A run that was stopped within its window measures one of that length from where it goes on, after two steps that
    warm up.

    Args:
        start: of the window.
        count: its length.
        done: steps that are done where this process begins.

    >>> first_step(10, 5, 0), first_step(10, 5, 9), first_step(10, 5, 12), first_step(10, 5, 14)
    (10, 10, 15, 0)
    """
    if done < start:
        return start
    return done + 3 if done < start + count - 1 else 0


class Profiler:
    """Measures a window of a run's steps on all ranks, and has the first one write what was found.

    Outside the window it names ranges for torch.profiler and Nsight where one of them runs, and costs nothing else.

    Args:
        window: None: there is none.
        folder: to write into; made where it is missing.
        command: by which the profile can be made again.
        writes_trace: whether the last steps are written as a trace.
        tells: whether what was found is logged.

    Attributes:
        last_step: of the window, counted from 1; 0 where there is none.
        profile: what was written, on the first rank.
    """

    def __init__(
        self,
        run: "Run",
        window: ProfileRecipe | None,
        folder: Path,
        command: str,
        *,
        writes_trace: bool = True,
        tells: bool = False,
    ) -> None:
        self._run, self._folder, self._command = run, folder, command
        self._writes_trace, self._tells = writes_trace, tells
        self._kinds: dict[int, str] = {}
        self._first, self._rows = 0, Rows()
        if window is not None:
            kinds = kinds_of(window.steps, compiled=run.engine.assembled.compiled != "none")
            self._first = first_step(window.start, len(kinds), run.steps_done)
            self._kinds = {self._first + i: kind for i, kind in enumerate(kinds if self._first else [])}
        self.last_step = max(self._kinds, default=0)
        self._timeline = Timeline(clock_of(run.device), self._rows)
        self._timed: list[Measured] = []
        self._split: list[Measured] = []
        self._memory: dict[Row, Bytes] = {}
        self._depth: DepthFigures | None = None
        self._cpu: dict[str, list[float]] = {"timed": [], "plain": []}
        self._aligned = 0
        self.profile: dict[str, Any] | None = None

    @contextmanager
    def seen_in(self, step: int) -> Iterator[None]:
        """Measure the step that is made within, if it is one of the window's. Collective at its ends.

        Args:
            step: counted from 1.
        """
        kind = self._kinds.get(step)
        if kind is None:
            with self._ranges():
                yield
            return
        if step == self._first:
            all_gather_json(None, self._run.context.control)  # which all ranks leave at nearly the same moment
            self._aligned = time.perf_counter_ns()
        with self._wrapped(kind):
            yield
        if step == self.last_step:
            self.finish()

    @contextmanager
    def _wrapped(self, kind: str) -> Iterator[None]:
        if kind == "memory":
            step = MemoryStep(self._rows, self._run.device)
            with Wrapped() as wrapped, step.followed():
                self._marking(step.marks).wrap(wrapped, self._run)
                yield
            self._memory = step.found
            return
        if kind == "watched":
            run = self._run
            norms = TensorNorms(run.engine, run.recipe.optim)
            watch = DepthWatch(run.recipe.model, run.engine.assembled, norms)
            with watch.watching(learning_rate(run.steps_done, run.recipe)):
                yield
            self._depth = watch.figures
            return
        with Wrapped() as wrapped:
            if kind != "plain":
                self._marking(self._timeline, splits=kind == "split").wrap(wrapped, self._run)
            cpu = self._now()
            self._timeline.begin()
            yield
            measured = self._timeline.end()
            if kind in self._cpu:
                self._cpu[kind].append(self._now() - cpu)
        if kind != "plain":
            (self._split if kind == "split" else self._timed).append(measured)

    def _now(self) -> float:
        """Seconds that tell what marks cost: of the processor, which other programs do not disturb, or of a GPU."""
        return time.process_time() if self._run.device.type == "cpu" else time.perf_counter()

    def _marking(self, marks: Marks, *, splits: bool = False) -> Marking:
        return Marking(self._run.engine, self._rows, marks, splits=splits)

    @contextmanager
    def _ranges(self) -> Iterator[None]:
        nsight = under_nsight() and self._run.device.type == "cuda"
        if not nsight and not torch.autograd.profiler._is_profiler_enabled:
            yield
            return
        ranges = Ranges(self._rows, nvtx=nsight)
        with Wrapped() as wrapped:
            self._marking(ranges).wrap(wrapped, self._run)
            ranges.mark(self._rows.other)
            try:
                yield
            finally:
                ranges.close()

    def finish(self) -> None:
        """Write the profile of the steps that were timed so far, unless it has been written. Collective.

        Raises:
            TrainingError: it cannot be written.
        """
        self._kinds = {}
        if not self._timed:
            return
        run, context = self._run, self._run.context
        tokens = run.recipe.train.global_batch * run.recipe.model.seq_len
        mine = measures_of_rank(
            run.engine,
            run.recipe.model,
            self._rows,
            self._timed,
            self._split,
            self._memory,
            tokens=tokens // context.dp.size,
        )
        mine |= {"rank": context.control.rank, "host": host_name(), "pp": context.pp.rank}
        mine |= {"dp": context.dp.rank, "tp": context.tp.rank, "overhead": self._overhead()}
        if self._writes_trace:
            mine["trace"] = slices_of(self._rows, self._timed[-TRACED:], len(self._timed[:-TRACED]) + 1, self._aligned)
        ranks = all_gather_json(mine, context.control)
        all_or_raise(lambda: self._write(ranks), context.control)
        self._timed = []

    def _overhead(self) -> list[float] | None:
        """What marks add to a step, as a share of it: over pairs of steps in turn, as ``statistics`` of them."""
        pairs = list(zip(self._cpu["timed"], self._cpu["plain"], strict=False))
        return statistics([with_marks / without - 1.0 for with_marks, without in pairs]) if pairs else None

    def _write(self, ranks: list[dict[str, Any]]) -> None:
        if self._run.context.control.rank > 0:
            return
        self.profile = merged(ranks, self._head(ranks), self._depth)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_profile(self._folder, self.profile, ranks)
            if "tensorboard" in self._run.recipe.train.loggers:
                to_tensorboard(self._run.output / "tensorboard" / "profile", self.profile)
        except OSError as e:
            raise TrainingError(f"{self._folder}: the profile cannot be written ({e.strerror})") from None
        if self._tells:
            log_lines([*summary_lines(self.profile), f"written   {self._folder}/{FILE}"])

    def _head(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        recipe, device = self._run.recipe, self._run.device
        parallel, tokens = recipe.parallel, recipe.train.global_batch * recipe.model.seq_len
        ideal, peak = None, peak_tflops(device, recipe.precision.compute)
        peak_is = "peak: of the GPU's data sheet, for dense products in BF16"
        if peak is None:
            peak = product_tflops(device, recipe.precision.compute)
            peak_is = "peak: the fastest of some products of 1,024 x 1,024 matrices on this machine"
        if parallel.pp > 1:
            micro = recipe.train.micro_batch_of(self._run.context.dp.size, parallel.pp)
            count = -(-recipe.train.global_batch // (micro * self._run.context.dp.size))
            ideal = bubble(parallel.pp, count, parallel.num_stages // parallel.pp)
        threads = torch.get_num_threads()
        on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
        cost = max((r["overhead"] for r in ranks if r["overhead"] is not None), default=None)
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self._command,
            "device": name,
            "layout": describe_ranks(recipe, self._run.engine.assembled),
            "first_step": self._first,
            "num_steps": len(self._timed),
            "versions": {"torch": str(torch.__version__)},
            "tokens": tokens,
            "flops": training_flops(recipe.model) * tokens,
            "peak_tflops": peak,
            "peak_is": peak_is,
            "ideal_bubble": ideal,
            "overhead": None if cost is None else cost[0],
            "overhead_noise": None if cost is None else cost[-1],
        }
