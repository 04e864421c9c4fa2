"""A process hears signals for others: the first one it passes on, the second ends them at once."""

import signal
import socket
import time
from collections.abc import Callable
from types import FrameType

from megaresnorm.resilience.launcher import SIGNALS

# Seconds after the first signal in which another counts as the same one: what ends a whole job signals its processes
# one after the other, and each passes it on.
REPEATS = 1.0


class Hearing:
    """Hears SIGINT, SIGTERM, SIGUSR1 and SIGHUP from its construction on. Made in the main thread.

    Args:
        passes_on: called with the first signal; SIGHUP counts as SIGTERM.

    Attributes:
        stop: exit code of the first signal, as in shells; 0 before one.
        first: when it came.
        again: whether a second one came.
    """

    def __init__(self, passes_on: Callable[[signal.Signals], None]) -> None:
        self.stop, self.first, self.again = 0, 0.0, False
        self._passes_on = passes_on
        self._wakeup, self._wakes = socket.socketpair()  # a signal writes to _wakes, which ends a wait for _wakeup
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        # Also if this was started with signals ignored, as by cron and scripts; but nohup ignores SIGHUP on purpose.
        heard = [*SIGNALS] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        for number in heard:
            signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.stop:
            self.again = self.again or now > self.first + REPEATS
            return
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self.stop, self.first = 128 + number, now
        self._passes_on(signal.Signals(number))

    def sleep(self, seconds: float) -> None:
        """Sleep, for less if a signal comes."""
        self._wakeup.settimeout(seconds)
        try:
            self._wakeup.recv(64)
        except TimeoutError:
            return
