"""A transformer block: a list of sub-layers, each a branch inside a residual connection."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn

from megaresnorm.model.branches import BRANCHES
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.norm import Norm
from megaresnorm.model.residual import Residual
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Kernels, Stream
from megaresnorm.model.topology import SUBLAYERS, residual_at
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.recipe import ModelRecipe


class Opened(NamedTuple):
    """The trunk and the branch input of a block's first sub-layer."""

    x: Tensor
    u: BranchInput


class Block(nn.Module):
    """The sub-layers at a global position; the boundary between two of them is one kernel, whatever the topology.

    Args:
        block: its global number, from 0.
        norm: makes a norm of a given width.

    Attributes:
        sublayers: in order; each is also an attribute named by its kind, as in a checkpoint.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        block: int,
        norm: Callable[[int], Norm],
        kernels: Kernels,
        layout: TensorLayout,
    ) -> None:
        super().__init__()
        for site, kind in enumerate(SUBLAYERS):
            spec = residual_at(recipe, block, kind)
            branch = BRANCHES[kind](recipe, kernels, layout, norm if spec.norm_inner else None)
            residual = Residual(
                spec, branch, norm, recipe.dim, kernels.add_norm, layout, site=site, dropout=recipe.dropout
            )
            self.add_module(kind, residual)
        self.sublayers = tuple(residual for residual in self.children() if isinstance(residual, Residual))

    @property
    def recomputes(self) -> tuple[object, ...]:
        """What of it is run or made again in backward, to tell blocks apart."""
        ffn = (getattr(residual.branch, "remakes_activation", None) for residual in self.sublayers)
        return *((residual.reruns, residual.remakes) for residual in self.sublayers), *ffn

    def forward(
        self,
        stream: "Stream | Opened",
        rows: SequenceInfo,
        masks: DropoutMasks | None,
        begin: "Callable[[Opened], Opened] | None" = None,
    ) -> Stream:
        """The stream after all sub-layers.

        Args:
            stream: or what its first sub-layer has opened already.
            masks: of this block.
            begin: for recomputation, which begins where the first sub-layer is open; returns what it is given.
        """
        # One pre-norm sub-layer, as textbooks have it:
        #     u = norm(x)
        #     x = x + F(u)
        # The code below is that for every topology, with all that lies between two branches in one kernel.
        opened = stream if isinstance(stream, Opened) else Opened(*self.sublayers[0].open(stream))
        x, u = opened if begin is None else begin(opened)
        for this, following in pairwise(self.sublayers):
            y = this.run(x, u, rows, masks)
            x, u = this.close_and_open(following, x, y, masks)
        last = self.sublayers[-1]
        return last.close(x, last.run(x, u, rows, masks), masks)
