"""Where the time of a run goes, over all of its starts: what has moved it on, and what has not.

Totals are recorded with the metrics of every step, so that those of a process that was killed are known up to its last
step. A run that goes on from there takes them over, and counts the steps that it makes again as lost.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# productive: steps that stay. lost: steps refused, made again, or made anew after a restart. start: from the last step
# before a restart, or from where a process begins, up to its first step. waiting is a part of productive: how long the
# mean rank waits for the slowest.
KINDS = ("productive", "lost", "checkpoint", "evaluation", "start", "waiting")
APART = ("waiting",)  # parts of others
PREFIX = "spent_"


class Goodput:
    """Seconds by kind. Every rank counts for itself; those of the first are recorded.

    Args:
        age: seconds since the start of the run's process; 0 where a program that does other things as well trains.
    """

    def __init__(self, age: float = 0.0) -> None:
        self._began = time.time() - age
        self._spent = dict.fromkeys(KINDS, 0.0)
        self._at_first_step: float | None = time.monotonic() - age

    def resume(self, kept: Mapping[str, Any], last: Mapping[str, Any], *, ended: bool) -> None:
        """Go on from the totals of an earlier process, or from where the run has gone back to.

        Args:
            kept: the record of the step that the run goes on from; empty at its beginning.
            last: the record of the last step that was made before; empty where none was.
            ended: whether whoever made it has ended on purpose: then nobody waited for this process to begin.
        """
        self._spent = {kind: _number(last.get(PREFIX + kind)) for kind in KINDS}
        self.went_back(kept)
        if not ended and "time" in last:
            self._spent["start"] += max(0.0, self._began - _number(last["time"]))

    def went_back(self, kept: Mapping[str, Any]) -> None:
        """The run has gone back to a step, without another start."""
        again = self._spent["productive"] - _number(kept.get(PREFIX + "productive"))
        self._spent["productive"] -= again
        self._spent["lost"] += again
        self._spent["waiting"] = _number(kept.get(PREFIX + "waiting"))

    @contextmanager
    def spends(self, kind: str) -> Iterator[None]:
        """What happens within counts as this kind."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[kind] += time.perf_counter() - start

    def begin_step(self) -> None:
        """The first one ends the start of this process."""
        if self._at_first_step is not None:
            self._spent["start"] += time.monotonic() - self._at_first_step
            self._at_first_step = None

    def step(self, seconds: float, lost: float = 0.0) -> None:
        """A step was made.

        Args:
            lost: seconds of it that have not moved the run on.
        """
        self._spent["productive"] += seconds - lost
        self._spent["lost"] += lost

    def waited(self, seconds: float) -> None:
        """The mean rank has waited for the slowest, in steps that were counted."""
        self._spent["waiting"] += seconds

    def metrics(self) -> dict[str, float | None]:
        """Totals, and the productive share of all of them."""
        whole = sum(seconds for kind, seconds in self._spent.items() if kind not in APART)
        totals = {PREFIX + kind: round(seconds, 3) for kind, seconds in self._spent.items()}
        return {**totals, "goodput": self._spent["productive"] / whole if whole else None}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
