"""Which blocks are recomputed how: the segments of a stage, from the recipe, and a model that is set up by them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple, cast

from megaresnorm.model.block import Block
from megaresnorm.model.branches.ffn import FeedForward
from megaresnorm.model.spans import Span
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.model.transformer import Transformer
from megaresnorm.offload import Offload
from megaresnorm.parallel.remade import Remakes
from megaresnorm.recipe import RecomputeRecipe
from megaresnorm.recompute import Keeper


class Segment(NamedTuple):
    """Consecutive blocks of one policy.

    Attributes:
        policy: as in the recipe; under ``every`` these blocks keep one tensor together. One block of it is ``block``.
    """

    blocks: range
    policy: str


def segments_of(recompute: RecomputeRecipe, blocks: range) -> list[Segment]:
    """The segments of a stage with these blocks, as the recipe names them; not for policy auto."""
    named = {number: some.policy for some in recompute.blocks for number in range(some.first, some.last + 1)}
    policies = [named.get(number, recompute.policy) for number in blocks]
    return list(_segments(blocks.start, policies, recompute.every))


def _segments(first: int, policies: Sequence[str], every: int | None) -> Iterator[Segment]:
    start = 0
    for i in range(1, len(policies) + 1):
        full = every is not None and policies[start] == "every" and i - start == every
        if i == len(policies) or policies[i] != policies[start] or full:
            alone = policies[start] == "every" and i - start == 1
            yield Segment(range(first + start, first + i), "block" if alone else policies[start])
            start = i


def set_up(model: Transformer, segments: Sequence[Segment], offload: Offload | None = None) -> None:
    """Let a stage's blocks recompute as their segments say.

    Args:
        offload: keeps the tensors between spans of blocks; None: they stay on the device.
    """
    keeper = _keepers(model, offload)
    model.runs = {}
    for segment in segments:
        blocks = {number: cast(Block, model.blocks[str(number)]) for number in segment.blocks}
        for block in blocks.values():
            _set_up_block(block, segment.policy)
        if segment.policy not in ("block", "every"):
            model.runs |= blocks
            continue
        together = [segment.blocks] if segment.policy == "every" else [range(n, n + 1) for n in segment.blocks]
        for numbers in together:
            span = [blocks[number] for number in numbers]
            span[0].sublayers[0].remakes = Remakes.TRUNK
            model.runs[numbers.start] = Span(span, keeper(numbers.start))


def _keepers(model: Transformer, offload: Offload | None) -> Callable[[int], Callable[[], Keeper] | None]:
    """What gives a span its keeper, called with the number of the span's first block, in order.

    What a stage receives is in a buffer on the device until its backward pass, and is not copied.
    """
    are_first = chain([True], repeat(False))

    def keeper(block: int) -> Callable[[], Keeper] | None:
        received = block == model.stage.blocks.start and not model.stage.has_embedding
        return None if offload is None or received else partial(offload.begin, first=next(are_first))

    return keeper


def _set_up_block(block: Block, policy: str) -> None:
    light = policy in ("norm", "attention", "ffn", "branch")
    # Of one block that is run again all rows fit; of several they would be most of what is there at a time under tp.
    inner = Remakes.STORED if light else Remakes.ROWS if policy == "block" else Remakes.NOTHING
    for kind, residual in zip(SUBLAYERS, block.sublayers, strict=True):
        residual.reruns = policy in (kind, "branch")
        residual.remakes = inner
        if isinstance(residual.branch, FeedForward):
            residual.branch.remakes_activation = light and not residual.reruns
