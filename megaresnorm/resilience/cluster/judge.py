"""Which host, link or device stands out among its siblings: pure functions of what was measured."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import NamedTuple

Pair = tuple[int, int]
SLOW = 0.5  # share of the median below which a host or link is slow
NOTABLE = {"cpu": 0.7, "cuda": 0.85}  # the same for a device that is worth a look; other programs share CPUs


def rounds(count: int) -> Iterator[list[Pair]]:
    """All pairs of ``count`` ends in rounds in which no end occurs twice, as in a round-robin tournament.

    The circle method: the first stays, the others move on by one place (Kirkman 1847). There are count - 1 rounds, or
    count where that is odd.

    >>> list(rounds(4))
    [[(0, 3), (1, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    ends: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    half = len(ends) // 2
    for _ in range(len(ends) - 1):
        pairs = zip(ends[:half], reversed(ends[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        ends = [ends[0], ends[-1], *ends[1:-1]]


class SlowLinks(NamedTuple):
    """What stands out among links.

    Attributes:
        ends: slow on all of their links, each with the median speed of these.
        links: slow ones between other ends, each with its speed.
        usual: median speed of what does not stand out.
    """

    ends: dict[int, float]
    links: dict[Pair, float]
    usual: float


def slow_links(speeds: Mapping[Pair, float], share: float = SLOW) -> SlowLinks:
    """Which ends are slow to all others, and which links are slow that join ends which are not.

    An end counts by its fastest link: one slow partner does not make it slow. Two ends have one link, and nothing to
    compare it with.

    Args:
        speeds: of each link; higher is better.
        share: of the median, below which something is slow.
    """
    best: dict[int, float] = {}
    for pair, speed in speeds.items():
        for end in pair:
            best[end] = max(best.get(end, 0.0), speed)
    if len(best) < 3:
        return SlowLinks({}, {}, median(speeds.values()) if speeds else 0.0)
    slow = [end for end, speed in best.items() if speed < share * median(best.values())]
    ends = {end: median(speed for pair, speed in speeds.items() if end in pair) for end in slow}
    others = {pair: speed for pair, speed in speeds.items() if not set(pair) & set(slow)}
    usual = median(others.values()) if others else median(best.values())
    return SlowLinks(ends, {pair: speed for pair, speed in others.items() if speed < share * usual}, usual)


def shares_of_siblings(speeds: Mapping[int, float], kinds: Mapping[int, str]) -> dict[int, float]:
    """Speed of each rank as a share of the median of the other ranks of its kind; 1 where there is none.

    >>> shares_of_siblings({0: 10.0, 1: 10.0, 2: 5.0, 3: 1.0}, {0: "a", 1: "a", 2: "a", 3: "b"})
    {0: 1.3333333333333333, 1: 1.3333333333333333, 2: 0.5, 3: 1.0}
    """
    found = {}
    for rank, speed in speeds.items():
        others = [s for r, s in speeds.items() if r != rank and kinds[r] == kinds[rank]]
        found[rank] = speed / median(others) if others else 1.0
    return found


def odd_answers(answers: Mapping[int, Sequence[str]], kinds: Mapping[int, str]) -> tuple[list[int], bool]:
    """Ranks whose answers to the same question differ from those of their kind, or from their own.

    Args:
        answers: distinct digests of each rank; a device that computes rightly has one.

    Returns:
        These ranks, and whether a majority says so; without one they are all ranks of that kind.
    """
    odd, decided = [rank for rank, digests in answers.items() if len(set(digests)) > 1], True
    for kind in dict.fromkeys(kinds.values()):
        of_kind = {r: a[0] for r, a in answers.items() if kinds[r] == kind and r not in odd}
        if len(set(of_kind.values())) < 2:
            continue
        (usual, times), *_ = Counter(of_kind.values()).most_common()
        majority = 2 * times > len(of_kind)
        decided = decided and majority
        odd += [rank for rank, answer in of_kind.items() if answer != usual or not majority]
    return sorted(odd), decided
