"""The output folder: whether all nodes see it, how much it holds, and how fast a checkpoint gets there."""

import secrets
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megaresnorm.checkpoint.format import TensorSlices, human_bytes, list_checkpoints
from megaresnorm.checkpoint.resume import wait_until_seen
from megaresnorm.checkpoint.writer import free_bytes, write_tensors
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.mesh import Axis
from megaresnorm.resilience.cluster.check import Check, Verdict, check, some_of

PROBE = ".doctor-"  # of the folder that is written into
LEAST_BYTES, MOST_BYTES = 1 << 22, 1 << 24  # that a rank writes


@dataclass(frozen=True)
class Written:
    """What a rank has written into the output folder.

    Attributes:
        error: why it could not; empty if it could.
        seen: whether it sees what the first rank has made.
    """

    error: str = ""
    seen: bool = True
    num_bytes: int = 0
    seconds: float = 0.0
    free: int = 0


def measure_output(folder: Path, share: int, axis: Axis) -> list[Written]:
    """Let all ranks write a file at the same time, as they write a checkpoint: synced, and read back. Collective.

    Nothing of it is left, nor the folder where there was none.

    Args:
        share: bytes of a checkpoint that a rank writes; from ``LEAST_BYTES`` to ``MOST_BYTES`` are.
        axis: all ranks, its group on CPUs.

    Returns:
        Of each rank.

    Communication:
        Two ``all_gather_json``.
    """
    made = _made(folder) if axis.rank == 0 else None
    first = all_gather_json({"path": str(made[-1]), "error": ""} if isinstance(made, list) else {"error": made}, axis)[
        0
    ]
    try:
        mine = Written(error=first["error"]) if first["error"] else _write(Path(first["path"]), share, axis.rank)
        return [Written(**said) for said in all_gather_json(asdict(mine), axis)]
    finally:
        if isinstance(made, list):
            shutil.rmtree(made[-1], ignore_errors=True)
            for parent in reversed(made[:-1]):
                with suppress(OSError):  # somebody has begun a run there
                    parent.rmdir()


def _made(folder: Path) -> list[Path] | str:
    """Folders that were made, outermost first; or why they cannot be."""
    probe = folder / f"{PROBE}{secrets.token_hex(8)}"
    missing = [path for path in (probe, *probe.parents) if not path.exists()]
    try:
        probe.mkdir(parents=True)
    except OSError as e:
        return f"{folder} cannot be written ({e.strerror})"
    return missing[::-1]


def _write(probe: Path, share: int, rank: int) -> Written:
    if not wait_until_seen(probe):
        return Written(seen=False)
    elements = min(MOST_BYTES, max(LEAST_BYTES, share)) // 4
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(rank))
    start = time.perf_counter()
    try:
        write_tensors(probe / f"rank-{rank:05d}.safetensors", [("probe", TensorSlices.of_whole(tensor))])
        return Written(num_bytes=tensor.nbytes, seconds=time.perf_counter() - start, free=free_bytes(probe))
    except OSError as e:
        return Written(error=f"{probe.parent} cannot be written ({e.strerror})")


def judge_output(
    folder: Path, written: list[Written], hosts: list[str], num_bytes: int, keep: int, most_seconds: int
) -> list[Check]:
    """The verdicts on the output folder.

    Args:
        hosts: of each rank.
        num_bytes: of a checkpoint.
        keep: checkpoints that stay.
        most_seconds: watchdog.checkpoint.
    """
    name = "output folder"
    wrong = [f"rank {r} on {hosts[r]}: {one.error}" for r, one in enumerate(written) if one.error]
    blind = [f"rank {r} on {hosts[r]}" for r, one in enumerate(written) if not one.seen]
    if wrong or blind:
        found = some_of(wrong) or f"{folder} is not seen by {some_of(blind)}"
        return [Check(name, "FAIL", found, "all nodes must share it, and be allowed to write: set train.output")]
    free, there = min(one.free for one in written), len(list_checkpoints(folder / "checkpoints"))
    missing = keep + 1 - there
    need = f"{human_bytes(num_bytes, at_least=True)} for a checkpoint, {keep + 1} at times"
    speed = sum(one.num_bytes for one in written) / max(max(one.seconds for one in written), 1e-9)
    seconds = num_bytes / speed
    what = f"{human_bytes(speed)}/s synced and read back, {seconds:.3g} s for a checkpoint of {human_bytes(num_bytes)}"
    slowest = f"at most {most_seconds / 2:g} s, half of watchdog.checkpoint"
    slower = "use a faster folder, checkpoint.asynchronous, or raise watchdog.checkpoint"
    least: Verdict = "FAIL" if free < num_bytes else "WARN"
    return [
        Check(name, "PASS", f"{folder}, seen and written by all ranks"),
        check("space", f"{human_bytes(free)} free", free >= missing * num_bytes, "make room", least, wanted=need),
        check("write speed", what, seconds <= most_seconds / 2, slower, wanted=slowest),
    ]
