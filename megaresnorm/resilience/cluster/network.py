"""Speed of the links between hosts, pair by pair, and of one all-reduce over all ranks."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.mesh import Axis
from megaresnorm.resilience.cluster.check import Check, check, some_of
from megaresnorm.resilience.cluster.judge import Pair, rounds, slow_links

SWEEPS = 3  # over all pairs; the median of each counts
PINGS = 6
SMALL, LARGE = 1 << 18, 1 << 25  # bytes of a message
LASTS = 0.02  # seconds that a measured message is to take
SLOWER, NEAR = 1 / 3, 2e-3  # share of the usual speed of answers that is slow; seconds that are never slow
LEAST = 12.5e6  # bytes a second of a link: 100 Mbit/s, over which no gradients are summed in useful time
REDUCED = {"cpu": 1 << 22, "cuda": 1 << 28}  # bytes of the all-reduce


class Link(NamedTuple):
    """A link between two ends.

    Attributes:
        latency: seconds of a round trip of 8 bytes.
        bandwidth: bytes a second, sent and received at the same time.
    """

    latency: float
    bandwidth: float


def measure_links(ends: Sequence[int], axis: Axis, device: torch.device) -> dict[Pair, Link]:
    """Links of this rank to the ends that come behind it. To be called on all ranks of ``axis``.

    Args:
        ends: ranks, one for each host; pairs are numbered by their places here.

    Communication:
        For each pair ``SWEEPS`` exchanges of up to ``LARGE`` bytes, at most one of an end at a time.
    """
    if axis.rank not in ends:
        return {}
    mine, found = ends.index(axis.rank), dict[Pair, list[Link]]()
    for _ in range(SWEEPS):
        for pairs in rounds(len(ends)):
            for pair in (pair for pair in pairs if mine in pair):
                other = pair[0] if pair[1] == mine else pair[1]
                link = _measure(ends[other], axis, device, leads=mine == pair[0])
                found.setdefault(pair, []).append(link)
    return {
        pair: Link(median(one.latency for one in links), median(one.bandwidth for one in links))
        for pair, links in found.items()
        if pair[0] == mine
    }


def _measure(other: int, axis: Axis, device: torch.device, *, leads: bool) -> Link:
    ping = torch.zeros(1, dtype=torch.int64, device=device)
    latency = median(_exchange(ping, other, axis) for _ in range(PINGS))
    data = torch.zeros(SMALL, dtype=torch.uint8, device=device)
    seconds = _exchange(data, other, axis)
    size = torch.tensor([min(LARGE, max(SMALL, int(SMALL * LASTS / seconds)))], device=device)
    asked = torch.empty_like(size)
    _both_ways(size, asked, other, axis)
    num_bytes = int((size if leads else asked).item())
    data = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return Link(latency, num_bytes / _exchange(data, other, axis))


def _exchange(x: Tensor, other: int, axis: Axis) -> float:
    """Seconds in which two ranks send each other x."""
    received = torch.empty_like(x)
    start = time.perf_counter()
    _both_ways(x, received, other, axis)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start


def _both_ways(x: Tensor, received: Tensor, other: int, axis: Axis) -> None:
    ops = [dist.P2POp(dist.isend, x, other, axis.group), dist.P2POp(dist.irecv, received, other, axis.group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def measure_all_reduce(axis: Axis, device: torch.device) -> float:
    """Bytes a second of an all-reduce over all ranks, as each link of a ring carries them. Collective.

    That is 2 (n - 1) / n of the tensor's bytes, as in NVIDIA's nccl-tests.

    Communication:
        Five all-reduces of ``REDUCED`` bytes.
    """
    x, seconds = torch.zeros(REDUCED[device.type] // 4, device=device), []
    for _ in range(5):
        dist.barrier(group=axis.group)
        start = time.perf_counter()
        all_reduce(x, axis)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * (axis.size - 1) / axis.size * x.nbytes / median(seconds)


def judge_links(links: Mapping[Pair, Link], names: Sequence[str]) -> list[Check]:
    """The verdicts on bandwidth and latency of links.

    Args:
        names: of the ends.
    """
    if not links:
        return []
    speeds = {pair: link.bandwidth for pair, link in links.items()}
    named, usual = _standing_out(speeds, names, lambda speed: f"{human_bytes(speed)}/s")
    low = [pair for pair, speed in speeds.items() if speed < LEAST]
    if low and not named:
        named = [f"link {names[a]} - {names[b]}: {human_bytes(speeds[a, b])}/s" for a, b in low]
    found = some_of(named) or f"{len(links)} links, median {human_bytes(usual)}/s, slowest " + _slowest(speeds, names)
    wanted = f"half of the median, {human_bytes(max(LEAST, usual / 2))}/s"
    advice = "look at its cable, port, duplex and interface (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
    answers = {pair: 1 / max(link.latency, NEAR) for pair, link in links.items()}
    late, usually = _standing_out(answers, names, lambda speed: f"{1e3 / speed:.1f} ms", SLOWER)
    trips = [link.latency for link in links.values()]
    times = some_of(late) or f"round trips of {1e3 * median(trips):.2f} ms, longest {1e3 * max(trips):.2f} ms"
    most = f"at most {1e3 / (SLOWER * usually):.1f} ms"
    return [
        check("bandwidth", found, not named, advice, wanted=wanted),
        check("latency", times, not late, "it is farther away than the others, or busy", wanted=most),
    ]


def _standing_out(speeds: Mapping[Pair, float], names: Sequence[str], words: Any, share: float = 0.5) -> Any:
    """What is slow, in words, and the usual speed."""
    slow = slow_links(speeds, share)
    usual = words(slow.usual)
    named = [f"host {names[end]}: {words(speed)} to all others, median {usual}" for end, speed in slow.ends.items()]
    named += [f"link {names[a]} - {names[b]}: {words(speed)}, median {usual}" for (a, b), speed in slow.links.items()]
    return named, slow.usual


def _slowest(speeds: Mapping[Pair, float], names: Sequence[str]) -> str:
    a, b = min(speeds, key=lambda pair: speeds[pair])
    return f"{human_bytes(speeds[a, b])}/s ({names[a]} - {names[b]})"


def judge_all_reduce(speed: float, links: Mapping[Pair, Link], size: int, device_type: str) -> Check:
    """The verdict on the all-reduce: on GPUs it is to come near to what pairs reach."""
    pairs = median(link.bandwidth for link in links.values()) if links else 0.0
    found = f"{human_bytes(speed)}/s on each link of a ring of {size} ranks"
    advice = "NCCL may have taken another way than pairs did: NCCL_DEBUG=INFO says which"
    right = device_type == "cpu" or speed > 0.2 * pairs
    return check(
        "all-reduce", found, right, advice, wanted=f"a fifth of a pair's {human_bytes(pairs)}/s" if pairs else ""
    )
