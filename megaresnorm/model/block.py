"""A transformer block: attention and feed-forward, each inside a residual connection."""

from collections.abc import Callable

from torch import nn

from megaresnorm.model.branches.attention import Attention
from megaresnorm.model.branches.ffn import FeedForward
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.norm import Norm
from megaresnorm.model.residual import Residual
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Kernels, Stream
from megaresnorm.model.topology import Position, Sublayer, topology
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.recipe import ModelRecipe


class Block(nn.Module):
    """Two sub-layers at a global position; the boundary between them is one kernel, whatever the topology.

    Args:
        block: its global number, from 0.
        norm: makes a norm of a given width.
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
        wiring = topology(recipe.topology)

        def residual(sublayer: Sublayer, branch: type[Attention] | type[FeedForward]) -> Residual:
            at = Position(block=block, num_blocks=recipe.num_blocks, sublayer=sublayer, dim=recipe.dim)
            spec = wiring.residual(at, recipe.topology_options)
            inside = branch(recipe, kernels, layout, norm if spec.norm_inner else None)
            site = 2 * block + (sublayer == "ffn")
            return Residual(spec, inside, norm, recipe.dim, kernels.add_norm, layout, site=site, dropout=recipe.dropout)

        self.attention = residual("attention", Attention)
        self.ffn = residual("ffn", FeedForward)

    def forward(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after both sub-layers."""
        # One pre-norm sub-layer, as textbooks have it:
        #     u = norm(x)
        #     x = x + F(u)
        # The code below is that for every topology, twice, with all that lies between the two branches in one kernel.
        x, u = self.attention.open(stream)
        y = self.attention.run(x, u, rows, masks)
        x, u = self.attention.close_and_open(self.ffn, x, y, masks)
        y = self.ffn.run(x, u, rows, masks)
        return self.ffn.close(x, y, masks)
