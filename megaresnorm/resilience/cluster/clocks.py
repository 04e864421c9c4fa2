"""Clocks of hosts, held against the first rank's by round trips."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megaresnorm.parallel.mesh import Axis
from megaresnorm.resilience.cluster.check import Check, check, some_of

MOST = 1.0  # seconds between two clocks, up to which logs of several hosts can be read side by side
TRIES = 8


class Offset(NamedTuple):
    """How far a clock is ahead of the first rank's.

    Attributes:
        seconds: negative where it is behind.
        error: half of the round trip in which it was asked.
    """

    seconds: float
    error: float


def offset_of(trips: Sequence[tuple[float, float, float]]) -> Offset:
    """The offset by the shortest round trip, in the middle of which the other clock is taken to have been read.

    Cristian, "Probabilistic clock synchronization", 1989.

    Args:
        trips: when the question was sent, what the other clock said, when the answer came.

    >>> offset_of([(10.0, 15.5, 11.0), (20.0, 25.25, 20.5)])
    Offset(seconds=5.0, error=0.25)
    """
    sent, theirs, came = min(trips, key=lambda trip: trip[2] - trip[0])
    return Offset(theirs - (sent + came) / 2, (came - sent) / 2)


def measure_clocks(ranks: Sequence[int], axis: Axis, tries: int = TRIES) -> dict[int, Offset]:
    """Offsets of the clocks of some ranks, on rank 0; empty elsewhere. To be called on all ranks.

    Args:
        ranks: one of each host but the first rank's, in ascending order; the others return at once.
        axis: all ranks, its group on CPUs.

    Communication:
        ``tries`` round trips of 8 bytes from rank 0 to each of these ranks, one after the other.
    """
    message, found = torch.zeros(1, dtype=torch.float64), {}
    if axis.rank in ranks:
        for _ in range(tries):
            dist.recv(message, src=0, group=axis.group)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), dst=0, group=axis.group)
    for rank in ranks if axis.rank == 0 else ():
        trips = []
        for _ in range(tries):
            sent = time.time()
            dist.send(message, dst=rank, group=axis.group)
            dist.recv(message, src=rank, group=axis.group)
            trips.append((sent, message.item(), time.time()))
        found[rank] = offset_of(trips)
    return found


def judge_clocks(offsets: dict[str, Offset]) -> Check:
    """The verdict on the clocks of hosts.

    Args:
        offsets: by the name of the host.
    """
    if not offsets:
        return Check("clocks", "PASS", "one host")
    wrong = [host for host, offset in offsets.items() if abs(offset.seconds) - offset.error > MOST]
    shown = wrong or [max(offsets, key=lambda host: abs(offsets[host].seconds))]
    words = [f"{host} {offsets[host].seconds:+.3f} s (±{1e3 * offsets[host].error:.1f} ms)" for host in shown]
    found = some_of(words) if wrong else f"the farthest from rank 0's is {words[0]}"
    return check("clocks", found, not wrong, "let chrony or ntpd set it", wanted=f"within {MOST:g} s")
