"""Which blocks are recomputed how: the segments of a stage, from the recipe, and a model that is set up by them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple

from megaresnorm.model.block import Block
from megaresnorm.model.branches.ffn import FeedForward
from megaresnorm.model.spans import Span
from megaresnorm.model.transformer import Transformer
from megaresnorm.offload import Offload
from megaresnorm.parallel.remade import Remakes
from megaresnorm.recipe import RecomputeRecipe
from megaresnorm.recompute import Keeper


class Segment(NamedTuple):
    """Consecutive blocks of one policy.

    Attributes:
        policy: as in the recipe; under ``every`` these blocks keep one tensor together.
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
            yield Segment(range(first + start, first + i), policies[start])
            start = i


def set_up(model: Transformer, segments: Sequence[Segment], offload: Offload | None = None) -> None:
    """Let a stage's blocks recompute as their segments say.

    Args:
        offload: keeps the tensors between spans of blocks; None: they stay on the device.
    """
    keeper = _keepers(model, offload)
    model.runs = {}
    for segment in segments:
        blocks = {number: model.blocks[str(number)] for number in segment.blocks}
        for number, block in blocks.items():
            assert isinstance(block, Block)
            _set_up_block(block, segment.policy)
            model.runs[number] = block
        if segment.policy == "block":
            model.runs |= {number: Span([block], keeper(number)) for number, block in blocks.items()}  # type: ignore[list-item]
        elif segment.policy == "every":
            for number in segment.blocks[1:]:
                del model.runs[number]
            first = segment.blocks.start
            model.runs[first] = Span(list(blocks.values()), keeper(first))  # type: ignore[arg-type]
        if segment.policy in ("block", "every"):
            for number in segment.blocks if segment.policy == "block" else segment.blocks[:1]:
                blocks[number].sublayers[0].remakes = Remakes.TRUNK  # type: ignore[union-attr,index]


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
    for kind, residual in block.named_children():
        residual.reruns = policy in (kind, "branch")  # type: ignore[assignment]
        residual.remakes = inner  # type: ignore[assignment]
        if isinstance(residual.branch, FeedForward):
            residual.branch.remakes_activation = light and not residual.reruns
