"""Recomputation by a budget: which blocks are to be run again so that a rank stays within its memory. Plain numbers.

Blocks of one kind are equal, so this is a knapsack over a few kinds with counts rather than over hundreds of blocks.
Every kind has a ladder of policies, each of which keeps less than the one before and costs more seconds. The steps of
all ladders, sorted by bytes saved per second, are taken one after the other until a rank's memory fits, the last of
them for as few blocks as suffice: a fractional knapsack (Dantzig 1957), with one kind that is mixed. Were it not for
what backward needs beside what is kept, nothing that fits would be faster by more than one block's step.

Early blocks take a step first: their backward pass comes last, when most of what later blocks have kept is gone, so
that what is run again finds room.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil
from typing import NamedTuple

FASTEST = "none"
SPAN = "every"  # whole blocks, of which ``Run.every`` keep one tensor together; a span of one is policy block


class Choice(NamedTuple):
    """What one block takes under a policy, for one microbatch.

    Attributes:
        kept: bytes from forward to backward; of policy ``every`` those that a span keeps.
        working: bytes beyond these in the block's own backward pass.
        seconds: of running again, in any unit. Of ``every`` those of a block that others follow in its span.
        last_seconds: of ``every``: of the last block of a span, whose last products are not repeated.
    """

    kept: int
    working: int
    seconds: float
    last_seconds: float = 0.0


class Group(NamedTuple):
    """Consecutive blocks of one kind.

    Attributes:
        choices: by policy, ``none`` and ``every`` among them.
    """

    blocks: range
    choices: dict[str, Choice]


class Stage(NamedTuple):
    """A pipeline stage.

    Attributes:
        under_way: microbatches that it has begun and not ended, at most.
        ends: bytes that embedding and output matrix keep for each of them.
    """

    groups: tuple[Group, ...]
    under_way: int = 1
    ends: int = 0


class Run(NamedTuple):
    """Consecutive blocks of one policy.

    Attributes:
        group: they belong to it.
        every: of policy ``every``, the blocks of a span.
    """

    blocks: range
    policy: str
    group: Group
    every: int = 1

    @property
    def kept(self) -> int:
        """Bytes that they keep, for one microbatch."""
        return len(self.blocks) // self.every * self.group.choices[self.policy].kept

    @property
    def working(self) -> int:
        """Bytes beyond what is kept when the last of them is in backward, which is the fullest moment."""
        beside = (self.every - 1) * self.group.choices[FASTEST].kept
        return self.group.choices[self.policy].working + beside

    @property
    def seconds(self) -> float:
        """Of running them again, for one microbatch."""
        choice, count = self.group.choices[self.policy], len(self.blocks)
        if self.policy != SPAN:
            return count * choice.seconds
        spans = count // self.every
        return (count - spans) * choice.seconds + spans * choice.last_seconds


Plan = list[list[Run]]  # of every stage of a rank, its blocks in order


class Held(NamedTuple):
    """Bytes of activations of a rank.

    Attributes:
        kept: by all microbatches under way, once all have passed forward.
        peak: at most, in backward.
    """

    kept: int
    peak: int


class TooSmall(Exception):
    """No choice fits.

    Attributes:
        least: bytes that the smallest one needs.
        plan: that one.
    """

    def __init__(self, least: int, plan: Plan) -> None:
        super().__init__(f"at least {least} bytes")
        self.least, self.plan = least, plan


def held(stages: Sequence[Stage], plan: Plan) -> Held:
    """Activations of a rank with these stages, whose fullest backward passes do not coincide.

    >>> group = Group(range(4), {"none": Choice(10, 2, 0.0), "every": Choice(1, 11, 9.0, 8.0)})
    >>> held([Stage((group,))], [[Run(range(2), "every", group, 2), Run(range(2, 4), "none", group)]])
    Held(kept=21, peak=23)
    """
    sums = [stage.ends + sum(run.kept for run in runs) for stage, runs in zip(stages, plan, strict=True)]
    kept = sum(stage.under_way * size for stage, size in zip(stages, sums, strict=True))
    peak = kept
    for stage, runs, size in zip(stages, plan, sums, strict=True):
        here = stage.ends
        for run in runs:
            here += run.kept
            peak = max(peak, kept - size + here + run.working)
    return Held(kept, peak)


def seconds(stages: Sequence[Stage], plan: Plan) -> float:
    """Of running again, for one microbatch of every stage."""
    return sum(run.seconds for runs in plan for run in runs)


def solve(stages: Sequence[Stage], need: Callable[[Held], int], budget: int) -> Plan:
    """The fastest choice that is found to fit; never slower than the fastest that gives all blocks one policy.

    Args:
        stages: of one rank, which share its memory.
        need: activations -> bytes that the rank needs in all.

    Raises:
        TooSmall: nothing fits.

    >>> choices = {"none": Choice(10, 0, 0.0), "norm": Choice(8, 0, 1.0), "every": Choice(1, 9, 9.0, 9.0)}
    >>> stage = Stage((Group(range(10), choices),))
    >>> [(run.blocks, run.policy) for run in solve([stage], lambda held: held.peak, 95)[0]]
    [(range(0, 3), 'norm'), (range(3, 10), 'none')]
    """
    tried: list[tuple[int, Plan]] = []

    def fits(plan: Plan) -> bool:
        tried.append((need(held(stages, plan)), plan))
        return tried[-1][0] <= budget

    found = [plan for plan in _uniform(stages) if fits(plan)]
    if (filled := _filled(stages, fits)) is not None:
        found.insert(0, _with_last_blocks_alone(filled, fits))
    if not found:
        raise TooSmall(*min(tried, key=lambda one: one[0]))
    return min(found, key=lambda plan: seconds(stages, plan))


_Place = tuple[int, int]  # of a stage among a rank's, and of a group in it


class _Taken(NamedTuple):
    """How far a group has gone: so many first blocks under the slower policy, the rest under the faster one."""

    faster: str
    slower: str
    blocks: int = 0
    every: int = 1


def _filled(stages: Sequence[Stage], fits: Callable[[Plan], bool]) -> Plan | None:
    """Steps by bytes saved per second, until it fits; None where it never does."""
    taken = {(s, g): _Taken(FASTEST, FASTEST) for s, stage in enumerate(stages) for g in range(len(stage.groups))}

    def plan(changed: dict[_Place, _Taken]) -> Plan:
        chosen = taken | changed
        return [
            [run for g, group in enumerate(stage.groups) for run in _runs(group, *chosen[s, g])]
            for s, stage in enumerate(stages)
        ]

    if fits(plan({})):
        return plan({})
    steps = [
        (stages[s].under_way * saved / max(cost, 1e-300), -i, place, slower, faster)
        for i, place in enumerate(taken)
        for s, g in [place]
        for faster, slower, saved, cost in _ladder(stages[s].groups[g])
    ]
    for _, _, place, slower, faster in sorted(steps, key=lambda step: step[:2], reverse=True):
        count = len(stages[place[0]].groups[place[1]].blocks)

        def fitting(some: int, step: tuple[_Place, str, str] = (place, faster, slower)) -> Plan | None:
            """With the step taken by the first blocks, in the shortest spans that do."""
            place, faster, slower = step
            for every in _lengths(some) if slower == SPAN else [1]:
                if fits(found := plan({place: _Taken(faster, slower, some, every)})):
                    return found
            return None

        if fitting(count) is not None:
            return fitting(_fewest(count, fitting))
        root = min(_lengths(count), key=lambda every: abs(every**2 - count))
        taken[place] = _Taken(slower, slower, count, root if slower == SPAN else 1)
    return None


def _fewest(enough: int, fitting: Callable[[int], Plan | None]) -> int:
    """The smallest number of blocks that fits, given one that does."""
    few = 0
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if fitting(middle) is not None else (middle, enough)
    return enough


def _ladder(group: Group) -> Iterator[tuple[str, str, int, float]]:
    """Steps (faster policy, slower policy, bytes saved, seconds more), each with a lower rate than the one before."""
    choices = sorted(group.choices, key=lambda policy: (_cost(group, policy), group.choices[policy].kept))
    ladder: list[str] = []
    for policy in choices:
        if ladder and group.choices[policy].kept >= group.choices[ladder[-1]].kept:
            continue
        while len(ladder) > 1 and _rate(group, ladder[-1], policy) >= _rate(group, ladder[-2], ladder[-1]):
            ladder.pop()  # going from the one before it at once is better: the lower hull
        ladder.append(policy)
    for faster, slower in pairwise(ladder):
        saved = group.choices[faster].kept - group.choices[slower].kept
        yield faster, slower, saved, _cost(group, slower) - _cost(group, faster)


def _rate(group: Group, faster: str, slower: str) -> float:
    saved = group.choices[faster].kept - group.choices[slower].kept
    return saved / max(_cost(group, slower) - _cost(group, faster), 1e-300)


def _cost(group: Group, policy: str) -> float:
    return group.choices[policy].last_seconds if policy == SPAN else group.choices[policy].seconds


def _runs(group: Group, faster: str, slower: str, count: int, every: int) -> Iterator[Run]:
    """The first blocks under the slower policy, the rest under the faster one."""
    yield from _spans(group.blocks[:count], slower, group, every)
    if count < len(group.blocks):
        yield Run(group.blocks[count:], faster, group)


def _spans(blocks: range, policy: str, group: Group, every: int) -> Iterator[Run]:
    """Blocks of one policy, whose last span is shorter where they do not divide."""
    rest = len(blocks) % every
    if len(blocks) > rest:
        yield Run(blocks[: len(blocks) - rest], policy, group, every)
    if rest:
        yield Run(blocks[len(blocks) - rest :], policy, group, rest)


def _lengths(count: int) -> list[int]:
    """Lengths of spans that are worth a try: beyond twice the root of their blocks a longer one needs more."""
    return list(range(1, max(2, min(count, 2 * ceil(count**0.5)) + 1)))


def _uniform(stages: Sequence[Stage]) -> Iterator[Plan]:
    """Every policy for all blocks, spans in several lengths."""
    groups = [group for stage in stages for group in stage.groups]
    policies = sorted(set.intersection(*(set(group.choices) for group in groups))) if groups else []
    most = max((len(group.blocks) for group in groups), default=0)
    for policy in policies:
        for every in _lengths(most) if policy == SPAN else [1]:
            yield [
                [run for group in stage.groups for run in _spans(group.blocks, policy, group, every)]
                for stage in stages
            ]


def _with_last_blocks_alone(plan: Plan, fits: Callable[[Plan], bool]) -> Plan:
    """Run no more of the last block again than is needed: its activations are asked for as soon as it has ended."""
    for number, runs in enumerate(plan):
        if not runs:
            continue
        *before, last = runs
        cheaper = sorted(last.group.choices, key=lambda policy: _cost(last.group, policy))
        for policy in cheaper[: cheaper.index(last.policy)]:
            alone = Run(last.blocks[-1:], policy, last.group)
            rest = _spans(last.blocks[:-1], last.policy, last.group, last.every)
            changed = [*plan[:number], [*before, *rest, alone], *plan[number + 1 :]]
            if fits(changed):
                plan = changed
                break
    return plan
