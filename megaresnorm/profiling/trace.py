"""The last steps of all ranks as a trace that Perfetto and Chrome open: a process for each rank.

Times are microseconds. Tracks of a rank: what it computes, its messages, the passes of microbatches through its
stages, the host. Arrows lead from a stage that sends to the one that receives.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megaresnorm.files import replace_file
from megaresnorm.profiling.rows import NUM_PHASES, Phase, Rows
from megaresnorm.profiling.timeline import Measured

TRACKS = ("compute", "communication", "pipeline", "steps")
COMPUTE, COMMUNICATION, PIPELINE, STEPS = range(len(TRACKS))


def slices_of(rows: Rows, steps: Sequence[Measured], first_step: int, aligned: int) -> dict[str, Any]:
    """What a rank sends of its steps: slices as [track, name, start, duration], and arrows.

    Args:
        first_step: number of the first of them.
        aligned: the host's clock, nanoseconds, at a moment that all ranks have in common.
    """
    slices: list[list[Any]] = []
    chunks: list[list[Any]] = []
    for number, step in enumerate(steps):
        start = (step.start - aligned) / 1e3
        slices.append([STEPS, f"step {first_step + number}", start, 1e3 * step.duration])
        slices += _of_places(rows, step, start)
        for place, begin, end in step.overlapped:
            slices.append(
                [
                    COMMUNICATION,
                    f"{rows.rows[place // NUM_PHASES].name} hidden",
                    start + 1e3 * begin,
                    1e3 * (end - begin),
                ]
            )
        for kind, stage, microbatch, begin, end in step.chunks:
            slices.append([PIPELINE, f"{kind}{microbatch} stage {stage}", start + 1e3 * begin, 1e3 * (end - begin)])
            chunks.append([number, kind, stage, microbatch, start + 1e3 * begin, 1e3 * (end - begin)])
    return {"slices": [[t, n, round(s, 3), round(d, 3)] for t, n, s, d in slices], "chunks": chunks}


def _of_places(rows: Rows, step: Measured, start: float) -> Iterator[list[Any]]:
    """Slices of consecutive marks; those of no length are left out."""
    names = rows.names
    for place, begin, end in zip(step.places, step.times, step.times[1:], strict=False):
        if end > begin:
            track = COMMUNICATION if place % NUM_PHASES == Phase.EXPOSED else COMPUTE
            yield [track, names[place], start + 1e3 * begin, 1e3 * (end - begin)]


def trace_events(ranks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Events of Chrome's trace format.

    Args:
        ranks: with rank, host, pp, dp, tp, and as ``trace`` what ``slices_of`` has made.
    """
    for rank in ranks:
        pid = rank["rank"]
        name = f"rank {pid} (pp {rank['pp']}, dp {rank['dp']}, tp {rank['tp']}) on {rank['host']}"
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for tid, track in enumerate(TRACKS):
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": track}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        for track, name, start, duration in rank["trace"]["slices"]:
            event = {"ph": "X", "name": name, "pid": pid, "tid": track, "ts": start, "dur": duration}
            yield event | {"cat": TRACKS[track]}
    yield from _arrows(ranks)


def _arrows(ranks: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """From the end of a microbatch's pass through a stage to its beginning in the next: forward up, backward down."""
    passes: dict[tuple[int, int, int, str, int, int], tuple[int, float, float]] = {}
    for rank in ranks:
        for number, kind, stage, microbatch, start, duration in rank["trace"]["chunks"]:
            passes[rank["dp"], rank["tp"], number, kind, microbatch, stage] = rank["rank"], start, duration
    for identity, (key, (pid, start, duration)) in enumerate(passes.items()):
        *same, kind, microbatch, stage = key
        following = passes.get((*same, kind, microbatch, stage + (1 if kind == "F" else -1)))  # type: ignore[arg-type]
        if following is None:
            continue
        common = {"cat": "pipeline", "name": "activations" if kind == "F" else "gradients", "id": identity}
        yield common | {"ph": "s", "pid": pid, "tid": PIPELINE, "ts": start + duration}
        yield common | {"ph": "f", "bp": "e", "pid": following[0], "tid": PIPELINE, "ts": following[1]}


def write_trace(path: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
    """Write the trace of all ranks, compressed.

    Raises:
        OSError: it cannot be written.
    """
    trace = {"traceEvents": list(trace_events(ranks)), "displayTimeUnit": "ms"}
    replace_file(path, [gzip.compress(json.dumps(trace).encode(), mtime=0)])
