"""A profile: what all ranks have measured, as one document of rows; it is read again for comparisons and reports."""

import json
from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

from megaresnorm.errors import DataError
from megaresnorm.limits import MAX_BLOCKS
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.profiling.findings import findings_of
from megaresnorm.reading import read_plain_file
from megaresnorm.telemetry.depth.figures import DepthFigures
from megaresnorm.telemetry.metrics import short

SCHEMA_VERSION = 1
FILE = "profile.json"
MAX_BYTES = 1 << 28
MOST_MS = 1e12  # that a time in a file may have: thirty years
COLUMNS = ("forward", "backward", "input_grad", "weight_grad", "recompute", "exposed", "hidden", "optimizer")
CONVENTION = (
    "a backward pass counts twice its forward pass; attention is causal, half of its scores count; what is recomputed "
    "counts in HFU alone"
)
_ORDER = {"embedding": -1, "norm": 1, "head": 2}  # of rows without a block; those of blocks lie between


def merged(
    ranks: Sequence[Mapping[str, Any]], head: Mapping[str, Any], depth: DepthFigures | None = None
) -> dict[str, Any]:
    """The profile of a job.

    A row of several ranks has the times of the rank whose median is the largest, by column; operations and bytes are
    the largest of one rank.

    Args:
        ranks: what ``measures_of_rank`` has made on each, with rank, host, pp, dp and tp.
        head: what there is beside rows: command, device, layout, steps, tokens, flops, peak, bubble, overhead.
        depth: of a step that was watched.
    """
    rows: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for row in rank["rows"]:
            _merge(rows, row, rank["rank"])
    step = _slowest({r["rank"]: r["step"] for r in ranks})
    assert step is not None
    seconds = step["p50"] / 1e3
    whole = {part: _time({r["rank"]: _row_times(r, part) for r in ranks}) for part in ("bubble", "data", "host")} | {
        "unaccounted": _time({r["rank"]: _row_times(r, "other") for r in ranks})
    }
    whole |= {name: head.get(name) for name in ("ideal_bubble", "overhead", "overhead_noise")}
    found = [_finished(row, head.get("peak_tflops"), depth) for row in sorted(rows.values(), key=_position)]
    flops = head["flops"] / len(ranks)
    again = sum(row["flops_again"] for rank in ranks for row in rank["rows"]) / len(ranks)
    tflops = flops / seconds / 1e12
    peak = head.get("peak_tflops")
    profile = {
        "schema_version": SCHEMA_VERSION,
        **{name: head[name] for name in ("made", "command", "device", "layout", "first_step", "num_steps", "versions")},
        "ranks": [
            {name: r[name] for name in ("rank", "host", "pp", "dp", "tp")}
            | {f"{name}_ms": value for name, value in r["totals"].items()}
            for r in ranks
        ],
        "step_ms": step,
        "tokens_per_second": head["tokens"] / seconds,
        "tflops": tflops,
        "peak_tflops": peak,
        "mfu": None if peak is None else tflops / peak,
        "hfu": None if peak is None else (flops + again) / seconds / 1e12 / peak,
        "convention": f"{CONVENTION}; {head['peak_is']}" if peak is not None else CONVENTION,
        "rows": found,
        "whole": whole,
    }
    return profile | {"findings": findings_of(profile, ranks)}


def _merge(rows: dict[str, dict[str, Any]], row: Mapping[str, Any], rank: int) -> None:
    if row["part"] in ("other", "data", "host", "bubble"):
        return
    known = rows.setdefault(
        row["name"], {name: row[name] for name in ("name", "block", "part", "stage")} | {"by_rank": {}}
    )
    for column, values in row["times"].items():
        known["by_rank"].setdefault(column, {})[rank] = values
    for name in ("flops", "flops_again", "activation_bytes", "transient_bytes", "parameter_bytes"):
        known[name] = max((x for x in (known.get(name), row[name]) if x is not None), default=None)


def _row_times(rank: Mapping[str, Any], part: str) -> list | None:
    """All of a row without columns, such as the bubble: their sum, but for what is hidden."""
    for row in rank["rows"]:
        if row["part"] == part:
            columns = [values for column, values in row["times"].items() if column != "hidden"]
            return [None if None in both else sum(both) for both in zip(*columns, strict=True)]
    return None


def _time(by_rank: Mapping[int, list[float] | None]) -> dict[str, float] | None:
    return _slowest({rank: values for rank, values in by_rank.items() if values is not None})


def _slowest(by_rank: Mapping[int, Sequence[float]]) -> dict[str, float] | None:
    if not by_rank:
        return None
    rank = max(by_rank, key=lambda one: by_rank[one][0])
    p50, p95, mean, most, noise = by_rank[rank]
    return {"p50": p50, "p95": p95, "mean": mean, "max": most, "noise": noise, "rank": rank}


def _finished(row: dict[str, Any], peak: float | None, depth: DepthFigures | None) -> dict[str, Any]:
    by_rank = row.pop("by_rank")
    times = {column: _slowest(by_rank.get(column, {})) for column in COLUMNS}
    seconds = time_of(times, "forward", "backward") / 1e3
    tflops = 3 * row["flops"] / seconds / 1e12 if row["flops"] and seconds else None
    share = None if tflops is None or peak is None else tflops / peak
    own = {"tflops": tflops, "share_of_peak": share, "gradient_norm": _gradient_norm(row, depth)}
    return {**row, **times, **own, "stream_rms": _stream_rms(row, depth)}


def _gradient_norm(row: Mapping[str, Any], depth: DepthFigures | None) -> float | None:
    """Of the row's weights, in the step that was watched."""
    if depth is None:
        return None
    if row["block"] is None:
        return short(depth.whole.get(f"gradient_norm/{row['part']}"))
    classes = {"attention": ("qkv", "out"), "ffn": ("ffn_in", "ffn_out"), "norm": ("norm", "other")}
    names = [f"gradient_norm/{name}" for name in classes.get(row["part"], ())]
    found = [depth.by_block[name][row["block"]] for name in names if name in depth.by_block]
    known = [norm for norm in found if norm is not None]
    return short(hypot(*known)) if known else None


def _stream_rms(row: Mapping[str, Any], depth: DepthFigures | None) -> float | None:
    """Of the stream where the row's branch opens it."""
    if depth is None or row["part"] not in SUBLAYERS:
        return None
    return short(depth.by_sublayer["stream_rms"][len(SUBLAYERS) * row["block"] + SUBLAYERS.index(row["part"])])


def _position(row: Mapping[str, Any]) -> tuple[float, ...]:
    if row["block"] is not None:
        return 0, row["block"], {"weights": 0, "norm": 1, "attention": 2, "block": 2}.get(row["part"], 3)
    return _ORDER.get(row["part"], 3), 0, 0


def time_of(row: Mapping[str, Any], *columns: str) -> float:
    """Sum of the medians of some columns of a row, milliseconds."""
    return sum(row[column]["p50"] for column in columns if row.get(column))


def total_of(row: Mapping[str, Any]) -> float:
    """Milliseconds of a row in a step; what is hidden and what is part of backward is not added."""
    return time_of(row, "forward", "backward", "recompute", "exposed", "optimizer")


def read_profile(path: str | Path) -> dict[str, Any]:
    """A profile that was written before.

    Args:
        path: of the file; or the folder of a run, or of its profile.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(path)
    tried = [path, path / FILE, path / "profile" / FILE] if path.is_dir() else [path]
    file = next((one for one in tried if one.is_file()), None)
    if file is None:
        raise DataError(f"{path}: there is no {FILE}; make one with: megaresnorm profile RECIPE")
    try:
        found = json.loads(read_plain_file(file, MAX_BYTES))
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file}: cannot be read ({e}); make it again with: megaresnorm profile RECIPE") from None
    if problem := problem_of(found):
        raise DataError(f"{file}: {problem}")
    return found


def problem_of(found: Any) -> str | None:
    """What is wrong with what was read as a profile; None where nothing is."""
    again = "make it again with: megaresnorm profile RECIPE"
    version = found.get("schema_version") if isinstance(found, dict) else None
    if version != SCHEMA_VERSION:
        return f"schema_version={json.dumps(version)[:40]} is not {SCHEMA_VERSION}, which is read here"
    rows = found.get("rows")
    if not isinstance(rows, list) or len(rows) > 8 * MAX_BLOCKS or not _is_time(found.get("step_ms")):
        return f"it has no rows, or no time of a step; {again}"
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            return f"one of its rows has no name; {again}"
        if not all(row.get(column) is None or _is_time(row[column]) for column in COLUMNS):
            return f"a time of its row {row['name'][:40]!r} is none; {again}"
    return None


def _is_time(time: Any) -> bool:
    if not isinstance(time, dict) or not isinstance(time.get("rank"), int):
        return False
    noise = time.get("noise")
    return all(_is_duration(time.get(name)) for name in ("p50", "p95", "mean", "max")) and (
        noise is None or _is_duration(noise)
    )


def _is_duration(milliseconds: Any) -> bool:
    return isinstance(milliseconds, int | float) and 0 <= milliseconds < MOST_MS
