"""Consecutive blocks of which one tensor is kept: in backward they are run again together."""

from collections.abc import Callable, Sequence

import torch

from megaresnorm.model.block import Block, Opened
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Stream
from megaresnorm.parallel.data_parallel import gathered_weights
from megaresnorm.parallel.remade import read_twice
from megaresnorm.recompute import Keeper, Region


class Span:
    """Blocks that are run again together.

    The kernel that opens the first block's first branch is not run again, and closes the add that the block before has
    left pending: what it stores is the tensor that is kept.

    Args:
        keeper: called for every forward pass that is differentiated: what keeps that tensor. None: it stays on the
            device.
    """

    def __init__(self, blocks: Sequence[Block], keeper: Callable[[], Keeper] | None = None) -> None:
        self.blocks, self.keeper = tuple(blocks), keeper

    def __call__(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last of them.

        Args:
            masks: of these blocks.
        """
        if not torch.is_grad_enabled():
            return self._run(stream, rows, masks)
        with Region(None if self.keeper is None else self.keeper()) as region:

            def begin(opened: Opened) -> Opened:
                x_again = region.keep(opened.x)
                u, u_again = read_twice(opened.u, region.keep)
                region.begin(lambda: self._run_again(lambda: Opened(x_again(), u_again()), rows, masks))
                return Opened(opened.x, u)

            return self._run(stream, rows, masks, begin)

    def _run(
        self,
        stream: Stream,
        rows: SequenceInfo,
        masks: DropoutMasks | None,
        begin: Callable[[Opened], Opened] | None = None,
    ) -> Stream:
        for number, block in enumerate(self.blocks):
            own = None if masks is None else masks.of_blocks(number, 1)
            stream = block(stream, rows, own, begin) if number == 0 else block(stream, rows, own)
        return stream

    def _run_again(self, open_again: Callable[[], Opened], rows: SequenceInfo, masks: DropoutMasks | None) -> None:
        """Without the blocks' hooks: FSDP2's would gather ahead what has had its backward pass."""
        stream: Stream | Opened | None = None
        for number, block in enumerate(self.blocks):
            with gathered_weights(block):  # the first branch's input is made of weights of the first block
                stream = open_again() if stream is None else stream
                stream = block.forward(stream, rows, None if masks is None else masks.of_blocks(number, 1))
