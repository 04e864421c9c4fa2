"""The feed-forward branch: SwiGLU (arXiv:2002.05202, eq. 6) or GELU (arXiv:1606.08415, the exact one).

T tokens   D model dim   F ffn dim
"""

from collections.abc import Callable

from torch import Tensor, nn

from megaresnorm.model.residual import Rows
from megaresnorm.parallel.tensor import Linear
from megaresnorm.recipe import ModelRecipe


class FeedForward(nn.Module):
    """down(activate(in(u))). The fused ``gate_up`` of SwiGLU holds the logical matrices gate [F, D] and up [F, D]."""

    def __init__(self, recipe: ModelRecipe, activate: Callable[..., Tensor]) -> None:
        super().__init__()
        self.kind, self.activate = recipe.ffn, activate
        if recipe.ffn == "swiglu":
            self.gate_up = Linear(recipe.dim, 2 * recipe.ffn_width, bias=recipe.bias)
        else:
            self.up = Linear(recipe.dim, recipe.ffn_width, bias=recipe.bias)
        self.down = Linear(recipe.ffn_width, recipe.dim, bias=recipe.bias)

    def forward(self, u_TD: Tensor, rows: Rows) -> Tensor:
        into = self.gate_up if self.kind == "swiglu" else self.up
        # The bias belongs to the activation's kernel, which sums its gradient on the way.
        return self.down(self.activate(into.without_bias(u_TD), into.bias, self.kind))
