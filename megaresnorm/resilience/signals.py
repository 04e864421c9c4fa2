"""Signals and a time limit end a run after the step at hand; a second signal, or one before step 0, ends it at once.

Several ranks tell each other at the end of a backward pass: what comes later than that waits for the next step.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import NoReturn

from megaresnorm.errors import StoppedError
from megaresnorm.parallel.environment import Environment, read_environment
from megaresnorm.resilience.launcher import SIGNALS, Launcher

log = logging.getLogger(__name__)

REPEATS = 0.5  # seconds after the first signal in which another counts as the same one
RELAYED = 5.0  # the same where a supervisor passes signals on; it hears of a second one itself
# Seconds that a rank's main thread has to end by itself before the first step; it may be waiting for another rank.
PATIENCE = 2.0
TIME_IS_UP = 124  # exit code, as of timeout(1)
START_AGAIN = 75  # exit code: torchrun wants to start the ranks again, with other nodes


class StopSignals:
    """Hears signals within ``with StopSignals() as stop``, so that they end a run in order.

    After ``stop.begin()`` the first SIGINT, SIGTERM or SIGUSR1 only sets ``stop.exit_code``. The second ends the
    process at once, even where its main thread waits for other ranks. That tears no checkpoint, since each is renamed
    into place when it is complete. In a notebook or a shell of Python a second Ctrl-C raises KeyboardInterrupt instead.

    Before ``begin`` there is nothing to save: the first signal raises StoppedError in the main thread, or ends a rank
    that is waiting for others. Ranks that torchrun itself signals, because others have died or nodes have come, are to
    be started again.

    Outside of the main thread, where Python hears no signals, only the time limit counts, with a warning.

    Args:
        environment: None for that of this process.

    Attributes:
        received: the first signal; None before one.
    """

    def __init__(self, environment: Environment | None = None) -> None:
        self._environment = environment or read_environment()
        folder = self._environment.launcher
        self._launcher = None if folder is None else Launcher(folder)
        self.received: signal.Signals | None = None
        self._begun = False
        self._first, self._start_again = 0.0, False
        self._started, self._end = time.monotonic(), float("inf")

    @property
    def exit_code(self) -> int:
        """The exit code to end with after the step at hand, or 0 to go on.

        It is 128 + signal, as in shells: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1; 124 when time is up.
        It is 75 where torchrun is to start the ranks again.
        """
        if self.received is not None:
            return 128 + self.received
        if time.monotonic() >= self._end:
            return TIME_IS_UP
        return START_AGAIN if self._start_again else 0

    def begin(self, max_minutes: float | None = None) -> None:
        """Obey signals between steps from now on.

        Args:
            max_minutes: since this object was made; when they are over, that counts as a signal. None for no limit.
        """
        self._begun = True
        self._end = float("inf") if max_minutes is None else self._started + 60 * max_minutes
        if self._launcher is not None and self._environment.local_rank == 0:
            with suppress(OSError):  # a full /tmp: the supervisor would end a run that could be saved, nothing worse
                self._launcher.write("begun", os.getpid())
        if self._launcher is not None and self.received is None and (code := self._launcher.asked_to_stop()):
            self.received, self._first = signal.Signals(code - 128), time.monotonic()

    def __enter__(self) -> "StopSignals":
        if self._launcher is not None and self._environment.local_rank == 0:
            self._launcher.forget("begun")  # written by ranks that have died since
        if self._launcher is not None and (code := self._launcher.asked_to_stop()):
            raise StoppedError(f"{exit_reason(code)} before the first step; nothing was to be saved", code)
        self._hears = threading.current_thread() is threading.main_thread()
        self._read, self._write = socket.socketpair()
        if self._launcher is not None and self._hears:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the agent has done for all threads of this process
            self._start(self._wait_for_signals)
        elif self._hears:
            # Python runs its own handlers between two instructions of the main thread, which may be waiting in C for a
            # rank that is gone. A thread reads at once what the C handler writes here.
            self._write.setblocking(False)
            self._previous_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._interrupt) for number in SIGNALS}
            self._start(self._watch)
        else:
            log.warning("warning: a run outside of the main thread hears no signals: Ctrl-C does not save it")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._hears and self._launcher is None:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_wakeup)
        self._write.close()  # the thread reads the end of the file
        if self._hears and self._launcher is None:
            self._thread.join()
        self._read.close()

    def _start(self, target: object) -> None:
        self._thread = threading.Thread(target=target, name="signals", daemon=True)  # type: ignore[arg-type]
        self._thread.start()

    def _wait_for_signals(self) -> None:
        """Hear signals in a rank under a supervisor: they are blocked, so that the sender of one is known."""
        while True:
            info = signal.sigwaitinfo(SIGNALS)
            if info.si_pid == os.getppid():
                self._start_again = True  # torchrun ends its ranks, healthy ones too, to start them again
                if not self._begun:
                    os._exit(START_AGAIN)
            else:
                self._hear(signal.Signals(info.si_signo))

    def _watch(self) -> None:
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        repeats = REPEATS if self._launcher is None else RELAYED
        if self.received is None:
            self.received, self._first = number, time.monotonic()
            if not self._begun and (self._launcher is not None or self._environment.world_size > 1):
                threading.Timer(0.0 if self._launcher else PATIENCE, self._end_before_begin).start()
        elif time.monotonic() - self._first > repeats and not (number == signal.SIGINT and is_interactive()):
            self._end_at_once(128 + number, "a second signal: ended at once, without saving")

    def _end_before_begin(self) -> None:
        if not self._begun:
            assert self.received is not None
            self._end_at_once(
                128 + self.received, f"{self.received.name} before the first step: nothing was to be saved"
            )

    def _end_at_once(self, code: int, line: str) -> None:
        try:
            if self._environment.rank == 0:
                sys.stderr.write(f"megaresnorm: {line}\n")
                sys.stderr.flush()
            code = end_on_purpose(code, self._environment)
        finally:
            os._exit(code)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Python's own handler, in the main thread; the thread of ``_watch`` hears of the signal by itself."""
        if not self._begun:
            raise StoppedError(
                f"{signal.Signals(number).name} before the first step; nothing was to be saved", 128 + number
            )
        second = self.received is not None and time.monotonic() - self._first > REPEATS
        if second and number == signal.SIGINT and is_interactive():
            raise KeyboardInterrupt


def is_interactive() -> bool:
    """Whether this is a notebook's kernel or a shell of Python, which is not to end with a run."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing else hears it: what has begun is undone, as after Ctrl-C."""


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextmanager
def undone_on_sigterm() -> Iterator[None]:
    """Raise Terminated on SIGTERM, in commands that undo what they have begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def end_on_purpose(code: int, environment: Environment | None = None) -> int:
    """The exit code of a rank whose run a restart would not mend, or that is not to go on.

    Args:
        code: the exit code of the run.
        environment: None for that of this process.

    Returns:
        0 under a supervisor, which is told ``code``: torchrun would take any other for a failure, and
        start the ranks again. Otherwise ``code``.
    """
    folder = (environment or read_environment()).launcher
    if folder is None or code == START_AGAIN:
        return code
    try:
        Launcher(folder).write("end", code)
    except OSError:  # torchrun starts the ranks again, which is all that is lost
        return code
    return 0


def exit_reason(code: int) -> str:
    """What ended a run with this exit code.

    >>> exit_reason(143), exit_reason(124)
    ('SIGTERM', 'train.max_minutes')
    """
    names = {TIME_IS_UP: "train.max_minutes", START_AGAIN: "other nodes"}
    return names.get(code) or signal.Signals(code - 128).name
