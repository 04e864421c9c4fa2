"""Which rank the others wait for, told from what is seen of all of them.

A rank that is stopped or gone; else where the waits lead: from a rank in a collective to those of its axis that have
not begun it, and from a stage to its neighbour. Where waits are not told (torch's own sums of gradients), the rank that
is farthest behind; where that is the same for all, the minority of innermost frames (ByteRobust, arXiv:2509.16293,
section 4: ranks are grouped by their stacks, and the outliers are suspects).
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megaresnorm.resilience.beats import ACTIVATIONS, GRADIENTS, PHASE, PLACE, STEP, Phase, Wait
from megaresnorm.resilience.sights import Sight

# Frames in which a thread waits for others; of those that are not told.
_WAITS = re.compile(
    r"^(wait|_wait\w*|all_reduce\w*|all_gather\w*|reduce_scatter\w*|all_to_all\w*|broadcast\w*|barrier|synchronize|"
    r"monitored_barrier|recv|send|connect|agree|wait_for_\w+|_meet\w*|init_process_group|new_group) \("
    r"(?!threading\.py|subprocess\.py|selectors\.py)"
)
_LAYOUT = {  # axis -> which of pp, dp_replicate, dp_shard, tp its ranks differ in
    "pp": (0,), "dp_replicate": (1,), "dp_shard": (2,), "tp": (3,), "dp": (1, 2), "model_shards": (2, 3),
    "world": (0, 1, 2, 3), "control": (0, 1, 2, 3), "embedding": (0,),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """Who is named.

    Attributes:
        ranks: the one that the others wait for; several where that cannot be told, or several are to blame alike.
        unreachable: whether nothing is seen of these ranks.
        in_time: whether all of them are within the time that they have, or at one is a debugger: then there is no hang.
        unborn: whether their processes have not come so far as to say what they are at.
    """

    ranks: tuple[int, ...]
    unreachable: bool = False
    in_time: bool = False
    unborn: bool = False


def members(axis: str, rank: int, sizes: Sequence[int]) -> list[int]:
    """Ranks of an axis's group, with ``rank`` among them.

    Args:
        sizes: pp, dp_replicate, dp_shard, tp.
    """
    strides = [prod(sizes[dim + 1 :]) for dim in range(4)]
    found, free = [0], _LAYOUT[axis]
    for dim, (stride, size) in enumerate(zip(strides, sizes, strict=True)):
        if dim not in free:
            values: Sequence[int] = [rank // stride % size]
        elif axis == "embedding":
            values = [0, size - 1]
        else:
            values = range(size)
        found = [start + stride * value for start in found for value in values]
    return sorted(set(found))


def waits_for(sight: Sight, sights: Mapping[int, Sight]) -> list[int]:
    """Ranks for which a rank waits, as far as that is told; those of which nothing is seen are among them.

    Empty where it waits for nobody, or where all have come.
    """
    wait = sight.beat.waits
    if sight.writes_too_long:
        wait = sight.beat.waits_over_control
    if wait is None:
        return []
    group = members(wait.axis, sight.rank, sight.beat.sizes)
    if wait.is_message:
        return _neighbours(wait, group, sight.rank)
    behind = [r for r in group if r != sight.rank and r in sights and sights[r].beat.count(wait.axis) < wait.sequence]
    return behind or [r for r in group if r not in sights]


def _neighbours(wait: Wait, group: Sequence[int], rank: int) -> list[int]:
    place = group.index(rank)
    before, after = group[place - 1], group[(place + 1) % len(group)]
    return [before] if wait.operation == ACTIVATIONS else [after] if wait.operation == GRADIENTS else [after, before]


def judge(sights: Mapping[int, Sight], silent: Collection[int] = ()) -> Verdict:
    """Whom the others wait for.

    Args:
        sights: what is seen, by rank.
        silent: ranks of which nothing is seen though their nodes were asked. Where no wait leads to some of them, but
            torch's own sums may, all are named.
    """
    if debugged := tuple(sorted(rank for rank, sight in sights.items() if sight.is_debugged)):
        return Verdict(debugged, in_time=True)
    dead = tuple(sorted(rank for rank, sight in sights.items() if sight.is_dead))
    if dead:
        return Verdict(dead)
    # What nobody waits for cannot hold anybody up: only from those whose time is up the waits are followed.
    starts = [rank for rank, sight in sights.items() if sight.is_overdue]
    ends = _ends(starts, sights)
    unseen = tuple(sorted([rank for rank in ends if rank not in sights] or silent))
    if unseen:
        return Verdict(unseen, unreachable=True)
    suspects = _farthest_behind([sights[rank] for rank in sorted(ends)])
    ranks = tuple(sorted(sight.rank for sight in suspects))
    return Verdict(ranks, in_time=not any(s.is_overdue for s in suspects) or _others_are_behind(suspects, sights))


def _others_are_behind(suspects: Sequence[Sight], sights: Mapping[int, Sight]) -> bool:
    """Whether a rank that is within its time is behind all of these: they may wait for it, though that is not told."""
    first = min(_progress(sight) for sight in suspects)
    return not any(sight.writes_too_long for sight in suspects) and any(
        _progress(sight) < first and sight.beat.waits is None and not _waits_untold(sight)
        for sight in sights.values()
        if not sight.is_overdue and sight.beat.words[PHASE] != Phase.REST
    )


def _ends(starts: Sequence[int], sights: Mapping[int, Sight]) -> set[int]:
    """Where the waits lead that begin at some ranks; all that are met, where they lead round in a circle."""
    met, ends, left = set[int](), set[int](), list(starts)
    while left:
        rank = left.pop()
        if rank in met:
            continue
        met.add(rank)
        following = waits_for(sights[rank], sights) if rank in sights else []
        left += following
        if not following:
            ends.add(rank)
    return ends or met


def _farthest_behind(sights: Sequence[Sight]) -> Sequence[Sight]:
    """Those who are farthest behind of ranks of which nobody is seen to wait for another."""
    working = [s for s in sights if s.beat.waits is None and not s.writes_too_long] or list(sights)
    idle = [s for s in working if not _waits_untold(s)] or working
    if len(idle) > 1:
        first = min(_progress(sight) for sight in idle)
        idle = [sight for sight in idle if _progress(sight) == first]
    return _minority(idle)


def _waits_untold(sight: Sight) -> bool:
    return any(_WAITS.match(frame) for frame in sight.stack[:2])


def _progress(sight: Sight) -> tuple[int, ...]:
    words, phase = sight.beat.words, sight.beat.words[PHASE]
    later = phase in (Phase.EVALUATION, Phase.SAVE, Phase.CLOSING, Phase.METRICS)
    return words[STEP], later, 0 if phase == Phase.METRICS else phase, words[PLACE]


def _minority(sights: Sequence[Sight]) -> Sequence[Sight]:
    """Those whose innermost frames are rarest; all where that tells nothing."""
    groups = Counter(sight.stack[:1] for sight in sights)
    if len(groups) < 2 or len(sights) < 3:
        return sights
    rarest, most = min(groups.values()), max(groups.values())
    return sights if rarest == most else [s for s in sights if groups[s.stack[:1]] == rarest]
