"""depth.jsonl and numbers.jsonl as matrices over steps and depth.

R records   D places in depth: blocks, or sub-layers
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megaresnorm.report.columns import numbers
from megaresnorm.telemetry.depth.records import SCHEMA_VERSION
from megaresnorm.telemetry.metrics import MAX_RECORD_BYTES, lines_of

BY_SUBLAYER = ("stream_rms", "branch_ratio")
BY_BLOCK = ("angular_distance", "gradient_norm", "update_ratio", "logit_max", "attention_entropy", "collapse")


@dataclass(frozen=True)
class OverTime:
    """One quantity over depth and time.

    Attributes:
        steps: int64 [R].
        values: FP64 [R, D]; NaN where a record has no figure.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass
class Depth:
    """What depth.jsonl holds of that which is shown.

    Attributes:
        by_place: name -> its values over blocks, or sub-layers where ``BY_SUBLAYER`` has the name.
        whole: name -> (steps [R], values [R]).
        paths: of the last probe: its step, lengths and shares; None without one.
        unreadable: lines that are no record.
    """

    by_place: dict[str, OverTime] = field(default_factory=dict)
    whole: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    paths: tuple[int, np.ndarray, np.ndarray] | None = None
    unreadable: int = 0


def depth_over_time(path: Path) -> Depth:
    """A run's depth.jsonl, line by line. What is torn or of another version is left out, and counted.

    Raises:
        OSError: it cannot be read.
    """
    found, places, whole = Depth(), _Rows(), _Rows()
    for line, step in lines_of(path, MAX_RECORD_BYTES):
        record: dict[str, Any] = {} if step is None else json.loads(line)
        if step is None or record.get("schema_version") != SCHEMA_VERSION:
            found.unreadable += line.endswith(b"\n")
            continue
        for section, names in (("by_sublayer", BY_SUBLAYER), ("by_block", BY_BLOCK)):
            places.add(step, record.get(section), names)
        single = record.get("whole")
        single = single if isinstance(single, dict) else {}
        whole.add(step, {name: [value] for name, value in single.items()}, list(single)[:50])
        if isinstance(paths := record.get("paths"), dict):
            found.paths = _paths(step, paths) or found.paths
    found.by_place = places.over_time()
    found.whole = {name: (one.steps, one.values[:, 0]) for name, one in whole.over_time().items()}
    return found


def numbers_over_time(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, OverTime]]:
    """What saturates and underflows by block: kind -> class of tensors -> shares, from records of numbers.jsonl."""
    found = {kind: _Rows() for kind in ("saturated", "underflown")}
    for record in records:
        blocks = record.get("blocks")
        classes = {of: one for of, one in blocks.items() if isinstance(one, dict)} if isinstance(blocks, dict) else {}
        for kind, rows in found.items():
            rows.add(
                record["step"], {of: one.get(kind) for of, one in classes.items()}, ("input", "weight", "gradient")
            )
    return {kind: over for kind, rows in found.items() if (over := rows.over_time())}


class _Rows:
    """Rows by name, of which those that are as wide as the last one become a matrix."""

    def __init__(self) -> None:
        self._rows: dict[str, list[tuple[int, np.ndarray]]] = {}

    def add(self, step: int, section: Any, names: Iterable[str]) -> None:
        if not isinstance(section, dict):
            return
        for name in names:
            row = section.get(name)
            if isinstance(row, list) and row:
                self._rows.setdefault(name, []).append((step, numbers(row)))

    def over_time(self) -> dict[str, OverTime]:
        found = {}
        for name, rows in self._rows.items():
            width = len(rows[-1][1])
            kept = {step: row for step, row in rows if len(row) == width}  # of two of a step the later
            values = np.stack([kept[step] for step in sorted(kept)])
            values[~np.isfinite(values)] = np.nan
            if np.isfinite(values).any():
                found[name] = OverTime(np.array(sorted(kept), dtype=np.int64), values)
        return found


def _paths(step: int, paths: Mapping[str, Any]) -> tuple[int, np.ndarray, np.ndarray] | None:
    lengths, shares = paths.get("lengths"), paths.get("shares")
    if not isinstance(lengths, list) or not isinstance(shares, list) or len(lengths) != len(shares) or not lengths:
        return None
    return step, numbers(lengths), numbers(shares)
