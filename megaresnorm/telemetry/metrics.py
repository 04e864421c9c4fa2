"""Metrics of every step as JSON lines, and for TensorBoard. A full disk delays them and never ends a run."""

import io
import json
import logging
import os
import socket
import time
from math import isfinite
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0


class Appended:
    """A file that grows by whole records. What cannot be written now is kept, and written when it can be."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._next_warning = path, bytearray(), 0.0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.lseek(self._descriptor, 0, os.SEEK_END)

    def write(self, record: bytes = b"") -> None:
        self._waiting += record
        done = 0
        try:
            while done < len(self._waiting):
                done += os.pwrite(self._descriptor, memoryview(self._waiting)[done:], self._size + done)
        except OSError as e:
            self._take_back()
            if time.monotonic() >= self._next_warning:
                self._next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
                log.warning(
                    "warning: %s: cannot be written (%s); training goes on, the rest follows", self._path, e.strerror
                )
            return
        self._size += done
        self._waiting.clear()

    def close(self) -> None:
        """What cannot be written even now is lost, with a warning."""
        self._next_warning = 0.0
        self.write()
        os.close(self._descriptor)

    def _take_back(self) -> None:
        """Nobody shall read half a record; should this fail as well, it is written over later."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as e:
            log.debug("%s: cannot be cut (%s)", self._path, e.strerror)


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl`` and, if asked, writes TensorBoard files to ``folder/tensorboard``.

    ``first_step``: where the run starts or resumes; what an earlier process wrote from there on is dropped, since those steps
    are about to be done again.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text(errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) < first_step]
            if kept != lines:
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(kept))
                os.replace(temporary, path)
        self._lines = Appended(path)
        self._events = EventFile(folder / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of one step; the step itself is counted from 0."""
        finite = {name: value if isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._lines.write((json.dumps({"step": step, **finite}) + "\n").encode())
        if self._events is not None:
            self._events.write(step, metrics)

    def close(self) -> None:
        self._lines.close()
        if self._events is not None:
            self._events.close()


class EventFile:
    """Scalars as TensorBoard reads them. Its own writer has a thread that a full disk ends for good, with a traceback."""

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / name)
        self._append(file_version="brain.Event:2")
        self._append(
            step=first_step, session_log={"status": 1}
        )  # START: what an earlier process wrote from here on is void

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._append(step=step, summary={"value": [{"tag": n, "simple_value": v} for n, v in metrics.items()]})

    def close(self) -> None:
        self._file.close()

    def _append(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.write(record.getvalue())


def _step_of(line: str) -> float:
    """The step of a line; a line torn by a crash counts as the end of time."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
