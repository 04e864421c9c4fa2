"""The rank's side of the watchdog: it tells what it is at, how long that may last, and has somebody look.

Under a supervisor the agent of the node looks (agent.py), which is another process. Elsewhere a thread of the first
rank of a node does; where that rank is itself stopped, or hangs in a C call that keeps the interpreter's lock, the
time-outs of process groups end the others. No timer of the system does: it would go off when a process that was stopped
goes on.
"""

import faulthandler
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaresnorm.parallel.environment import Environment, host_name
from megaresnorm.resilience.beats import (
    RANK,
    SINCE,
    Beat,
    Beats,
    Phase,
)
from megaresnorm.resilience.following import Following
from megaresnorm.resilience.hang_report import Hang
from megaresnorm.resilience.launcher import Launcher
from megaresnorm.resilience.signals import is_interactive
from megaresnorm.resilience.watcher import Watcher, end
from megaresnorm.text import say

if TYPE_CHECKING:
    from megaresnorm.recipe import WatchdogRecipe

log = logging.getLogger(__name__)

START = 1800.0  # seconds for the start until the recipe has been read; watchdog.start's default


class Watchdog:
    """Tells what one rank is at.

    Args:
        environment: of this rank.
        settings: the recipe's; None: ``obey`` is told later.
        whole: whether this is a process of a run from its start to its end, which is watched all that time. Otherwise
            a program's own process is watched within ``Trainer.train`` alone.

    Attributes:
        beats: this rank's slot.
        whole: as given.
        following: the run's parts as they tell what they are at.
    """

    def __init__(
        self, environment: Environment, settings: "WatchdogRecipe | None" = None, *, whole: bool = False
    ) -> None:
        self._environment, self.whole = environment, whole
        self._launcher = None if environment.launcher is None else Launcher(environment.launcher)
        shared = None if self._launcher is None else _beats_of(self._launcher, environment.local_rank)
        self._alone = shared is None  # nobody else looks
        self._memory = -1
        if shared is None:
            shared, self._memory = Beats.make()
        self.beats, self._stacks = shared, _take_signal()
        self._watcher: Watcher | None = None
        self._undo: list[Callable[[], object]] = []
        self._others_here: list[Beats] = []
        self._output: Path | None = None
        self._person = _is_a_person_there()
        self.following = Following(self)
        self.beats.introduce(environment.rank, self._stacks)
        if whole:
            self.begin(Phase.START, START)
            self._look()
        if settings is not None:
            self.obey(settings)

    def obey(self, settings: "WatchdogRecipe") -> None:
        """Take the recipe's settings."""
        self.following.obey(settings)
        if self.whole:
            self.begin(Phase.START, settings.start, since=self.beats.own[SINCE])

    def rest(self) -> None:
        """Be at nothing that has a time."""
        self.begin(Phase.REST, 0.0)

    def release(self) -> None:
        """Watch this process no more, unless it is one of a run to its end."""
        if not self.whole:
            self.close()

    def close(self) -> None:
        """Watch this process no more."""
        self.rest()
        self.stop_looking()
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
        return self.following.deadline.seconds

    def stop_looking(self) -> None:
        """Let nobody look from this process any more."""
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher = None

    def begin(self, phase: Phase, allowed: float, since: int | None = None) -> None:
        """Begin a phase, see ``Beats.begin``."""
        self.beats.begin(phase, allowed, since)

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
        self._undo.append(self.following.follow(trainer, whole=self._output is None))
        self._output = trainer.run.output

    def meet(self, run: Any) -> None:
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
            hosts, attempt = [one["host"] for one in everyone], self._environment.attempt
            about = {"output": str(run.output.absolute()), "hosts": hosts, "attempt": attempt}
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
            self.stop_looking()


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
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)  # whoever reads it empties it before
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
