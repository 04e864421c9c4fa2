"""Messages between ranks beside tensors: JSON, never pickles."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megaresnorm.errors import LostRankError, UserError, error_of
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.mesh import Axis

T = TypeVar("T")
ALONE = Axis("control")


def all_gather_json(message: Any, axis: Axis, device: torch.device | None = None) -> list[Any]:
    """Every rank's message, in the order of the ranks. Collective.

    Args:
        message: anything that JSON can hold.
        axis: its group is on CPUs, or on ``device``.
        device: None for CPUs.

    Communication:
        Two all-gathers: of 8 bytes, the message's length, and of as many bytes as the longest message has.
    """
    if axis.group is None:
        return [message]
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = all_gather_blocks(torch.tensor([len(data)], device=device), axis).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    everyone = all_gather_blocks(padded.to(device or padded.device), axis).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(everyone, sizes, strict=True)]


def run_on_all_ranks(work: Callable[[], Any], axis: Axis, device: torch.device | None = None) -> list[Any]:
    """Run ``work`` on every rank. Where it fails on one, no rank goes on alone. Collective.

    Args:
        work: returns what JSON can hold.
        device: as of ``all_gather_json``.

    Returns:
        What it returned on every rank, in the order of the ranks.

    Communication:
        One ``all_gather_json``.

    Raises:
        UserError: the same on all ranks, that of the first rank that had one.
        LostRankError: another rank had any other exception, which it raises itself; this rank ends as well.
    """
    mine: dict[str, Any] = {}
    error: Exception | None = None
    try:
        mine["done"] = work()
    except UserError as e:
        error = e
        mine |= {"kind": type(e).__name__, "error": str(e), "exit_code": e.exit_code}
    except Exception as e:  # noqa: BLE001 - a mistake of ours; raised below, when nobody waits for this rank any more
        error = e
        mine |= {"kind": LostRankError.__name__, "error": f"rank {axis.rank} failed: {type(e).__name__}: {e}"}
    everyone = all_gather_json(mine, axis, device)
    if error is not None and (axis.size == 1 or not isinstance(error, UserError)):
        raise error
    for said in everyone:
        if "error" in said:
            raise error_of(said["kind"], said["error"], said.get("exit_code"))
    return [said["done"] for said in everyone]


def all_or_raise(work: Callable[[], T], axis: Axis, device: torch.device | None = None) -> T:
    """Run ``work`` on every rank. Where it fails on one, no rank goes on alone. Collective.

    Args:
        device: as of ``all_gather_json``.

    Returns:
        What it returned on this rank, be it JSON or not.

    Communication:
        One ``all_gather_json``.

    Raises:
        UserError, LostRankError: as ``run_on_all_ranks``.
    """
    results: list[T] = []
    run_on_all_ranks(lambda: results.append(work()), axis, device)
    return results[0]
