"""What went wrong in a run and what was done about it, in RUN/events.jsonl, for people and for ``megaresnorm report``.

A line is one JSON object: schema_version, time (seconds since 1970), step, kind, rank and host where they are known,
what (one line of words), and what else belongs to its kind. Nothing is ever removed from it, also where the run goes
back: its steps may therefore go back, too.
"""

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaresnorm.files import open_plain
from megaresnorm.telemetry.metrics import MAX_LINE_BYTES, lines_of
from megaresnorm.text import shown

log = logging.getLogger(__name__)

EVENTS = "events.jsonl"
SCHEMA_VERSION = 1
MOST = 10_000  # events that are read


class Incidents:
    """Appends to the file; several processes may.

    Args:
        folder: of the run.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, *, writes: bool = True) -> None:
        self._path, self._writes = folder / EVENTS, writes

    def note(
        self, kind: str, step: int, what: str, *, rank: int | None = None, host: str | None = None, **more: Any
    ) -> None:
        """Append a line. Where it cannot be written that is a warning.

        Args:
            kind: such as nonfinite, spike, corruption, straggler, hang, rollback, start.
            step: counted from 1.
            what: one line of words.
        """
        if not self._writes:
            return
        about = {"schema_version": SCHEMA_VERSION, "time": time.time(), "step": step, "kind": kind}
        line = json.dumps(about | {"rank": rank, "host": host, "what": shown(what)} | more) + "\n"
        try:
            descriptor = open_plain(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                size = os.fstat(descriptor).st_size  # what a killed process has torn is a line of its own
                torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                os.write(descriptor, (torn * "\n" + line).encode())
            finally:
                os.close(descriptor)
        except OSError as e:
            log.warning("warning: %s: cannot be written (%s)", self._path, e.strerror)


def read_incidents(folder: Path) -> Iterator[dict[str, Any]]:
    """The newest lines that can be read, in the order in which they were written; none where there is no plain file."""
    found: deque[dict[str, Any]] = deque(maxlen=MOST)
    try:
        for line, step in lines_of(folder / EVENTS, MAX_LINE_BYTES):
            one = None if step is None else json.loads(line)
            if one is not None and isinstance(one.get("kind"), str):
                found.append(one)
    except OSError as e:
        log.debug("%s: %s", folder / EVENTS, e.strerror)
    yield from found


def ended_on_purpose(folder: Path) -> bool:
    """Whether the last process of a run has ended by itself, rather than being killed."""
    last = [one["kind"] for one in read_incidents(folder) if one["kind"] in ("start", "end")][-1:]
    return last != ["start"]
