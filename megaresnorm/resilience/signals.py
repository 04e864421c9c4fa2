"""Signals and a time limit end a run after the step at hand; a second signal ends it at once."""

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
LAUNCHER = "MEGARESNORM_EXIT_CODE"  # names a file of launch/torchrun.sh
REPEATS = 0.5  # seconds
TIME_IS_UP = 124  # exit code, as of timeout(1)


class StopSignals:
    """Within ``with StopSignals() as stop``, the first SIGINT, SIGTERM or SIGUSR1 only sets ``stop.exit_code``.

    The second ends the process at once, even where its main thread waits for other ranks. Checkpoints are renamed into place when
    complete, so it tears nothing. One within REPEATS is the first again: what ends a whole job signals launcher and ranks, and the
    launcher passes it on.

    max_minutes: counts as a signal when it has passed.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1; 124 when time is up; or 0."""
        if self.received is not None:
            return 128 + self.received
        return TIME_IS_UP if self._end is not None and time.monotonic() >= self._end else 0

    def __enter__(self) -> "StopSignals":
        # Python runs its own handlers between two instructions of the main thread, which may be waiting in C for a rank that is
        # gone. What the C handler writes here is read by a thread at once.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        if purpose() > 128:
            self.received = signal.Signals(purpose() - 128)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        self._write.close()  # the thread reads the end of the file
        self._thread.join()
        self._read.close()

    def _watch(self) -> None:
        while numbers := self._read.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > REPEATS:
            try:
                sys.stderr.write("megaresnorm: a second signal: ended at once, without saving\n")
                sys.stderr.flush()
                end_on_purpose(128 + number)
            finally:
                os._exit(128 + number)


def hear_signals() -> None:
    """Under launch/torchrun.sh: take the signals again that it has made torchrun, and so its ranks, ignore."""
    if LAUNCHER in os.environ:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def end_on_purpose(code: int) -> int:
    """The exit code of a run that another start would not mend, or that is not to go on: 0 under launch/torchrun.sh, which is told
    ``code``. torchrun itself would take any other for a failure, and start the ranks again.
    """
    path = os.environ.get(LAUNCHER)
    if path is None:
        return code
    with open(path, "w") as file:
        file.write(str(code))
    return 0


def purpose() -> int:
    """The code with which this node's ranks are to end: a rank's, or of a signal that came while they were starting; 0 for none."""
    path = os.environ.get(LAUNCHER)
    if path is None or not os.path.exists(path):
        return 0
    with open(path) as file:
        text = file.read().strip()
    return int(text) if text.isdecimal() else 0


def exit_reason(code: int) -> str:
    """
    >>> exit_reason(143), exit_reason(124)
    ('SIGTERM', 'train.max_minutes')
    """
    return "train.max_minutes" if code == TIME_IS_UP else signal.Signals(code - 128).name


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread hears of the signal by itself."""
