"""Ctrl-C and SIGTERM end a run after the step at hand; a second one ends it at once."""

import signal
from types import FrameType, TracebackType


class StopSignals:
    """Within ``with StopSignals() as stop``, the first SIGINT or SIGTERM only sets ``stop.received``.

    The second is raised as KeyboardInterrupt. Checkpoints are renamed into place when complete, so it tears nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """128 + signal, as shells have it: 130 after Ctrl-C, 143 after SIGTERM; 0 if none came."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
