"""Delayed scaling: one scale for a tensor, from the largest numbers of earlier steps."""

import torch
from torch import Tensor

from megaresnorm.parallel.collectives import largest
from megaresnorm.parallel.mesh import ParallelContext

INPUTS, GRADIENTS = 0, 1
# How far a step may go beyond the ones before it. In models of 24 blocks an input's largest number was up to 1.8 times
# that of 16 earlier steps, a gradient's up to 3.5 times. A factor of two costs one of E4M3's 17 or E5M2's 32 powers.
ROOM = (2.0, 4.0)


class Delayed:
    """The largest numbers that one layer has seen in earlier steps.

    Args:
        all_layers: of which it is one.
        index: its number among them.
    """

    def __init__(self, all_layers: "DelayedScales", index: int) -> None:
        self._all, self._index = all_layers, index

    def saw(self, which: int, amax: Tensor) -> None:
        """Take note of the largest |input| (INPUTS) or |output's gradient| (GRADIENTS) of a pass."""
        seen = self._all.seen[self._index, which]
        torch.maximum(seen, amax.view(()), out=seen)

    def amax(self, which: int) -> Tensor | None:
        """What scales are for, FP32 [1, 1]: earlier steps' largest number times ``ROOM``; None before there is one."""
        if not self._all.known[self._index][which]:
            return None
        return self._all.largest[self._index, which].view(1, 1) * ROOM[which]


class DelayedScales:
    """Scales from the largest numbers of the last steps, for all layers of a stage (delayed scaling).

    They change once a step, so that all microbatches, and what is computed again in backward, have the same.

    Args:
        num_layers: of this rank.
        history: steps that are looked at.

    Attributes:
        history: [layers, steps, 2] FP32, the largest |input| and |output's gradient| of the last steps, newest first; 0
            where there is none.
        seen: [layers, 2], of the step that is under way.
        largest: [layers, 2], over the history.
        known: [layers][2], whether the history has seen a number that is not 0. Until then scales are those of the
            numbers themselves: what starts at zero, as behind a gate of 0, has said nothing of its size.

    Source:
        Micikevicius et al., arXiv:2209.05433, section 3; the largest of a window as in Transformer Engine.
    """

    def __init__(self, num_layers: int, history: int, device: torch.device) -> None:
        self.history = torch.zeros(num_layers, history, 2, device=device)
        self.seen, self.largest = torch.zeros(2, num_layers, 2, device=device)
        self.known = [[False, False]] * num_layers

    def begin_step(self) -> None:
        """Forget what passes outside of training have seen."""
        self.seen.zero_()

    def end_step(self, context: ParallelContext, refused: Tensor) -> None:
        """Take over what this step has seen, unless it is refused. What is not finite is not taken.

        Args:
            refused: a number FP32 on the device; where it is 1 nothing changes.

        Communication:
            One all-gather of [layers, 2] over model_shards, and one over dp_replicate.
        """
        seen = largest(largest(self.seen, context.model_shards), context.dp_replicate)
        seen = torch.where(seen.isfinite(), seen, self.largest)
        moved = torch.cat((seen.unsqueeze(1), self.history[:, :-1]), 1)
        self.history.copy_(torch.where(refused > 0, self.history, moved))
        torch.amax(self.history, 1, out=self.largest)

    def step_was_applied(self) -> None:
        """Use what the history has seen from now on. Waits for the device."""
        self.known = (self.largest > 0).tolist()

    def loaded(self) -> None:
        """Use a history that a checkpoint has given. Waits for the device."""
        torch.amax(self.history, 1, out=self.largest)
        self.step_was_applied()
