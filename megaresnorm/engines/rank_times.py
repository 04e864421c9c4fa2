"""How long each rank works in a step, and who keeps the others waiting.

A step lasts as long on all ranks. What differs is how much of it a rank spends at work of its own, in reading samples
and in its passes, rather than in waiting for others: a rank that works longer than its like is what they wait for.
"""

import logging
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.engines.engine import Engine
from megaresnorm.model.stream import Stream
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import host_name
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.resilience.beats import READ, SECOND, WAITED, Beats
from megaresnorm.telemetry.incidents import Incidents
from megaresnorm.telemetry.wrapped import Wrapped

log = logging.getLogger(__name__)

EVERY = 10  # steps that are summed up before ranks tell each other
SLOW = 1.25  # times what the others take: the mean of ten steps that scatter by a fifth stays below it
SHARE = 0.05  # of a step, which the difference must be at least
LEAST = 0.005  # seconds of a step, likewise: what else the host does takes a rank for as long
SMALL = 0.02  # seconds: a smaller difference takes one sum more before it counts
IN_A_ROW = 2  # such sums before a rank is named
KNOWN = 20  # sums of a rank that it is compared with, too: of stages none is like another


class Times(NamedTuple):
    """Seconds of one rank in some steps.

    Attributes:
        step: from begin to end.
        data: of these, reading samples or waiting for them to be read.
        own: of these, work of its own, with data.
    """

    step: float
    data: float
    own: float


class Straggler(NamedTuple):
    """A rank that keeps others waiting, or a host all of whose ranks do.

    Attributes:
        rank: of all; of a host the slowest.
        times: what it takes, in times what the others take.
        reads: whether most of it is reading samples.
        host: its node.
        ranks: all of the host; empty where the rank alone is slow.
    """

    rank: int
    times: float
    reads: bool
    host: str = ""
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        work = "read its samples" if self.reads else "do its share of a step"
        whole = f"all {len(self.ranks)} ranks on {self.host} are slow: " if self.ranks else ""
        return f"{whole}rank {self.rank} on {self.host} takes {self.times:.1f} times as long as others to {work}"


class RankTimes:
    """Sums up the times of ranks, and finds one that is slow.

    Args:
        beats: of this rank, where its waits are summed up.
        incidents: where a slow rank is noted.
        waited: is told how many seconds of the last steps the mean rank has waited for the slowest.

    Attributes:
        means: of each rank in the last ``EVERY`` steps; empty before.

    Communication:
        Making it: one ``all_gather_json`` of names of hosts over ``control``.
    """

    def __init__(
        self,
        context: ParallelContext,
        engine: Engine,
        beats: Beats,
        incidents: Incidents,
        waited: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._context, self._beats, self._device = context, beats, engine.assembled.device
        self._incidents, self._tell_waited = incidents, waited
        self._before = self._words()
        self._clear()
        self._down: float | None = None  # when backward has come to the embedding, and what had been waited until then
        self._waited_down = 0
        self._judge = Judge(_stages(context), all_gather_json(host_name(), context.control))
        self.means: list[Times] = []
        self._engine = engine

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the backward passes of the steps that are made within, where ranks wait inside them.

        DDP does, once backward has come to the embedding, and nothing of ours is called there.
        """
        context, engine = self._context, self._engine
        with Wrapped() as wrapped:
            if context.dp_replicate.size > 1 and context.pp.size == 1 and not engine.gathers_weights:
                for model in engine.assembled.models.values():
                    if model.embedding is not None:
                        wrapped.method(model, "embed", self._around_embed)
                wrapped.method(engine.policy, "sum_up", self._around_sum)
            yield

    def _around_embed(self, embed: Callable) -> Callable:
        def watched(*given: object) -> Stream:
            stream = embed(*given)
            if stream.x.requires_grad:
                stream.x.register_hook(self._came_down)
            return stream

        return watched

    def _came_down(self, gradient: Tensor) -> None:
        self._down, self._waited_down = time.perf_counter(), self._beats.own[WAITED]

    def _around_sum(self, sum_up: Callable) -> Callable:
        def watched(*given: object, **options: object) -> object:
            if self._down is not None:
                waited = (self._beats.own[WAITED] - self._waited_down) / SECOND
                self._after += max(0.0, time.perf_counter() - self._down - waited)
                self._down = None
            return sum_up(*given, **options)

        return watched

    def begin_step(self) -> None:
        """What is waited for between steps, in evaluations and checkpoints, is none of theirs."""
        self._before = self._words()

    def begin_anew(self) -> None:
        """Forget the steps that are not told yet: the run has gone back, or steps were left out."""
        self._clear()
        self.means = []

    def _clear(self) -> None:
        self._steps, self._seconds, self._read, self._waited, self._after = 0, 0.0, 0.0, 0.0, 0.0

    def _words(self) -> tuple[int, int]:
        return self._beats.own[READ], self._beats.own[WAITED]

    def step(self, seconds: float) -> list[Straggler]:
        """Add a step. Collective every ``EVERY`` steps.

        Args:
            seconds: that it took.

        Returns:
            Ranks and hosts that have been slow for a while; the same on all ranks.

        Communication:
            Every ``EVERY`` steps one all-gather of 24 bytes over all ranks.
        """
        if self._context.world.size == 1:
            return []
        self._steps += 1
        self._seconds += seconds
        read, waited = (now - before for now, before in zip(self._words(), self._before, strict=True))
        self._read, self._waited = self._read + read / SECOND, self._waited + waited / SECOND
        if self._steps < EVERY:
            return []
        own = self._seconds - self._waited - self._after
        mine = [self._seconds, self._read, max(0.0, own)]
        told = torch.tensor(mine, dtype=torch.float64, device=self._device) / self._steps
        self.means = [Times(*one) for one in all_gather_blocks(told, self._context.world).tolist()]
        self._clear()
        return self._judge.look(self.means)

    def record(self, step: int, seconds: float) -> dict[str, float | None]:
        """Add a step, as ``step``, and name ranks and hosts that keep the others waiting.

        Args:
            step: its number, counted from 1.
            seconds: that it took.

        Returns:
            Every ``EVERY`` steps, for the metrics: of the mean rank the seconds of a step that it waits for the
            slowest, which one that is, and the most that any takes for samples.
        """
        found = self.step(seconds)
        own = [one.own for one in self.means]
        for slow in found:
            log.warning("warning: step %d: %s", step, slow)
            about = {"times": round(slow.times, 3), "own_seconds": [round(one, 4) for one in own]}
            about |= {"ranks": [*slow.ranks]} if slow.ranks else {}
            self._incidents.note("straggler", step, str(slow), rank=slow.rank, host=slow.host, **about)
        if self._steps or not own:
            return {}
        waiting = max(own) - sum(own) / len(own)
        self._tell_waited(EVERY * waiting)
        return {"waiting": waiting, "slowest_rank": own.index(max(own)), "data": max(one.data for one in self.means)}


class Judge:
    """Finds ranks that are slow, from the times of all.

    A rank is compared with the others of its stage, and with what it took before, since stages differ. Each counts for
    itself, so that those that are slow together are found together.

    Args:
        stages: of each rank, which stage of the pipeline it has.
        hosts: of each rank, its node.
    """

    def __init__(self, stages: Sequence[int], hosts: Sequence[str] | None = None) -> None:
        self._stages, self._hosts = stages, hosts or [""] * len(stages)
        self._known: list[deque[float]] = [deque(maxlen=KNOWN) for _ in stages]
        self._in_a_row = [0] * len(stages)
        self._said: set[int] = set()

    def look(self, means: Sequence[Times]) -> list[Straggler]:
        """Judge one more sum.

        Returns:
            Ranks that have been slow ``IN_A_ROW`` times, or once more where it is little; a host in the place of its
            ranks where all are. Each is named once, until it is no longer slow.
        """
        own = [one.own for one in means]
        times = [max(each) for each in zip(self._beside(own), self._before(own), strict=True)]
        slow: dict[int, Straggler] = {}
        for rank, mean in enumerate(means):
            more = mean.own * (1.0 - 1.0 / times[rank]) if times[rank] > 1.0 else 0.0
            if times[rank] < SLOW or more < max(SHARE * mean.step, LEAST):
                self._in_a_row[rank] = 0
                self._known[rank].append(mean.own)
                continue
            self._in_a_row[rank] += 1
            if self._in_a_row[rank] >= IN_A_ROW + (more < SMALL):
                slow[rank] = Straggler(rank, times[rank], mean.data > 0.5 * more, self._hosts[rank])
        new, self._said = slow.keys() - self._said, self._said & {r for r, n in enumerate(self._in_a_row) if n}
        self._said |= new
        return self._by_host(slow, new)

    def _by_host(self, slow: Mapping[int, Straggler], new: Set[int]) -> list[Straggler]:
        """Those of ``slow`` that are new; those of a host as one where all of its ranks are slow."""
        found = []
        for host in dict.fromkeys(self._hosts[rank] for rank in sorted(new)):
            ranks = tuple(rank for rank, its in enumerate(self._hosts) if its == host)
            if len(ranks) > 1 and all(rank in slow for rank in ranks):
                found.append(max((slow[rank] for rank in ranks), key=lambda one: one.times)._replace(ranks=ranks))
            else:
                found += [slow[rank] for rank in ranks if rank in new]
        return found

    def _beside(self, own: Sequence[float]) -> list[float]:
        """How many times what its like take, each rank takes; 1 where there are none."""
        found = [1.0] * len(own)
        for stage in set(self._stages):
            ranks = [rank for rank, its in enumerate(self._stages) if its == stage]
            if len(ranks) > 1:
                others = medians_of_others([own[rank] for rank in ranks])
                for rank, other in zip(ranks, others, strict=True):
                    found[rank] = own[rank] / max(other, 1e-9)
        return found

    def _before(self, own: Sequence[float]) -> list[float]:
        """How many times what it took before, in times what the others take of theirs; 1 while little is known."""
        if len(own) < 2 or min(map(len, self._known)) < 3:
            return [1.0] * len(own)
        changes = [o / max(median(known), 1e-9) for o, known in zip(own, self._known, strict=True)]
        others = medians_of_others(changes)
        return [change / max(other, 1e-9) for change, other in zip(changes, others, strict=True)]


def medians_of_others(values: Sequence[float]) -> list[float]:
    """For each of two or more values, the median of all others; in n log n steps.

    >>> medians_of_others([1.0, 2.0, 9.0, 4.0])
    [4.0, 4.0, 2.0, 2.0]
    """
    ordered, count = sorted(values), len(values) - 1
    middle = ((count - 1) // 2, count // 2)
    found = []
    for value in values:
        without = bisect_left(ordered, value)
        low, high = (ordered[place + (place >= without)] for place in middle)
        found.append((low + high) / 2)
    return found


def _stages(context: ParallelContext) -> list[int]:
    """The stage of each rank: pp is the outermost axis."""
    per_stage = context.world.size // context.pp.size
    return [rank // per_stage for rank in range(context.world.size)]
