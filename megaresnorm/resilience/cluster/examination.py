"""All checks of a job's hosts, one after the other, and what they come to."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import torch

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.model.parameters import parameter_table
from megaresnorm.optim import AdamW
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import Environment
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.resilience.cluster.check import Check, check, some_of
from megaresnorm.resilience.cluster.clocks import judge_clocks, measure_clocks
from megaresnorm.resilience.cluster.compute import (
    judge_answers,
    judge_speed,
    kind_of,
    known_answers,
    measure_speeds,
)
from megaresnorm.resilience.cluster.judge import NOTABLE, Pair
from megaresnorm.resilience.cluster.network import (
    Link,
    judge_all_reduce,
    judge_links,
    measure_all_reduce,
    measure_links,
)
from megaresnorm.resilience.cluster.node import Place, hosts_of, judge_addresses, judge_limits
from megaresnorm.resilience.cluster.storage import judge_output, measure_output
from megaresnorm.resilience.memory_check import need_of_host

AGAIN = 2  # times that links are measured while one stands out
MOST_ENDS = 16  # ranks of one host whose links are measured


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        recipe: resolved; None to examine the hosts alone, or where it cannot be used.
        sizes: of its layout; None likewise.
    """

    context: ParallelContext
    environment: Environment
    device: torch.device
    recipe: Recipe | None = None
    sizes: Sizes | None = None


@dataclass
class Examination:
    """What was found, the verdicts and the figures.

    Attributes:
        figures: what ``--json`` has besides the checks; complete on rank 0.
    """

    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether a check has failed."""
        return any(one.verdict == "FAIL" for one in self.checks)

    def as_json(self) -> dict[str, Any]:
        """All of it, for a file."""
        return {"schema_version": 1, **self.figures, "checks": [asdict(one) for one in self.checks]}


def examine(subject: Subject) -> Examination:
    """Examine hosts, links and devices of a job. Collective; complete on rank 0, the verdict is the same on all.

    Communication:
        That of ``measure_clocks``, ``measure_links``, ``measure_all_reduce``, ``measure_speeds``, ``measure_output``,
        and some ``all_gather_json``.
    """
    found, start = Examination(), time.perf_counter()
    places = [
        Place(**p) for p in all_gather_json(asdict(Place.here(subject.environment, subject.device)), _all(subject))
    ]
    hosts = hosts_of(places)
    names = {rank: host for host, ranks in hosts.items() for rank in ranks}
    of_ranks = [names[rank] for rank in range(len(places))]
    tp = 1 if subject.sizes is None else subject.sizes.tp
    found.figures |= {"world_size": len(places), "hosts": hosts, "ranks": [asdict(place) for place in places]}
    found.checks += [
        Check("ranks", "PASS", f"{len(places)} on {len(hosts)} host{'s' * (len(hosts) > 1)}: {some_of([*hosts])}")
    ]
    for part in (_clocks(subject, hosts, found), _output(subject, of_ranks, found), judge_limits(places, hosts, tp),
                 _memory(subject, places, hosts), judge_addresses(places, hosts), _network(subject, hosts, found),
                 _devices(subject, places, of_ranks, found)):  # fmt: skip
        found.checks += part
    found.figures["seconds"] = time.perf_counter() - start
    failed = all_gather_json(found.failed, _all(subject))
    if failed[0] and not found.failed:
        found.checks += [Check("verdict", "FAIL", "see rank 0")]
    return found


def _all(subject: Subject) -> Any:
    return subject.context.control


def _clocks(subject: Subject, hosts: dict[str, list[int]], found: Examination) -> list[Check]:
    firsts = {ranks[0]: host for host, ranks in hosts.items() if 0 not in ranks}
    offsets = measure_clocks(sorted(firsts), _all(subject))
    found.figures["clocks"] = {firsts[rank]: offset._asdict() for rank, offset in offsets.items()}
    return [judge_clocks({firsts[rank]: offset for rank, offset in offsets.items()})] if firsts else []


def _output(subject: Subject, hosts: list[str], found: Examination) -> list[Check]:
    recipe = subject.recipe
    if recipe is None or subject.sizes is None:
        return []
    num_bytes, ranks = checkpoint_bytes(recipe), len(hosts)
    folder = Path(recipe.train.output)
    written = measure_output(folder, ceil(num_bytes / ranks), _all(subject))
    found.figures["output"] = {"checkpoint_bytes": num_bytes, "written": [asdict(one) for one in written]}
    return judge_output(folder, written, hosts, num_bytes, recipe.checkpoint.keep, recipe.watchdog.checkpoint)


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of a checkpoint, of FP32 weights and two moments of each: what is larger or smaller than that is little."""
    elements = sum(spec.num_elements for spec in parameter_table(recipe.model).values())
    return (1 + len(AdamW.names)) * elements * (8 if recipe.precision.compute == "fp64" else 4)


def _memory(subject: Subject, places: list[Place], hosts: dict[str, list[int]]) -> list[Check]:
    """Memory of hosts and GPUs against what the recipe takes there."""
    free = {host: min(p.memory[0] for p in places if p.rank in ranks and p.memory) for host, ranks in hosts.items()
            if any(p.memory for p in places if p.rank in ranks)}  # fmt: skip
    if not free:
        return []
    least = min(free, key=lambda host: free[host])
    found, need = f"{human_bytes(free[least])} free on {least}", 0
    if subject.recipe is not None and subject.sizes is not None:
        need = max(
            need_of_host(subject.recipe, subject.sizes, ranks, subject.device).likely for ranks in hosts.values()
        )
    wanted = f"{human_bytes(need)}, of which activations are estimated" if need else ""
    return [check("host memory", found, free[least] >= need, "fewer ranks a host, or recomputation", wanted=wanted)]


def _network(subject: Subject, hosts: dict[str, list[int]], found: Examination) -> list[Check]:
    world = subject.context.world
    if world.size == 1:
        return []
    names, ends = [*hosts], [ranks[0] for ranks in hosts.values()]
    if len(hosts) == 1 and subject.device.type == "cuda":
        ends = list(range(min(world.size, MOST_ENDS)))
        names = [f"rank {rank}" for rank in ends]
    all_reduced = measure_all_reduce(world, subject.device)
    links, checks = dict[Pair, Link](), list[Check]()
    for _ in range(AGAIN if len(ends) > 1 else 0):
        everyone = all_gather_json(
            [[*p, *link] for p, link in measure_links(ends, world, subject.device).items()], _all(subject)
        )
        for a, b, latency, bandwidth in (row for rows in everyone for row in rows):
            best = links.get((a, b), Link(latency, bandwidth))
            links[a, b] = Link(min(best.latency, latency), max(best.bandwidth, bandwidth))
        checks = judge_links(links, names)
        if all(one.verdict == "PASS" for one in checks):
            break
    found.figures |= {"all_reduce_bytes_per_second": all_reduced, "links": [*_rows(links, names)]}
    return [*checks, judge_all_reduce(all_reduced, links, world.size, subject.device.type)]


def _rows(links: dict[Pair, Link], names: list[str]) -> Iterator[dict[str, Any]]:
    for (a, b), link in sorted(links.items()):
        yield {"ends": [names[a], names[b]], "round_trip_seconds": link.latency, "bytes_per_second": link.bandwidth}


def _devices(subject: Subject, places: list[Place], hosts: list[str], found: Examination) -> list[Check]:
    control, device = _all(subject), subject.device
    said = all_gather_json({"kind": kind_of(device), "answers": known_answers(device)}, control)
    kinds = {rank: one["kind"] for rank, one in enumerate(said)}
    speeds = measure_speeds(control, device, places[subject.context.world.rank].local_rank, kinds)
    for rank, row in enumerate(found.figures["ranks"]):
        row |= {"kind": kinds[rank], "answers": said[rank]["answers"], "tflops": speeds.tflops[rank],
                "copy_bytes_per_second": speeds.copied[rank]}  # fmt: skip
    copied = [speed / 1e9 for speed in speeds.copied]
    notable = NOTABLE[device.type]
    return [
        judge_speed("products", speeds.tflops, kinds, hosts, "TFLOP/s", notable=notable),
        judge_speed("copies", copied, kinds, hosts, "GB/s", notable=notable),
        judge_answers([one["answers"] for one in said], kinds, hosts),
    ]
