"""The files of a profile: profile.json, profile.csv, trace.json.gz, and curves and a heat map for TensorBoard."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megaresnorm.files import replace_file
from megaresnorm.profiling.profile import COLUMNS, FILE, total_of
from megaresnorm.profiling.trace import TRACE, join_parts
from megaresnorm.telemetry.events import EventFile

NUMBERS = (
    "flops", "tflops", "share_of_peak", "activation_bytes", "transient_bytes", "parameter_bytes", "gradient_norm",
    "stream_rms",
)  # fmt: skip
CELL = 12  # pixels of a block and column in the heat map


def write_profile(folder: Path, profile: Mapping[str, Any], *, traced: int) -> None:
    """Write all files of a profile, each in the place of an older one.

    Args:
        traced: ranks that have written their part of the trace; 0: there is none.

    Raises:
        OSError: one cannot be written.
    """
    replace_file(folder / FILE, json.dumps(profile, indent=1) + "\n")
    replace_file(folder / "profile.csv", as_csv(profile))
    if traced:
        join_parts(folder, traced)
    else:
        (folder / TRACE).unlink(missing_ok=True)  # of another profile


def as_csv(profile: Mapping[str, Any]) -> str:
    """A line for each row: of each column its median, 95th percentile and rank, milliseconds; operations, bytes."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    times = [name for column in COLUMNS for name in (f"{column}_ms", f"{column}_p95_ms", f"{column}_rank")]
    writer.writerow(["name", "part", "block", "stage", "total_ms", *times, *NUMBERS])
    for row in profile["rows"]:
        cells: list[Any] = [row["name"], row["part"], row["block"], row["stage"], round(total_of(row), 5)]
        for column in COLUMNS:
            time = row[column]
            cells += [None] * 3 if time is None else [time["p50"], time["p95"], time["rank"]]
        writer.writerow(cells + [row[name] for name in NUMBERS])
    return text.getvalue()


def by_block(profile: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Medians of the columns by block, summed over its rows, milliseconds."""
    found: dict[int, dict[str, float]] = {}
    for row in profile["rows"]:
        if row["block"] is None:
            continue
        block = found.setdefault(row["block"], dict.fromkeys(COLUMNS, 0.0))
        for column in COLUMNS:
            block[column] += 0.0 if row[column] is None else row[column]["p50"]
    return dict(sorted(found.items()))


def to_tensorboard(folder: Path, profile: Mapping[str, Any]) -> None:
    """Curves over depth, in which the block's number stands for the step, and a heat map of blocks and columns.

    Args:
        folder: of the curves: a run of its own beside that of training.

    Raises:
        OSError: it cannot be written.
    """
    folder.parent.mkdir(exist_ok=True)
    events = EventFile(folder, 0)
    blocks = by_block(profile)
    for block, columns in blocks.items():
        events.write(block, {f"profile/{column}_ms": value for column, value in columns.items() if value})
    if blocks:
        events.write_image("profile/blocks", heat_map(blocks), 0)
    events.close()


def heat_map(blocks: Mapping[int, Mapping[str, float]]) -> np.ndarray:
    """Blocks downwards, columns across, each relative to its own largest: [height, width, 3] of 8 bits."""
    table = np.array([[columns[name] for name in COLUMNS] for columns in blocks.values()])
    shares = table / np.maximum(table.max(axis=0), 1e-12)
    low, high = np.array([247, 251, 255.0]), np.array([8, 48, 107.0])
    colours = (low + shares[..., None] * (high - low)).astype(np.uint8)
    return colours.repeat(CELL, axis=0).repeat(4 * CELL, axis=1)
