"""A run's parts as they tell the watchdog what they are at, and how long each may last: wrapped from outside."""

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from megaresnorm.resilience.beats import (
    ALLOWED,
    MICROBATCH,
    PHASE,
    PLACE,
    READ,
    SECOND,
    SINCE,
    STEP,
    Phase,
    Place,
)
from megaresnorm.telemetry.wrapped import Wrapped

if TYPE_CHECKING:
    from megaresnorm.recipe import WatchdogRecipe
    from megaresnorm.resilience.watchdog import Watchdog

BACKUP = 5.0  # seconds behind a deadline at which the time-outs of process groups end a rank that nobody has ended
UNKNOWN = 600.0  # watchdog.step until enough steps are known
ENOUGH, MOST, TIMES, LEAST = 20, 100, 10.0, 60.0
CHANGE = 3.0  # seconds by which a deadline changes before the time-outs of process groups follow it


class StepDeadline:
    """How long a step may last.

    Args:
        seconds: watchdog.step; None: ``UNKNOWN`` until ``ENOUGH`` steps are known, then ``TIMES`` times the 99th
            percentile of the last ``MOST``, at least ``LEAST``.

    Attributes:
        seconds: of the next step.

    >>> deadline = StepDeadline(None)
    >>> for _ in range(20):
    ...     deadline.note(7.0)
    >>> deadline.seconds
    70.0
    """

    def __init__(self, seconds: float | None) -> None:
        self._learns, self.seconds = seconds is None, float(UNKNOWN if seconds is None else seconds)
        self._known: deque[float] = deque(maxlen=MOST)

    def note(self, seconds: float) -> None:
        """Note how long a step took."""
        if not self._learns:
            return
        self._known.append(seconds)
        if len(self._known) >= ENOUGH:
            slow = sorted(self._known)[ceil(0.99 * len(self._known)) - 1]
            self.seconds = max(LEAST, TIMES * slow)


class Following:
    """What a run is at, told to the watchdog of its rank.

    Attributes:
        deadline: of the next step.
    """

    def __init__(self, watchdog: "Watchdog") -> None:
        self._watchdog, self._beats = watchdog, watchdog.beats
        self._settings: Any = None
        self.deadline = StepDeadline(None)
        self._began, self._waits = time.monotonic(), 0.0  # seconds that this rank waits for others, without BACKUP
        self._waits_longer = False  # than in a step, for what it has been at since the last one
        self._started = self._active = False  # a step is done; within Trainer.train

    def obey(self, settings: "WatchdogRecipe") -> None:
        """Take the recipe's settings."""
        self._settings, self.deadline = settings, StepDeadline(settings.step)
        self._waits = float(settings.start)

    def follow(self, trainer: Any, *, whole: bool) -> Callable[[], object]:
        """Wrap the methods of a trainer and its run.

        Args:
            whole: also the run's; False for another trainer of the same run.

        Returns:
            What puts them back.
        """
        from megaresnorm.resilience.telling import tell_axes, tell_passes  # torch is there by now

        run, wrapped = trainer.run, Wrapped()
        undo = partial(wrapped.__exit__, None, None, None)
        wrapped.method(trainer, "step", partial(self._step_of, run))
        wrapped.method(trainer, "train", partial(self._training, run))
        if not whole:
            return undo
        context = run.context
        self._beats.shape([axis.size for axis in (context.pp, context.dp_replicate, context.dp_shard, context.tp)])
        tell_axes(context, self._beats, wrapped, compiled=run.engine.assembled.compiled != "none")
        tell_passes(run.engine, self._beats, wrapped)
        wrapped.method(run, "next_batch", self._reading)
        wrapped.method(run.engine, "step", self._computing)
        wrapped.method(run, "step_is_done", partial(self._done, run))
        wrapped.method(run, "open_metrics", partial(self._recording, run, wrapped))
        wrapped.method(run, "evaluate", self._with_all(run, Phase.EVALUATION, lambda: self._settings.evaluation))
        wrapped.method(
            run, "roll_back", self._with_all(run, Phase.BACK, lambda: self._settings.start, self._a_checkpoint)
        )
        for name in ("save", "save_last"):
            wrapped.method(run, name, self._with_all(run, Phase.SAVE, self._a_checkpoint))
        # The thread that writes has a time of its own; who waits for it has none meanwhile.
        wrapped.method(run.saver, "join", partial(self._during, Phase.SAVE, self._a_checkpoint))
        wrapped.method(run.saver, "_write", self._writing)
        return undo

    def _begin_step(self) -> None:
        """Give a step, or what is done between two, its time; the first ones belong to the start."""
        if self._started:
            self._watchdog.begin(Phase.STEP, self.deadline.seconds)

    def _step_of(self, run: Any, step: Callable) -> Callable:
        own = self._beats.own

        def told() -> Any:
            own[STEP], own[MICROBATCH] = run.steps_done + 1, -1
            self._beats.at(Place.BEGIN)
            self._begin_step()
            self._began = time.monotonic()
            try:
                return step()
            finally:
                if not self._active:  # whoever calls it may take a break before the next
                    self._watchdog.rest()

        return told

    def _training(self, run: Any, train: Callable) -> Callable:
        def told(*arguments: Any, **options: Any) -> Any:
            self._watchdog.meet(run)
            if not self._watchdog.whole:
                self._started = False
                self._watchdog.begin(Phase.START, self._settings.start)
            self._active = True
            try:
                return train(*arguments, **options)
            finally:
                self._active = False
                if self._watchdog.whole:
                    self._watchdog.begin(Phase.CLOSING, self._settings.checkpoint)
                else:
                    self._watchdog.rest()
                    self._watchdog.stop_looking()

        return told

    def _reading(self, next_batch: Callable) -> Callable:
        def told() -> Any:
            self._begin_step()
            self._beats.at(Place.DATA)
            start = time.monotonic_ns()
            batch = next_batch()
            self._beats.own[READ] += time.monotonic_ns() - start
            if batch.following is None:
                return batch
            samples, count = batch.following
            return batch._replace(following=(samples, partial(self._counted, count)))

        return told

    def _counted(self, count: Callable[[], float]) -> float:
        """The tokens of the next step, for which the thread that reads them is waited for."""
        place = self._beats.own[PLACE]
        self._beats.at(Place.DATA)
        start = time.monotonic_ns()
        tokens = count()
        self._beats.own[READ] += time.monotonic_ns() - start
        self._beats.at(place)
        return tokens

    def _computing(self, step: Callable) -> Callable:
        def told(*arguments: Any, **options: Any) -> Any:
            self._begin_step()
            self._beats.own[MICROBATCH] = -1
            self._beats.at(Place.FORWARD)
            return step(*arguments, **options)

        return told

    def _done(self, run: Any, step_is_done: Callable) -> Callable:
        def told() -> None:
            step_is_done()
            if self._started:  # the first one of a process compiles
                self.deadline.note(time.monotonic() - self._began)
            self._started = True
            if self._waits_longer or abs(self.deadline.seconds - self._waits) > CHANGE:
                self._wait(run, self.deadline.seconds)
            self._beats.at(Place.AFTER)
            self._begin_step()

        return told

    def _recording(self, run: Any, wrapped: Wrapped, open_metrics: Callable) -> Callable:
        """Closing metrics, and going back with them, is the first rank's alone; services may take their time."""

        def around(method: Callable) -> Callable:
            during = self._during(Phase.METRICS, self._a_checkpoint, method)

            def told(*arguments: Any, **options: Any) -> Any:
                self._beats.own[STEP] = run.steps_done  # ranks that have gone on from there wait for this one
                return during(*arguments, **options)

            return told

        def opened() -> Any:
            metrics = open_metrics()
            for name in () if metrics is None else ("close", "go_back"):
                wrapped.method(metrics, name, around)
            return metrics

        return opened

    def _a_checkpoint(self) -> float:
        return self._settings.checkpoint

    def _wait(self, run: Any, seconds: float, *, longer: bool = False) -> None:
        """Set how long this rank waits for others: all groups but ``control``, which has a checkpoint's time."""
        self._waits, self._waits_longer = seconds, longer
        run.context.set_timeouts(seconds + BACKUP, self._settings.checkpoint + BACKUP)

    def _with_all(
        self, run: Any, phase: Phase, allowed: Callable[[], float], also: Callable[[], float] = lambda: 0.0
    ) -> Callable[[Callable], Callable]:
        """What all ranks do together, each in its own time: the fastest waits so long for the slowest in what follows.

        It does so up to the end of the next step, when all have come out of this.

        Args:
            also: seconds for what the first rank does behind it.
        """

        def around(method: Callable) -> Callable:
            during = self._during(phase, allowed, method)

            def told(*arguments: Any, **options: Any) -> Any:
                seconds = max(allowed(), also())
                if seconds > self._waits:
                    self._wait(run, seconds, longer=True)
                return during(*arguments, **options)

            return told

        return around

    def _during(self, phase: Phase, allowed: Callable[[], float], method: Callable) -> Callable:
        """A phase of its own within another, which has all of its time again afterwards."""

        def told(*arguments: Any, **options: Any) -> Any:
            own = self._beats.own
            before, seconds, since = Phase(own[PHASE]), own[ALLOWED] / SECOND, own[SINCE]
            self._watchdog.begin(phase, allowed())
            try:
                return method(*arguments, **options)
            finally:
                self._watchdog.begin(before, seconds, since if before == Phase.START else None)

        return told

    def _writing(self, write: Callable) -> Callable:
        def told(step: int, *arguments: Any, **options: Any) -> None:
            self._beats.begin_writing(step, self._settings.checkpoint)
            try:
                write(step, *arguments, **options)
            finally:
                self._beats.end_writing()

        return told
