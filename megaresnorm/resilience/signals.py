"""Signals and a time limit end a run after the step at hand; a second signal ends it at once.

Under launch/torchrun.sh ranks and launcher leave each other word in a folder of this node (LAUNCHER):
  stop   the exit code of a signal that the launcher has been sent; ranks that are only starting find it here
  end    the exit code of ranks that have ended on purpose, and would end so again
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

LAUNCHER, ELASTIC = "MEGARESNORM_LAUNCHER", "MEGARESNORM_ELASTIC"  # set by launch/torchrun.sh
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REPEATS = 0.5  # seconds
TIME_IS_UP = 124  # exit code, as of timeout(1)
START_AGAIN = 75  # exit code: torchrun wants to start the ranks again, with other nodes


class StopSignals:
    """Within ``with StopSignals() as stop``, the first SIGINT, SIGTERM or SIGUSR1 only sets ``stop.exit_code``.

    The second ends the process at once, even where its main thread waits for other ranks. Checkpoints are renamed into place when
    complete, so it tears nothing. One within REPEATS is the first again: what ends a whole job signals launcher and ranks, and the
    launcher passes it on. In an elastic job a SIGTERM of which the launcher does not know is torchrun's: nodes come or go.

    max_minutes: counts as a signal when it has passed.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.received: signal.Signals | None = None
        self._first, self._start_again = 0.0, False
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1; 124 when time is up; or 0."""
        if self.received is not None:
            return 128 + self.received
        if self._end is not None and time.monotonic() >= self._end:
            return TIME_IS_UP
        return START_AGAIN if self._start_again else 0

    def __enter__(self) -> "StopSignals":
        # Python runs its own handlers between two instructions of the main thread, which may be waiting in C for a rank that is
        # gone. What the C handler writes here is read by a thread at once.
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in SIGNALS}
        code = asked_to_stop()
        if code:
            self.received, self._first = signal.Signals(code - 128), time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
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
        if number is signal.SIGTERM and ELASTIC in os.environ and not asked_to_stop():
            self._start_again = True
        elif self.received is None:
            self.received, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > REPEATS:
            try:
                sys.stderr.write("megaresnorm: a second signal: ended at once, without saving\n")
                sys.stderr.flush()
                end_on_purpose(128 + number)
            finally:
                os._exit(128 + number)


def end_on_purpose(code: int) -> int:
    """The exit code of a run that another start would not mend, or that is not to go on: 0 under launch/torchrun.sh, which is told
    ``code``. torchrun itself would take any other for a failure, and start the ranks again.
    """
    folder = os.environ.get(LAUNCHER)
    if folder is None or code == START_AGAIN:
        return code
    try:
        Path(folder, "end").write_text(str(code))
    except OSError:  # torchrun starts the ranks again, which is all that is lost
        return code
    return 0


def asked_to_stop() -> int:
    """128 and the signal that the launcher was sent, or that ended ranks of this node before they were started again; or 0."""
    folder = os.environ.get(LAUNCHER)
    for name in ("stop", "end") if folder else ():
        try:
            text = Path(str(folder), name).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) - 128 in list(SIGNALS):
            return int(text)
    return 0


def exit_reason(code: int) -> str:
    """
    >>> exit_reason(143), exit_reason(124)
    ('SIGTERM', 'train.max_minutes')
    """
    names = {TIME_IS_UP: "train.max_minutes", START_AGAIN: "other nodes"}
    return names.get(code) or signal.Signals(code - 128).name


def _ignore(number: int, frame: FrameType | None) -> None:
    """The thread hears of the signal by itself."""
