"""Constants of a topology moved into its weights, for architectures that have no place for them.

norm(alpha x + F) = norm(x + F / alpha) if eps is divided by alpha^2 as well, and c * norm(x) is a norm with c times its weights.
"""

from dataclasses import dataclass
from typing import Any

from megaresnorm.convert.resolved import residual_at, trunk_alpha
from megaresnorm.convert.signature import wiring
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe, TopologyOptions


@dataclass(frozen=True)
class Fold:
    """before, recipe: of the model as it is, and with folded weights.   notes: in what the two differ beside rounding."""

    before: ModelRecipe
    recipe: ModelRecipe
    notes: tuple[str, ...] = ()

    def factor(self, name: str) -> float:
        """What a parameter is multiplied by."""
        match name.split("."):
            case ["blocks", block, "attention" | "ffn" as sublayer, "branch", "out" | "down", _]:
                return 1 / residual_at(self.before, int(block), sublayer).alpha
            case ["blocks", block, "attention" | "ffn" as sublayer, "norm_in", _]:
                return residual_at(self.before, int(block), sublayer).norm_in_scale
        return 1.0


def fold(recipe: ModelRecipe) -> Fold | None:
    """None where nothing can be folded."""
    plain: dict[str, Any] = {"topology_options": TopologyOptions()}
    if recipe.topology == "lns" and not recipe.norm_zero_centered:
        return Fold(recipe, recipe.model_copy(update=plain | {"topology": "pre"}))
    alpha = trunk_alpha(recipe)
    same_but_alpha = recipe.model_copy(update={"topology": "post", "topology_options": TopologyOptions(alpha=alpha)})
    # Norms of queries and keys would have the eps of the others.
    if alpha == 1.0 or recipe.qk_norm != "none" or wiring(recipe) != wiring(same_but_alpha):
        return None
    eps, embedding_norm = recipe.norm_eps / alpha**2, has_embedding_norm(recipe)
    note = f"eps of the embedding's norm is {eps:.3g} instead of {recipe.norm_eps:.3g}"
    folded = plain | {"topology": "post", "norm_eps": eps, "embedding_norm": embedding_norm}
    return Fold(recipe, recipe.model_copy(update=folded), (note,) if embedding_norm else ())
