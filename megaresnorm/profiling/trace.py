"""The last steps of the first ranks as a trace that Perfetto and Chrome open: a process for each rank.

Times are microseconds. Tracks of a rank: what it computes, messages that it waits for, messages that are hidden, the
passes of microbatches through its stages, whole steps. Arrows lead from a stage that sends to the one that receives.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megaresnorm.checkpoint.resume import wait_until_seen
from megaresnorm.files import replace_file
from megaresnorm.profiling.rows import NUM_PHASES, Phase, Rows
from megaresnorm.profiling.timeline import Chunk, Measured

TRACE = "trace.json.gz"
_HEAD = b'{"displayTimeUnit": "ms", "traceEvents": [\n'
TRACKS = ("compute", "communication", "hidden communication", "pipeline", "steps")
COMPUTE, COMMUNICATION, HIDDEN, PIPELINE, STEPS = range(len(TRACKS))


class Rank(NamedTuple):
    """Who a trace is of.

    Attributes:
        num_stages: of the pipeline.
    """

    rank: int
    host: str
    pp: int
    dp: int
    tp: int
    num_stages: int = 1


def events_of(rank: Rank, rows: Rows, steps: Sequence[Measured], aligned: int) -> Iterator[dict[str, Any]]:
    """The events of a rank, in Chrome's trace format.

    Args:
        aligned: the host's clock, nanoseconds, at a moment that all ranks have in common.
    """
    pid, where = rank.rank, f"pp {rank.pp}, dp {rank.dp}, tp {rank.tp}"
    yield _named("process_name", pid, 0, name=f"rank {pid} ({where}) on {rank.host}")
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    for tid, words in enumerate(TRACKS):
        yield _named("thread_name", pid, tid, name=words)
        yield _named("thread_sort_index", pid, tid, sort_index=tid)
    for step in steps:
        start = (step.start - aligned) / 1e3
        yield _slice(pid, STEPS, f"step {step.number}", start, 1e3 * step.duration)
        for track, name, begin, end in _pieces(rows, step):
            yield _slice(pid, track, name, start + 1e3 * begin, 1e3 * (end - begin))
        for chunk in step.chunks:
            yield from _arrows(rank, step.number, chunk, start)


def _named(what: str, pid: int, tid: int, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": arguments}


def _slice(pid: int, track: int, name: str, start: float, duration: float) -> dict[str, Any]:
    times = {"ts": round(start, 3), "dur": round(duration, 3)}
    return {"ph": "X", "name": name, "cat": TRACKS[track], "pid": pid, "tid": track, **times}


def _pieces(rows: Rows, step: Measured) -> Iterator[tuple[int, str, float, float]]:
    """(track, name, start, end) of consecutive marks, of hidden messages and of microbatches' passes."""
    names = rows.names
    for place, begin, end in zip(step.places, step.times, step.times[1:], strict=False):
        if end > begin:
            yield COMMUNICATION if place % NUM_PHASES == Phase.EXPOSED else COMPUTE, names[place], begin, end
    for place, begin, end in step.overlapped:
        yield HIDDEN, rows.rows[place // NUM_PHASES].name, begin, end
    for chunk in step.chunks:
        yield PIPELINE, f"{chunk.kind}{chunk.microbatch} stage {chunk.stage}", chunk.start, chunk.end


def _arrows(rank: Rank, number: int, chunk: Chunk, start: float) -> Iterator[dict[str, Any]]:
    """This rank's ends of arrows between stages: of activations upwards, of gradients downwards.

    Both ends of an arrow have an id that each rank can tell by itself.
    """
    forward, last = chunk.kind == "F", rank.num_stages - 1
    above, below = chunk.stage < last, chunk.stage > 0  # whether there is a stage after and before it
    sends, receives = (above, below) if forward else (below, above)
    for there_is, ph, at in ((sends, "s", chunk.end), (receives, "f", chunk.start)):
        if not there_is:
            continue
        leaves_upwards = forward == (ph == "s")
        boundary = chunk.stage if leaves_upwards else chunk.stage - 1
        identity = f"{number}.{rank.dp}.{rank.tp}.{chunk.kind}{chunk.microbatch}.{boundary}"
        name = "activations" if forward else "gradients"
        event: dict[str, Any] = {"ph": ph, "cat": "pipeline", "name": name, "id": identity, "pid": rank.rank}
        event |= {"tid": PIPELINE, "ts": round(start + 1e3 * at, 3)}
        yield event if ph == "s" else event | {"bp": "e"}


def write_part(folder: Path, rank: Rank, events: Iterable[Mapping[str, Any]]) -> None:
    """Write a rank's part of a trace beside the others'.

    Raises:
        OSError: it cannot be written.
    """
    text = ",\n".join(json.dumps(event) for event in events)
    replace_file(_part(folder, rank.rank), gzip.compress(text.encode(), mtime=0))


def join_parts(folder: Path, num_ranks: int) -> None:
    """Make one trace of the parts of the first ranks, and remove these. Each is a member of the compressed file.

    Raises:
        OSError: it cannot be read or written.
    """
    parts = [_part(folder, rank) for rank in range(num_ranks)]
    for part in parts:
        wait_until_seen(part)
    head, comma, tail = (gzip.compress(text, mtime=0) for text in (_HEAD, b",\n", b"]}\n"))
    between = (piece for part in parts for piece in (comma, part.read_bytes()))
    next(between)
    replace_file(folder / TRACE, [head, *between, tail])
    for part in parts:
        part.unlink()


def _part(folder: Path, rank: int) -> Path:
    return folder / f"{TRACE}.{rank:05}"
