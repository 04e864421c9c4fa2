"""Which pipeline stage has which blocks, which rank which stages, and how long ranks wait: plain numbers, no torch."""

from collections.abc import Sequence
from math import ceil


def split_blocks(num_blocks: int, num_stages: int, *, block: float, first: float, last: float) -> list[range]:
    """Consecutive blocks for every stage, such that the most expensive stage is as cheap as can be.

    No block is dropped.

    Args:
        block: cost of one block.
        first: cost of what the first stage has beside blocks. A stage without blocks is possible at the ends only
            where this outweighs one block.
        last: the same of the last stage.

    >>> split_blocks(10, 4, block=1.0, first=0.0, last=2.0)
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    counts = [0] * num_stages
    for _ in range(num_blocks):  # every block to where it hurts least; the earliest of equals
        counts[min(range(num_stages), key=lambda i: (extra[i] + (counts[i] + 1) * block, i))] += 1
    return stage_ranges(counts)


def stage_ranges(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stages_of_rank(rank: int, pp: int, num_stages: int) -> list[int]:
    """The numbers of the stages that a rank of the pipeline has: every pp-th."""
    return list(range(rank, num_stages, pp))


def bubble(pp: int, num_microbatches: int, stages_per_rank: int = 1) -> float:
    """The share of a step in which a rank waits, if all stages cost the same and sending is free.

    It is (p - 1) / (v m + p - 1) for p ranks with v stages each and m microbatches.

    Source:
        Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    return (pp - 1) / (stages_per_rank * num_microbatches + pp - 1)


def smallest_batch(count: int, pp: int, schedule: str) -> int:
    """The least number of microbatches, at least ``count``, that torch's schedule accepts.

    >>> smallest_batch(1, 4, "gpipe"), smallest_batch(1, 4, "1f1b"), smallest_batch(4, 4, "interleaved")
    (1, 4, 4)
    >>> smallest_batch(9, 4, "interleaved")  # two rounds
    10
    """
    if schedule == "gpipe":
        return count
    batch = max(count, pp)
    while schedule == "interleaved" and batch % (batch // pp):  # equal rounds of at least pp
        batch += 1
    return batch


def most_under_way(number: int, num_stages: int, pp: int, num_microbatches: int, schedule: str) -> int:
    """Most microbatches that a stage has begun and not ended.

    Source:
        Narayanan et al., arXiv:2104.04473, section 2.2.

    >>> [most_under_way(stage, 4, 4, 16, "1f1b") for stage in range(4)]
    [4, 3, 2, 1]
    """
    if pp == 1:
        return 1
    if schedule == "interleaved":  # a rank runs ahead by 2 (pp - rank - 1) passes and all rounds of its stages but one
        rounds = num_stages // pp
        return min(num_microbatches, ceil((2 * (pp - number % pp - 1) + (rounds - 1) * pp + 1) / rounds))
    return num_microbatches if schedule == "gpipe" else min(num_microbatches, pp - number)
