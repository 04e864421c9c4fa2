"""A window of a run's steps that is measured: which steps how, and what is written when it ends."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
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
from megaresnorm.profiling.timeline import Marks, Measured, Ranges, Reduced, Timeline, clock_of
from megaresnorm.profiling.trace import Rank, events_of, write_part
from megaresnorm.recipe.training import ProfileRecipe
from megaresnorm.schedule import batch_size, learning_rate
from megaresnorm.telemetry.depth.figures import DepthFigures
from megaresnorm.telemetry.depth.watch import DepthWatch
from megaresnorm.telemetry.describe import describe_ranks
from megaresnorm.telemetry.log import log_lines
from megaresnorm.telemetry.throughput import peak_of
from megaresnorm.telemetry.wrapped import Wrapped

if TYPE_CHECKING:
    from megaresnorm.run import Run

log = logging.getLogger(__name__)

PAIRS = 10  # steps without marks, in turn with those that are timed
SPLIT = 3  # steps whose products of backward are told apart
TRACED, TRACED_RANKS = 3, 64  # timed steps, and ranks, in the trace


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
        self._timed: list[Reduced] = []
        self._split: list[Reduced] = []
        self._traced: deque[Measured] = deque(maxlen=TRACED)
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
            self._aligned = self._common_moment()
        with self._wrapped(kind):
            yield
        if step == self.last_step:
            self.finish()

    @contextmanager
    def _wrapped(self, kind: str) -> Iterator[None]:
        if kind == "memory":
            with self._followed():
                yield
            return
        if kind == "watched":
            with self._watched():
                yield
            return
        run, number = self._run, self._run.steps_done + 1
        samples = batch_size(run.steps_done, run.recipe.train)
        with Wrapped() as wrapped:
            if kind != "plain":
                self._marking(self._timeline, splits=kind == "split").wrap(wrapped, run)
            cpu = self._now()
            self._timeline.begin(number)
            yield
            measured = self._timeline.end()
            if kind in self._cpu:
                self._cpu[kind].append(self._now() - cpu)
        if kind == "plain":
            return
        (self._split if kind == "split" else self._timed).append(measured.reduced(len(self._rows.names), samples))
        if kind == "timed":
            self._traced.append(measured)

    @contextmanager
    def _followed(self) -> Iterator[None]:
        if torch.autograd.profiler._is_profiler_enabled:
            log.warning("warning: a profile within torch.profiler has no bytes of rows: there is one such profiler")
            yield
            return
        step = MemoryStep(self._rows, self._run.device)
        with Wrapped() as wrapped, step.followed():
            self._marking(step.marks).wrap(wrapped, self._run)
            yield
        self._memory = step.found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        run = self._run
        watch = DepthWatch(run.recipe.model, run.engine.assembled, TensorNorms(run.engine, run.recipe.optim))
        with watch.watching(learning_rate(run.steps_done, run.recipe)):
            yield
        self._depth = watch.figures

    def _common_moment(self) -> int:
        """A moment that all ranks have in common, by this rank's clock, nanoseconds. Collective.

        All leave a collective at nearly the same moment: within about half a millisecond with gloo. Ranks of one host
        have one clock, and take the moment of the first of them.
        """
        control = self._run.context.control
        all_gather_json(None, control)
        left = time.perf_counter_ns()
        everyone = all_gather_json([host_name(), left], control)
        return next(moment for host, moment in everyone if host == host_name())

    def _now(self) -> float:
        """Seconds that tell what marks cost: of the processor, which other programs do not disturb, where one rank is
        alone on a CPU. Several spin while they wait for each other, which is no cost.
        """
        alone = self._run.device.type == "cpu" and self._run.context.world.size == 1
        return time.process_time() if alone else time.perf_counter()

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

        Where the run goes on, one that cannot be written costs a warning.

        Raises:
            TrainingError: it cannot be written.
        """
        self._kinds = {}
        if not self._timed:
            return
        try:
            self._write_all()
        except TrainingError as e:
            if not self._tells:
                raise
            log.warning("warning: %s; training goes on", e)
        self._timed = []
        self._traced.clear()

    def _write_all(self) -> None:
        run, context = self._run, self._run.context
        control, me = context.control, {axis: getattr(context, axis).rank for axis in ("pp", "dp", "tp")}
        mine = measures_of_rank(
            run.engine, run.recipe.model, self._rows, self._timed, self._split, self._memory,
            tokens=round(self._samples * run.recipe.model.seq_len / context.dp.size),
        )  # fmt: skip
        mine |= {"rank": control.rank, "host": host_name(), **me, "overhead": self._overhead()}
        traced = min(control.size, TRACED_RANKS) if self._writes_trace else 0
        all_or_raise(lambda: self._try(lambda: self._folder.mkdir(parents=True, exist_ok=True)), control)
        if traced:
            who = Rank(control.rank, host_name(), **me, num_stages=run.recipe.parallel.num_stages)
            events = events_of(who, self._rows, [*self._traced], self._aligned)
            all_or_raise(
                lambda: self._try(lambda: write_part(self._folder, who, events)) if who.rank < traced else None, control
            )
        ranks = all_gather_json(mine, control)
        all_or_raise(lambda: self._write(ranks, traced) if control.rank == 0 else None, control)

    @property
    def _samples(self) -> float:
        """Of a timed step, on average: batches may grow."""
        return sum(step.samples for step in self._timed) / len(self._timed)

    def _overhead(self) -> list[float | None] | None:
        """What marks add to a step, as a share of it: over pairs of steps in turn, as ``statistics`` of them."""
        pairs = list(zip(self._cpu["timed"], self._cpu["plain"], strict=False))
        return statistics([with_marks / without - 1.0 for with_marks, without in pairs]) if pairs else None

    def _write(self, ranks: list[dict[str, Any]], traced: int) -> None:
        self.profile = merged(ranks, self._head(ranks), self._depth)
        self._try(lambda: self._write_files(traced))
        if self._tells:
            log_lines([*summary_lines(self.profile), f"written   {self._folder}/{FILE}"])

    def _write_files(self, traced: int) -> None:
        assert self.profile is not None
        write_profile(self._folder, self.profile, traced=traced)
        if "tensorboard" in self._run.recipe.train.loggers:
            to_tensorboard(self._run.output / "tensorboard" / "profile", self.profile)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as e:
            raise TrainingError(f"{self._folder}: the profile cannot be written ({e.strerror})") from None

    def _head(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        recipe, device = self._run.recipe, self._run.device
        tokens = self._samples * recipe.model.seq_len
        peak, peak_is = peak_of(device, recipe.precision.compute)
        threads = torch.get_num_threads()
        on_cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
        cost = max((r["overhead"] for r in ranks if r["overhead"] is not None), key=lambda one: one[0], default=None)
        return {
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self._command,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
            "layout": describe_ranks(recipe, self._run.engine.assembled),
            "first_step": self._first,
            "num_steps": len(self._timed),
            "versions": {"torch": str(torch.__version__)},
            "tokens": tokens,
            "flops": training_flops(recipe.model) * tokens,
            "peak_tflops": peak,
            "peak_is": peak_is,
            "ideal_bubble": self._ideal_bubble(),
            "overhead": None if cost is None else cost[0],
            "overhead_noise": None if cost is None else cost[-1],
        }

    def _ideal_bubble(self) -> float | None:
        """The share of a step that ranks would wait if all stages took the same; None without stages."""
        run, parallel, stack = self._run, self._run.recipe.parallel, self._run.engine.stack
        if stack is None:
            return None
        each = run.recipe.train.micro_batch_of(run.context.dp.size, parallel.pp) * run.context.dp.size
        return bubble(parallel.pp, stack(-(-round(self._samples) // each)), parallel.num_stages // parallel.pp)
