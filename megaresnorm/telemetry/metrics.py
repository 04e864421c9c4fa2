"""Metrics of every step as JSON lines, and for TensorBoard. A full disk delays them and never ends a run."""

import io
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from megaresnorm.files import open_plain, replace_file

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0
MAX_LINE_BYTES = 1 << 16  # of metrics.jsonl; ours have a few hundred, and a longer line counts as unreadable
_EVENTS = re.compile(r"events\.out\.tfevents\.([0-9]+)")


class Appended:
    """A file that grows by whole records. What cannot be written now is kept, and written when it can be.

    Args:
        new: whether the file must not exist yet.

    Raises:
        OSError: it cannot be opened, or is not a plain file.
    """

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self._path, self._waiting, self._next_warning = path, bytearray(), 0.0
        self._descriptor = open_plain(path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if new else 0))
        self._size = os.lseek(self._descriptor, 0, os.SEEK_END)

    def write(self, record: bytes = b"") -> None:
        """Append a record, after those that are still waiting. A failure is a warning, at most one a minute."""
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
        """Close the file. What cannot be written even now is lost, with a warning."""
        self._next_warning = 0.0
        self.write()
        os.close(self._descriptor)

    def _take_back(self) -> None:
        """Remove half a record, so that nobody reads it; should this fail as well, it is overwritten later."""
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as e:
            log.debug("%s: cannot be cut (%s)", self._path, e.strerror)


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl`` and, if asked, writes TensorBoard files to ``folder/tensorboard``.

    Args:
        first_step: where the run starts or resumes. What an earlier process wrote from there on is dropped, since those
            steps are about to be done again, and so is what cannot be read, with a warning.
        tensorboard: whether to write TensorBoard files too.

    Raises:
        OSError: the files cannot be read or written; an earlier file then stays as it was.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        if os.path.lexists(path):
            _drop_from(path, first_step)
        self._lines = Appended(path)
        self._events = EventFile(folder / "tensorboard", first_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Record the metrics of one step.

        Args:
            step: counted from 0.
            metrics: by name; None where a step has no such figure.
        """
        # JSON has no NaN
        finite = {name: value if value is not None and isfinite(value) else None for name, value in metrics.items()}
        self._lines.write((json.dumps({"step": step, **finite}) + "\n").encode())
        if self._events is not None:
            self._events.write(step, {name: value for name, value in metrics.items() if value is not None})

    def close(self) -> None:
        """Close the files, as ``Appended.close``."""
        self._lines.close()
        if self._events is not None:
            self._events.close()


class EventFile:
    """Scalars as TensorBoard reads them. Its own writer has a thread that a full disk ends for good, with a traceback.

    Args:
        folder: made where it is missing.
        first_step: from which on what earlier files hold is void.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        folder.mkdir(exist_ok=True)
        stamp = stamp_after(os.listdir(folder), time.time_ns())
        name = f"events.out.tfevents.{stamp}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appended(folder / name, new=True)
        self._append(file_version="brain.Event:2")
        # START: what an earlier process wrote from here on is void
        self._append(step=first_step, session_log={"status": 1})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the scalars of one step, counted from 0."""
        self._append(step=step, summary={"value": [{"tag": n, "simple_value": v} for n, v in metrics.items()]})

    def close(self) -> None:
        """Close the file, as ``Appended.close``."""
        self._file.close()

    def _append(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.write(record.getvalue())


def stamp_after(names: list[str], now: int) -> str:
    """Digits by which an event file sorts after those of ``names``: the time, unless the clock has gone back since.

    TensorBoard reads the files of a folder in the order of their names, and skips what sorts before what it has read.

    >>> stamp_after(["events.out.tfevents.150.host.7"], 200), stamp_after(["events.out.tfevents.250.host.7"], 200)
    ('200', '251')
    """
    stamps = [match[1] for match in map(_EVENTS.match, names) if match is not None]
    newest = max(stamps, default="")
    if str(now) > newest:
        return str(now)
    following = str(int(newest) + 1)
    return following if following > newest else f"{newest}0"  # 9 is followed by 90, since 10 sorts before it


def _drop_from(path: Path, first_step: int) -> None:
    """Keep only the whole lines of steps before ``first_step`` in a file of metrics.

    Raises:
        OSError: it cannot be read or replaced.
    """
    kept = lines = unreadable = 0
    for line, step in _lines_of(path):
        unreadable += step is None
        kept += step is not None and step < first_step and line.endswith(b"\n")
        lines += 1
    if kept < lines:
        staying = (line for line, step in _lines_of(path) if step is not None and step < first_step)
        replace_file(path, (line.rstrip(b"\n") + b"\n" for line in staying))
    if unreadable:
        log.warning("warning: %s: %d of its lines cannot be read and are left out", path, unreadable)


def _lines_of(path: Path) -> Iterator[tuple[bytes, int | None]]:
    """Read a file of metrics.

    Yields:
        (line, its step); None where a line is not one of metrics.

    Raises:
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        while line := file.readline(MAX_LINE_BYTES):
            whole = line
            while len(whole) == MAX_LINE_BYTES and not whole.endswith(b"\n"):
                whole = file.readline(MAX_LINE_BYTES)  # the rest of a line that is too long
            yield line, _step_of(line) if whole is line else None


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where the line was torn by a crash, or is not one of metrics."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None
