"""The feed-forward branch: SwiGLU (arXiv:2002.05202, eq. 6) or GELU (arXiv:1606.08415, the exact one).

T tokens   D model dim   F ffn dim
"""

import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.model.residual import Rows
from megaresnorm.parallel.tensor import Linear
from megaresnorm.recipe import ModelRecipe


class SwiGLU(nn.Module):
    """down(silu(gate(u)) * up(u)). The fused ``gate_up`` holds the logical matrices gate [F, D] and up [F, D]."""

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        self.gate_up = Linear(recipe.dim, 2 * recipe.ffn_width, bias=recipe.bias)
        self.down = Linear(recipe.ffn_width, recipe.dim, bias=recipe.bias)

    def forward(self, u_TD: Tensor, rows: Rows) -> Tensor:
        gate_TF, up_TF = self.gate_up(u_TD).chunk(2, dim=-1)
        return self.down(F.silu(gate_TF) * up_TF)


class GELU(nn.Module):
    """down(gelu(up(u)))."""

    def __init__(self, recipe: ModelRecipe) -> None:
        super().__init__()
        self.up = Linear(recipe.dim, recipe.ffn_width, bias=recipe.bias)
        self.down = Linear(recipe.ffn_width, recipe.dim, bias=recipe.bias)

    def forward(self, u_TD: Tensor, rows: Rows) -> Tensor:
        return self.down(F.gelu(self.up(u_TD)))


def feed_forward(recipe: ModelRecipe) -> nn.Module:
    return SwiGLU(recipe) if recipe.ffn == "swiglu" else GELU(recipe)
