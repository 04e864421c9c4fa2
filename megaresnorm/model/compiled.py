"""torch.compile of a model's blocks: which ones are one graph, and when it is used.

Equal blocks share their code. For that all that differs between them reaches a block as a tensor (weights, their BF16
copies, the keys of dropout masks); only a topology's constants are compiled in.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import nn

from megaresnorm.model.block import Block
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS, residual_at
from megaresnorm.recipe import ModelRecipe

# A call of compiled code costs a CPU what a small matrix product does, and compiling takes longer the more blocks are
# one graph: at width 64, 8 blocks together were 12 % faster than one by one, 20 no faster than 8.
TOGETHER = 8


class BlockRun(nn.Module):
    """Consecutive blocks as one function to compile."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last of them."""
        for number, block in enumerate(self.blocks):
            stream = block(stream, rows, None if masks is None else masks.of_blocks(number, 1))
        return stream


class CompiledBlocks:
    """A model's blocks compiled, for training passes over batches of one shape: the first one's.

    Whatever else runs through the blocks (evaluation, generation, the smaller last batch) is left to them as they are,
    since each shape would be minutes of compiling.

    Args:
        blocks: by their global number.
        together: blocks in one graph, at most.
    """

    def __init__(self, recipe: ModelRecipe, blocks: dict[int, Block], together: int) -> None:
        self.runs: dict[int, BlockRun] = {}
        for numbers in equal_runs(recipe, list(blocks), together):
            run = BlockRun([blocks[number] for number in numbers])
            run.compile(fullgraph=True, dynamic=False)
            self.runs[numbers[0]] = run
        self._shape: tuple[int, int] | None = None

    def take(self, rows: SequenceInfo) -> bool:
        """Whether this pass is theirs; the first one in training decides on the shape."""
        if rows.cache is not None or not torch.is_grad_enabled():
            return False
        self._shape = self._shape or (rows.batch, rows.seq)
        return self._shape == (rows.batch, rows.seq)

    def __call__(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last block."""
        for first, run in self.runs.items():
            stream = run(stream, rows, None if masks is None else masks.of_blocks(first, len(run.blocks)))
        return stream


def num_kinds(recipe: ModelRecipe) -> int:
    """Number of different blocks in a model: each is code of its own."""
    return len({_wiring(recipe, block) for block in range(recipe.num_blocks)})


def equal_runs(recipe: ModelRecipe, blocks: Sequence[int], together: int) -> list[list[int]]:
    """Consecutive equal blocks in lists of at most ``together``, all of one length where that is possible."""
    found: list[list[int]] = []
    for _, group in groupby(blocks, key=lambda block: _wiring(recipe, block)):
        same = list(group)
        lengths = range(min(together, len(same)), max(1, together // 2), -1)
        length = min(lengths, key=lambda n: -len(same) % n, default=together)
        found += [same[i : i + length] for i in range(0, len(same), length)]
    return found


def _wiring(recipe: ModelRecipe, block: int) -> tuple[str, ...]:
    """What of the residual connections of a block is compiled in."""
    specs = (residual_at(recipe, block, kind) for kind in SUBLAYERS)
    return tuple(
        repr((s.norm_in, s.norm_in_scale, s.norm_inner, s.norm_branch, s.norm_out, s.alpha, s.gate)) for s in specs
    )
