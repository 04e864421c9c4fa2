"""depth.jsonl: a line for each step that was watched, and for each that was probed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaresnorm.telemetry.depth.figures import DepthFigures
from megaresnorm.telemetry.metrics import DEPTH, read_records, short

SCHEMA_VERSION = 1


def record_of_watch(step: int, figures: DepthFigures) -> dict[str, Any]:
    """The line of a step that was watched. What is not finite is None; all else has six digits."""
    found = {"by_sublayer": figures.by_sublayer, "by_block": figures.by_block, "whole": figures.whole}
    return {"schema_version": SCHEMA_VERSION, "step": step, "kind": "watch"} | short(found)


def record_of_probe(step: int, figures: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a step after which the model was probed, likewise."""
    return {"schema_version": SCHEMA_VERSION, "step": step, "kind": "probe"} | short(dict(figures))


def read_depth(run: str | Path) -> list[dict[str, Any]]:
    """The records of a run's depth.jsonl, by step. A line that was torn by a crash is left out, with a warning.

    Args:
        run: the folder of the run.

    Raises:
        DataError: there is no such file, or it is of a version that this one does not know.
    """
    return read_records(Path(run) / DEPTH, SCHEMA_VERSION, "telemetry.every or telemetry.probe_every")
