"""How long each rank works in a step, and who keeps the others waiting.

A step lasts as long on all ranks. What differs is how much of it a rank spends at work of its own, in reading samples
and in its passes, rather than in waiting for others: a rank that works longer than its like is what they wait for.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
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
    """A rank that keeps others waiting.

    Attributes:
        rank: of all.
        times: what it takes, in times what the others take.
        reads: whether most of it is reading samples.
        host: its node.
    """

    rank: int
    times: float
    reads: bool
    host: str = ""

    def __str__(self) -> str:
        work = "read its samples" if self.reads else "do its share of a step"
        return f"rank {self.rank} on {self.host} takes {self.times:.1f} times as long as others to {work}"


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
        self._steps, self._seconds, self._after = 0, 0.0, 0.0
        self._down: float | None = None  # when backward has come to the embedding, and what had been waited until then
        self._waited_down = 0
        self._judge = Judge(_stages(context))
        self._hosts = all_gather_json(host_name(), context.control)
        self.means: list[Times] = []
        self._wrapped = Wrapped()
        if context.dp_replicate.size > 1 and context.pp.size == 1 and not engine.gathers_weights:
            self._watch_backward(engine)

    def _watch_backward(self, engine: Engine) -> None:
        """DDP waits inside backward, once that has come to the embedding, where nothing of ours is called."""
        for model in engine.assembled.models.values():
            if model.embedding is not None:
                self._wrapped.method(model, "embed", self._around_embed)
        self._wrapped.method(engine.policy, "sum_up", self._around_sum)

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

    def _words(self) -> tuple[int, int]:
        return self._beats.own[READ], self._beats.own[WAITED]

    def step(self, seconds: float) -> Straggler | None:
        """Add a step. Collective every ``EVERY`` steps.

        Args:
            seconds: that it took.

        Returns:
            A rank that is slow, when it has been so for a while; the same on all ranks.

        Communication:
            Every ``EVERY`` steps one all-gather of 24 bytes over all ranks.
        """
        if self._context.world.size == 1:
            return None
        self._steps += 1
        self._seconds += seconds
        if self._steps < EVERY:
            return None
        read, waited = (now - before for now, before in zip(self._words(), self._before, strict=True))
        own = self._seconds - waited / SECOND - self._after
        mine = [self._seconds, read / SECOND, max(0.0, own)]
        told = torch.tensor(mine, dtype=torch.float64, device=self._device) / self._steps
        self.means = [Times(*one) for one in all_gather_blocks(told, self._context.world).tolist()]
        self._steps, self._seconds, self._after, self._before = 0, 0.0, 0.0, self._words()
        found = self._judge.look(self.means)
        return None if found is None else found._replace(host=self._hosts[found.rank])

    def record(self, step: int, seconds: float) -> dict[str, float | None]:
        """Add a step, as ``step``, and name a rank that keeps the others waiting.

        Args:
            step: its number, counted from 1.
            seconds: that it took.

        Returns:
            Every ``EVERY`` steps, for the metrics: of the mean rank the seconds of a step that it waits for the
            slowest, which one that is, and the most that any takes for samples.
        """
        slow = self.step(seconds)
        own = [one.own for one in self.means]
        if slow is not None:
            log.warning("warning: step %d: %s", step, slow)
            about = {"times": round(slow.times, 3), "own_seconds": [round(one, 4) for one in own]}
            self._incidents.note("straggler", step, str(slow), rank=slow.rank, host=slow.host, **about)
        if self._steps or not own:
            return {}
        waiting = max(own) - sum(own) / len(own)
        self._tell_waited(EVERY * waiting)
        return {"waiting": waiting, "slowest_rank": own.index(max(own)), "data": max(one.data for one in self.means)}


class Judge:
    """Finds the rank that is slow, from the times of all.

    A rank is compared with the others of its stage, and with what it took before, since stages differ.

    Args:
        stages: of each rank, which stage of the pipeline it has.
    """

    def __init__(self, stages: list[int]) -> None:
        self._stages = stages
        self._known: list[deque[float]] = [deque(maxlen=KNOWN) for _ in stages]
        self._suspect, self._times, self._said = -1, 0, -1

    def look(self, means: list[Times]) -> Straggler | None:
        """Judge one more sum.

        Returns:
            A rank that has been slow ``IN_A_ROW`` times; once, until another rank is, or none.
        """
        own = [one.own for one in means]
        slowest = max(range(len(own)), key=lambda rank: max(self._beside(rank, own), self._before(rank, own)))
        times = max(self._beside(slowest, own), self._before(slowest, own))
        more = own[slowest] * (1.0 - 1.0 / times) if times > 1.0 else 0.0
        if times < SLOW or more < SHARE * means[slowest].step:
            self._suspect, self._times, self._said = -1, 0, -1
            for rank, seconds in enumerate(own):
                self._known[rank].append(seconds)
            return None
        self._times = self._times + 1 if slowest == self._suspect else 1
        self._suspect = slowest
        if self._times < IN_A_ROW or self._said == slowest:
            return None
        self._said = slowest
        return Straggler(slowest, times, means[slowest].data > 0.5 * more)

    def _beside(self, rank: int, own: list[float]) -> float:
        """How many times what its like take, a rank takes; 1 where there are none."""
        like = [o for r, o in enumerate(own) if r != rank and self._stages[r] == self._stages[rank]]
        return own[rank] / max(median(like), 1e-9) if like else 1.0

    def _before(self, rank: int, own: list[float]) -> float:
        """How many times what it took before, in times what the others take of theirs; 1 while little is known."""
        if len(self._known[rank]) < 3 or len(own) < 2:
            return 1.0
        changes = [o / max(median(known), 1e-9) for o, known in zip(own, self._known, strict=True)]
        return changes[rank] / max(median(changes[:rank] + changes[rank + 1 :]), 1e-9)


def _stages(context: ParallelContext) -> list[int]:
    """The stage of each rank: pp is the outermost axis."""
    per_stage = context.world.size // context.pp.size
    return [rank // per_stage for rank in range(context.world.size)]
