"""The rank's side of the watchdog: it tells what it is at, how long that may last, and has somebody look.

Under a supervisor the agent of the node looks (agent.py), which is another process. Elsewhere a thread of the first
rank of a node does; where that rank is itself what hangs in a C call that keeps the interpreter's lock, a timer in C
ends it a few seconds later.
"""

import faulthandler
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaresnorm.parallel.environment import Environment, host_name
from megaresnorm.resilience.beats import (
    ALLOWED,
    MICROBATCH,
    PHASE,
    PLACE,
    RANK,
    READ,
    SECOND,
    SINCE,
    STEP,
    Beat,
    Beats,
    Phase,
    Place,
)
from megaresnorm.resilience.hang_report import Hang
from megaresnorm.resilience.launcher import Launcher
from megaresnorm.resilience.signals import is_interactive
from megaresnorm.resilience.watcher import Watcher, end
from megaresnorm.telemetry.wrapped import Wrapped
from megaresnorm.text import say

if TYPE_CHECKING:
    from megaresnorm.recipe import WatchdogRecipe

log = logging.getLogger(__name__)

BACKUP = 5.0  # seconds behind a deadline at which the time-outs of process groups end a rank that nobody has ended
LAST_RESORT = 4.0  # seconds behind it at which a rank without a supervisor ends itself
START = 1800.0  # seconds for the start until the recipe has been read; watchdog.start's default
UNKNOWN = 600.0  # watchdog.step until enough steps are known
ENOUGH, MOST, TIMES, LEAST = 20, 100, 10.0, 60.0


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


class Watchdog:
    """Tells what one rank is at.

    Args:
        environment: of this rank.
        settings: the recipe's; None: ``obey`` is told later.
        whole: whether this is a process of a run from its start to its end, which is watched all that time. Otherwise
            a program's own process is watched within ``Trainer.train`` alone.

    Attributes:
        beats: this rank's slot.
    """

    def __init__(
        self, environment: Environment, settings: "WatchdogRecipe | None" = None, *, whole: bool = False
    ) -> None:
        self._environment, self._whole = environment, whole
        self._launcher = None if environment.launcher is None else Launcher(environment.launcher)
        shared = None if self._launcher is None else _beats_of(self._launcher, environment.local_rank)
        self._alone = shared is None  # nobody else looks
        self._memory = -1
        if shared is None:
            shared, self._memory = Beats.make()
        self.beats, self._stacks, self._step = shared, _take_signal(), StepDeadline(None)
        self._settings: Any = None
        self._watcher: Watcher | None = None
        self._armed, self._began, self._waits = float("inf"), time.monotonic(), UNKNOWN
        self._started = self._active = False  # a step is done; within Trainer.train
        self._undo: list[Callable[[], object]] = []
        self._others_here: list[Beats] = []
        self._output: Path | None = None
        self._person = _is_a_person_there()
        self.beats.introduce(environment.rank, self._stacks)
        if whole:
            self._begin(Phase.START, START)
            self._look()
        if settings is not None:
            self.obey(settings)

    def obey(self, settings: "WatchdogRecipe") -> None:
        """Take the recipe's settings."""
        self._settings = settings
        self._step = StepDeadline(settings.step)
        self._waits = self._step.seconds
        if self._whole and not self._started:
            self._begin(Phase.START, settings.start, since=self.beats.own[SINCE])

    def rest(self) -> None:
        """Be at nothing that has a time."""
        self._begin(Phase.REST, 0.0)

    def release(self) -> None:
        """Watch this process no more, unless it is one of a run to its end."""
        if not self._whole:
            self.close()

    def close(self) -> None:
        """Watch this process no more."""
        self.rest()
        self._stop_looking()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self._stacks >= 0:
            faulthandler.unregister(signal.SIGUSR2)
            os.close(self._stacks)
            self._stacks = -1
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    @property
    def step_seconds(self) -> float:
        """How long the next step may last."""
        return self._step.seconds

    def _stop_looking(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def _begin(self, phase: Phase, allowed: float, since: int | None = None) -> None:
        self.beats.begin(phase, allowed, since)
        if self._alone:
            gone = 0.0 if since is None else (time.monotonic_ns() - since) / SECOND
            self._arm(max(0.1, allowed - gone) if allowed else 0.0)

    def _arm(self, allowed: float) -> None:
        """Have a timer in C end this process a little after its time, whatever holds the interpreter's lock."""
        now = time.monotonic()
        at = now + allowed + LAST_RESORT if allowed else float("inf")
        if (allowed and abs(at - self._armed) < 1.0) or at == self._armed:
            return
        self._armed = at
        if not allowed:
            faulthandler.cancel_dump_traceback_later()
        elif not self._person:
            with suppress(ValueError, AttributeError, OSError):  # a stderr without a descriptor
                faulthandler.dump_traceback_later(at - now, exit=True, file=sys.__stderr__ or sys.stderr)

    def _look(self) -> None:
        """Have a thread look at the slots of this node, where nobody else does."""
        if self._alone and self._watcher is None:
            self._watcher = Watcher(self._slots, self._act)
            self._watcher.start()

    def _slots(self) -> Iterator[Beat]:
        yield self.beats.read(0)
        for other in self._others_here:
            yield other.read(0)

    def _act(self, hang: Hang) -> bool:
        if self._person and hang.num_ranks == 1:
            log.warning("warning: %s", hang.failure("none where somebody sits at the keyboard"))
            return False
        failure = hang.failure("there is no folder for them yet" if self._output is None else hang.write(self._output))
        say(f"megaresnorm: error: {failure}", error=True)
        end(hang)
        os._exit(failure.exit_code)

    def watch(self, trainer: Any) -> None:
        """Follow a trainer and its run from now on: their methods are wrapped until ``close``.

        Args:
            trainer: with ``run``, ``step`` and ``train``, see trainer.py.
        """
        from megaresnorm.resilience.telling import tell_axes, tell_passes  # torch is there by now

        run, wrapped = trainer.run, Wrapped()
        self._undo.append(lambda: wrapped.__exit__(None, None, None))
        wrapped.method(trainer, "step", partial(self._step_of, run))
        wrapped.method(trainer, "train", partial(self._training, run))
        if self._output is not None:  # another trainer of the same run
            return
        self._output, context = run.output, run.context
        self.beats.shape([axis.size for axis in (context.pp, context.dp_replicate, context.dp_shard, context.tp)])
        tell_axes(context, self.beats, wrapped, compiled=run.engine.assembled.compiled != "none")
        tell_passes(run.engine, self.beats, wrapped)
        wrapped.method(run, "next_batch", self._reading)
        wrapped.method(run.engine, "step", self._computing)
        wrapped.method(run, "step_is_done", partial(self._done, run))
        wrapped.method(run, "evaluate", partial(self._evaluating, run))
        wrapped.method(run, "roll_back", partial(self._during, Phase.START, lambda: self._settings.start))
        for name in ("save", "save_last"):
            wrapped.method(run, name, partial(self._during, Phase.SAVE, lambda: self._settings.checkpoint))
        wrapped.method(run.saver, "_write", self._writing)

    def _begin_step(self) -> None:
        """Give a step, or what is done between two, its time; the first ones belong to the start."""
        if self._started:
            self._begin(Phase.STEP, self._step.seconds)

    def _step_of(self, run: Any, step: Callable) -> Callable:
        own = self.beats.own

        def told() -> Any:
            own[STEP], own[MICROBATCH] = run.steps_done + 1, -1
            self.beats.at(Place.BEGIN)
            self._begin_step()
            self._began = time.monotonic()
            try:
                return step()
            finally:
                if not self._active:  # whoever calls it may take a break before the next
                    self.rest()

        return told

    def _training(self, run: Any, train: Callable) -> Callable:
        def told(*arguments: Any, **options: Any) -> Any:
            self._meet(run)
            if not self._whole:
                self._started = False
                self._begin(Phase.START, self._settings.start)
            self._active = True
            try:
                return train(*arguments, **options)
            finally:
                self._active = False
                if self._whole:
                    self._begin(Phase.CLOSING, self._settings.checkpoint)
                else:
                    self.rest()
                    self._stop_looking()

        return told

    def _reading(self, next_batch: Callable) -> Callable:
        def told() -> Any:
            self._begin_step()
            self.beats.at(Place.DATA)
            start = time.monotonic_ns()
            batch = next_batch()
            self.beats.own[READ] += time.monotonic_ns() - start
            if batch.following is None:
                return batch
            samples, count = batch.following
            return batch._replace(following=(samples, partial(self._counted, count)))

        return told

    def _counted(self, count: Callable[[], float]) -> float:
        """The tokens of the next step, for which the thread that reads them is waited for."""
        place = self.beats.own[PLACE]
        self.beats.at(Place.DATA)
        start = time.monotonic_ns()
        tokens = count()
        self.beats.own[READ] += time.monotonic_ns() - start
        self.beats.at(place)
        return tokens

    def _computing(self, step: Callable) -> Callable:
        def told(*arguments: Any, **options: Any) -> Any:
            self._begin_step()
            self.beats.own[MICROBATCH] = -1
            self.beats.at(Place.FORWARD)
            return step(*arguments, **options)

        return told

    def _done(self, run: Any, step_is_done: Callable) -> Callable:
        def told() -> None:
            step_is_done()
            self._started = True
            self._step.note(time.monotonic() - self._began)
            if self._step.seconds > self._waits:
                self._waits = self._step.seconds
                run.context.set_timeouts(self._waits + BACKUP, self._settings.checkpoint + BACKUP)
            self.beats.at(Place.AFTER)
            self._begin_step()

        return told

    def _evaluating(self, run: Any, evaluate: Callable) -> Callable:
        def told() -> Any:
            writing = self._settings.checkpoint + BACKUP
            run.context.set_timeouts(self._settings.evaluation + BACKUP, writing)
            try:
                return evaluate()
            finally:
                waits = self._waits if self._started else self._settings.start
                run.context.set_timeouts(waits + BACKUP, writing)

        return self._during(Phase.EVALUATION, lambda: self._settings.evaluation, told)

    def _during(self, phase: Phase, allowed: Callable[[], float], method: Callable) -> Callable:
        """A phase of its own within another, which has all of its time again afterwards."""

        def told(*arguments: Any, **options: Any) -> Any:
            own = self.beats.own
            before, seconds, since = Phase(own[PHASE]), own[ALLOWED] / SECOND, own[SINCE]
            self._begin(phase, allowed())
            try:
                return method(*arguments, **options)
            finally:
                self._begin(before, seconds, since if before == Phase.START else None)

        return told

    def _writing(self, write: Callable) -> Callable:
        def told(step: int, *arguments: Any, **options: Any) -> None:
            self.beats.begin_writing(step, self._settings.checkpoint)
            try:
                write(step, *arguments, **options)
            finally:
                self.beats.end_writing()

        return told

    def _meet(self, run: Any) -> None:
        """Learn which ranks are on which host, and where those of this one tell what they are at. Collective.

        Communication:
            One ``all_gather_json``.
        """
        from megaresnorm.parallel.control import all_gather_json

        context, own = run.context, self.beats.own
        own[RANK] = context.world.rank + 1
        mine = {"host": host_name(), "machine": _machine(), "pid": os.getpid(), "beats": self._memory}
        everyone = all_gather_json(mine, context.control)
        if self._launcher is not None and self._environment.local_rank == 0:
            about = {"output": str(run.output.absolute()), "hosts": [one["host"] for one in everyone]}
            with suppress(OSError):  # a full /tmp: a hang is reported without a file
                self._launcher.write_json("run", about)
        if not self._alone:
            return
        here = [rank for rank, one in enumerate(everyone) if one["machine"] == mine["machine"]]
        if here[0] == context.world.rank:
            others = (everyone[rank] for rank in here[1:])
            opened = (Beats.of_agent(one["pid"], one["beats"], 0) for one in others if one["beats"] >= 0)
            self._others_here = [beats for beats in opened if beats is not None]
            self._look()
        else:
            self._stop_looking()


def _beats_of(launcher: Launcher, local_rank: int) -> Beats | None:
    agent, descriptor = launcher.read("agent"), launcher.read("beats")
    return None if agent is None or descriptor is None else Beats.of_agent(agent, descriptor, local_rank)


def _take_signal() -> int:
    """Have SIGUSR2 write the stacks of all threads, also while a C call keeps the interpreter's lock.

    Returns:
        The descriptor that they are written to; -1 where the signal has another use.
    """
    if signal.getsignal(signal.SIGUSR2) != signal.SIG_DFL:
        return -1
    descriptor = os.memfd_create("megaresnorm-stacks", os.MFD_CLOEXEC)
    faulthandler.register(signal.SIGUSR2, file=descriptor, all_threads=True)
    return descriptor


def _machine() -> str:
    """What processes have in common that see each other in /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{host_name()} {os.getpid()}"


def _is_a_person_there() -> bool:
    """Whether this process is a notebook, a shell of Python, or under a debugger."""
    return is_interactive() or sys.gettrace() is not None
