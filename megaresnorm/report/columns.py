"""metrics.jsonl as columns of numbers: a million steps in seconds, while the run goes on writing them."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaresnorm.files import open_plain
from megaresnorm.limits import MAX_STEPS
from megaresnorm.telemetry.metrics import MAX_LINE_BYTES

PIECE = 1 << 18  # bytes that are read at a time: more leave the caches of processors
LARGEST = 1e60  # whose square a float can hold
MAX_COLUMNS = 200  # a step of ours has a dozen, and three for each validation set


@dataclass(frozen=True)
class Columns:
    """Metrics of steps, in the order of the steps; of a step that was recorded twice the later record.

    Attributes:
        steps: int64 [S], counted from 1.
        values: name -> FP64 [S]; NaN where a step has no such figure.
        unreadable: lines that are no record of a step. A last line without an end is still being written, and none.
    """

    steps: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> np.ndarray | None:
        """A column; None where no step has such a figure."""
        found = self.values.get(name)
        return None if found is None or not np.isfinite(found).any() else found

    def last(self, name: str) -> float | None:
        """The last figure of a column; None where there is none."""
        found = self.get(name)
        return None if found is None else float(found[np.isfinite(found)][-1])


def read_columns(path: Path) -> Columns:
    """Read a file of metrics.

    Raises:
        OSError: it cannot be read, or is not a plain file.
    """
    steps: list[np.ndarray] = []
    pieces: list[dict[str, np.ndarray]] = []
    unreadable = 0
    for lines in _pieces(path):
        records = _records(lines)
        unreadable += len(lines) - len(records)
        if records:
            steps.append(np.array([record["step"] for record in records], dtype=np.int64))
            pieces.append(_columns(records))
    if not steps:
        return Columns(np.zeros(0, dtype=np.int64), {}, unreadable)
    names = list(dict.fromkeys(name for piece in pieces for name in piece))[:MAX_COLUMNS]
    values = {
        name: np.concatenate(
            [piece.get(name, np.full(len(one), np.nan)) for one, piece in zip(steps, pieces, strict=True)]
        )
        for name in names
    }
    return _in_order(Columns(np.concatenate(steps), values, unreadable))


def _pieces(path: Path) -> Iterator[list[bytes]]:
    """The whole lines of a file, some thousands at a time; of one that is far too long only that it is there."""
    rest, skips = b"", False
    with os.fdopen(open_plain(path, os.O_RDONLY), "rb") as file:
        while piece := file.read(PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            if skips and lines:
                lines, skips = [b"", *lines[1:]], False
            if len(rest) > MAX_LINE_BYTES:
                rest, skips = b"", True
            yield lines
    if rest.endswith(b"}"):  # whole, though its end is not written yet
        yield [rest]


def _records(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """Those lines that are records of steps. They are parsed together, which takes two thirds of the time."""
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        found = []
    if len(found) != len(lines):
        found = [_parsed(line) for line in lines]
    return [
        one for one in found if type(one) is dict and type(one.get("step")) is int and 0 <= one["step"] <= MAX_STEPS
    ]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of records, those with the same names together: most of a run's have."""
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, names in enumerate(map(tuple, records)):
        alike.setdefault(names, []).append(i)
    found: dict[str, np.ndarray] = {}
    for names, places in alike.items():
        values = zip(*(records[i].values() for i in places), strict=True)
        for name, column in zip(names, values, strict=True):
            if name != "step" and (name in found or len(found) < MAX_COLUMNS):
                found.setdefault(name, np.full(len(records), np.nan))[places] = numbers(column)
    return found


def numbers(found: Sequence[Any]) -> np.ndarray:
    """Values of JSON as FP64; NaN where one is no number, or is beyond what could be drawn."""
    plain = found if not {*map(type, found)} - {int, float, type(None)} else [*map(number, found)]
    try:
        values = np.array(plain, dtype=np.float64)  # None becomes NaN
    except OverflowError:
        values = np.array([*map(number, found)], dtype=np.float64)
    values[~(np.abs(values) < LARGEST)] = np.nan
    return values


def number(value: Any) -> float:
    """A value of JSON; NaN where it is no number, or is beyond what could be drawn."""
    return float(value) if type(value) in (int, float) and abs(value) < LARGEST else float("nan")


def _in_order(columns: Columns) -> Columns:
    if (np.diff(columns.steps) > 0).all():
        return columns
    order = np.argsort(columns.steps, kind="stable")
    steps = columns.steps[order]
    kept = order[np.append(steps[1:] != steps[:-1], True)]
    return Columns(columns.steps[kept], {name: one[kept] for name, one in columns.values.items()}, columns.unreadable)
