"""The feed-forward branch: SwiGLU or GEGLU (arXiv:2002.05202, eq. 6), GELU (arXiv:1606.08415) or ReLU.

T tokens   D model dim   F ffn dim
"""

from collections.abc import Callable

from torch import Tensor, nn

from megaresnorm.model.norm import Norm
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Kernels
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear import ColumnLinear, RowLinear
from megaresnorm.recipe import ModelRecipe


class FeedForward(nn.Module):
    """down(activate(in(u))). With a gate the fused ``gate_up`` holds the logical matrices gate [F, D] and up [F, D].

    Under tensor parallelism F is this rank's share.

    Args:
        norm_inner: makes the norm of the input of ``down``, of a given width; None: there is none.
    """

    def __init__(
        self, recipe: ModelRecipe, kernels: Kernels, layout: TensorLayout, norm_inner: Callable[[int], Norm] | None
    ) -> None:
        super().__init__()
        self.kind, self.activate, self.normalize_shared = recipe.ffn, kernels.activate, kernels.normalize_shared
        axis = layout.axis
        self.gated = recipe.gated_ffn
        if self.gated:
            self.gate_up = ColumnLinear(recipe.dim, 2 * recipe.ffn_width, axis, bias=recipe.has_bias("gate_up"))
        else:
            self.up = ColumnLinear(recipe.dim, recipe.ffn_width, axis, bias=recipe.has_bias("up"))
        self.down = RowLinear(recipe.ffn_width, recipe.dim, layout, bias=recipe.has_bias("down"))
        self.norm_inner = None if norm_inner is None else norm_inner(recipe.ffn_width // axis.size)

    def forward(self, u_TD: BranchInput, rows: SequenceInfo) -> Tensor:
        """The branch's output [T, D], laid out as the stream."""
        into = self.gate_up if self.gated else self.up
        # The bias belongs to the activation's kernel, which sums its gradient on the way.
        h = self.activate(into.without_bias(u_TD), into.bias, self.kind)
        return self.down(h if self.norm_inner is None else self.normalize_shared(h, self.norm_inner))
