"""Metrics of every step as JSON lines, and for the loggers of a run; records of some steps in files of their own.

A full disk delays them and never ends a run. Steps are counted from 1, as in the log and in the names of checkpoints.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from megaresnorm.errors import DataError
from megaresnorm.files import open_plain, replace_file
from megaresnorm.telemetry.events import Appended, EventFile
from megaresnorm.telemetry.loggers import open_loggers, tagged

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 16  # of metrics.jsonl; ours have a few hundred, and a longer line counts as unreadable
NUMBERS = "numbers.jsonl"
DEPTH = "depth.jsonl"
MAX_RECORD_BYTES = 1 << 22  # of a line of these two, which have less than 500 for each block


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl``, gives the same metrics to loggers, and writes records of other files.

    Args:
        first_step: where the run starts or resumes, counted from 1. What an earlier process wrote from there on is
            dropped, since those steps are about to be done again, and so is what cannot be read, with a warning.
        loggers: names, as in train.loggers.
        settings: the recipe's, by dotted key.
        records: names of the files, of ``NUMBERS`` and ``DEPTH``, for which there will be records.

    Attributes:
        kept: metrics of the last step before ``first_step``; empty without one.
        dropped: metrics of the last step that there were, be it dropped or not.

    Raises:
        ConfigError: a logger refuses to start.
        OSError: the files cannot be read or written; an earlier file then stays as it was.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        loggers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        records: Sequence[str] = (),
    ) -> None:
        self._folder, self._names = folder, records
        self.kept: dict[str, Any] = {}
        self.dropped: dict[str, Any] = {}
        self._open_loggers = partial(open_loggers, loggers, folder, settings=settings or {})
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        folder = self._folder
        self.kept, self.dropped = {}, {}
        for name, most in (("metrics.jsonl", MAX_LINE_BYTES), (NUMBERS, MAX_RECORD_BYTES), (DEPTH, MAX_RECORD_BYTES)):
            if os.path.lexists(folder / name):
                ends = _drop_from(folder / name, first_step, most)
                if name == "metrics.jsonl":
                    self.kept, self.dropped = ends
        self._lines, self._last = Appended(folder / "metrics.jsonl"), b""
        self._records = {name: Appended(folder / name) for name in self._names}
        self._loggers = self._open_loggers(first_step=first_step)

    def go_back(self, first_step: int) -> None:
        """Drop what was recorded from a step on, which is about to be made again.

        A file that cannot be cut keeps it, with a warning: readers take the later record of a step.
        """
        files = {"metrics.jsonl": self._lines} | self._records
        for name, file in files.items():
            most = MAX_LINE_BYTES if name == "metrics.jsonl" else MAX_RECORD_BYTES
            try:
                file.write()
                ends = _drop_from(self._folder / name, first_step, most)
                reopened = Appended(self._folder / name)
            except OSError as e:
                log.warning("warning: %s: cannot be cut (%s)", self._folder / name, e.strerror)
                continue
            file.close()
            if name == "metrics.jsonl":
                self._lines, (self.kept, self.dropped) = reopened, ends
            else:
                self._records[name] = reopened
        for logger in self._loggers:
            if isinstance(logger, EventFile):  # services take a step twice
                logger.go_back(first_step)

    def write(
        self,
        step: int,
        metrics: Mapping[str, float | None],
        records: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Record the metrics of one step.

        Args:
            step: counted from 1.
            metrics: by name; None where a step has no such figure.
            records: of the step, as JSON holds them, by the name of their file.
        """
        for name, lines in (records or {}).items():
            for line in lines:
                self._records[name].write((json.dumps(line, allow_nan=False) + "\n").encode())
        self._last = _line(step, metrics)
        self._lines.write(self._last)
        self._to_loggers(step, metrics)

    def amend(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add metrics to those of the step that was recorded last."""
        line = _line(step, {**json.loads(self._last), **metrics})
        self._lines.amend(self._last, line)
        self._last = line
        self._to_loggers(step, metrics)

    def close(self, code: int = 0) -> None:
        """Close the files, as ``Appended.close``, and end the loggers.

        Args:
            code: the run's exit code.
        """
        self._lines.close()
        for file in self._records.values():
            file.close()
        for logger in self._loggers:
            logger.close(code)

    def _to_loggers(self, step: int, metrics: Mapping[str, float | None]) -> None:
        known = {name: value for name, value in metrics.items() if value is not None}
        for logger in self._loggers:
            logger.write(step, tagged(known))


def short(value: Any) -> Any:
    """A record, or a part of one, with six digits; what is not finite is None.

    >>> short({"x": [1 / 3, float("nan"), 7]})
    {'x': [0.333333, None, 7]}
    """
    match value:
        case float():
            return float(f"{value:.6g}") if isfinite(value) else None
        case dict():
            return {key: short(each) for key, each in value.items()}
        case list():
            return [short(each) for each in value]
    return value


def _line(step: int, metrics: Mapping[str, float | None]) -> bytes:
    """JSON of one step; it has no NaN."""
    finite = {name: value if value is not None and isfinite(value) else None for name, value in metrics.items()}
    return (json.dumps({**finite, "step": step} if "step" in finite else {"step": step, **finite}) + "\n").encode()


def _drop_from(path: Path, first_step: int, most: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keep only the whole lines of steps before ``first_step`` in a file of records.

    Versions before 0.2 counted from 0: their lines are renumbered.

    Args:
        most: bytes of a line.

    Returns:
        The last record that is kept, and the last that there was; empty where there is none.

    Raises:
        OSError: it cannot be read or replaced.
    """
    ends = [b"{}", b"{}"]
    kept = lines = unreadable = 0
    counted_from = 1
    for line, step in lines_of(path, most):
        unreadable += step is None
        counted_from = 0 if step == 0 else counted_from
        stays = step is not None and step - counted_from + 1 < first_step and line.endswith(b"\n")
        if step is not None:
            ends = [line if stays else ends[0], line]
        kept += stays
        lines += 1
    if kept < lines or counted_from == 0:
        found = ((line, step) for line, step in lines_of(path, most) if step is not None)
        staying = ((line, step + 1 - counted_from) for line, step in found if step - counted_from + 1 < first_step)
        replace_file(path, (_renumbered(line, step) if counted_from == 0 else _ended(line) for line, step in staying))
    if unreadable:
        log.warning("warning: %s: %d of its lines cannot be read and are left out", path, unreadable)
    return json.loads(ends[0]), json.loads(ends[1])


def _ended(line: bytes) -> bytes:
    return line.rstrip(b"\n") + b"\n"


def _renumbered(line: bytes, step: int) -> bytes:
    return (json.dumps(json.loads(line) | {"step": step}) + "\n").encode()


def lines_of(path: Path, most: int) -> Iterator[tuple[bytes, int | None]]:
    """Read a file of records.

    Args:
        most: bytes of a line.

    Yields:
        (line, its step); None where a line is no record of a step.

    Raises:
        OSError: it cannot be read.
    """
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        while line := file.readline(most):
            whole = line
            while len(whole) == most and not whole.endswith(b"\n"):
                whole = file.readline(most)  # the rest of a line that is too long
            yield line, _step_of(line) if whole is line else None


def _step_of(line: bytes) -> int | None:
    """The step of a line; None where the line was torn by a crash, or is not one of metrics."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int and step >= 0 else None


def read_records(path: Path, version: int, setting: str = "telemetry.every") -> list[dict[str, Any]]:
    """The records of a file, in its order. A line that was torn by a crash is left out, with a warning.

    Args:
        version: their schema_version.
        setting: makes a run write the file.

    Raises:
        DataError: there is no such file, or it is of a version that this one does not know.
    """
    found, torn = [], 0
    try:
        for line, step in lines_of(path, MAX_RECORD_BYTES):
            torn += step is None
            if step is not None:
                found.append(json.loads(line))
    except FileNotFoundError:
        raise DataError(f"{path}: there is none; set {setting}, and train") from None
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    other = next((r.get("schema_version") for r in found if r.get("schema_version") != version), version)
    if other != version:
        raise DataError(f"{path}: schema_version={other!r} is not {version}, which is read here")
    if torn:
        log.warning("warning: %s: %d of its lines cannot be read and are left out", path, torn)
    return found
