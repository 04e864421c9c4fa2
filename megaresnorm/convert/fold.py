"""Constants of a topology moved into its weights, for architectures that have no place for them.

norm(alpha x + F) = norm(x + F / alpha) if eps is divided by alpha^2 as well, and c * norm(x) is a norm with c times its weights.
"""

from dataclasses import dataclass
from math import sqrt

from megaresnorm.convert.families import trunk_alpha
from megaresnorm.convert.signature import wiring
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe, TopologyOptions


@dataclass(frozen=True)
class Fold:
    """recipe: of the model with folded weights.   notes: in what it differs from the one before beside rounding."""

    recipe: ModelRecipe
    alpha: float | None
    notes: tuple[str, ...] = ()

    def factor(self, name: str) -> float:
        """What a parameter is multiplied by."""
        parts = name.split(".")
        if parts[0] != "blocks":
            return 1.0
        if self.alpha is not None:
            return 1 / self.alpha if parts[-2] in ("out", "down") else 1.0
        return 1 / sqrt(int(parts[1]) + 1) if parts[-2] == "norm_in" else 1.0


def fold(recipe: ModelRecipe) -> Fold | None:
    """None where nothing can be folded."""
    plain = {"topology_options": TopologyOptions()}
    if recipe.topology == "lns" and not recipe.norm_zero_centered:
        return Fold(recipe.model_copy(update=plain | {"topology": "pre"}), None)
    alpha = trunk_alpha(recipe)
    post = recipe.model_copy(update=plain | {"topology": "post", "norm_eps": recipe.norm_eps / alpha**2})
    same_but_alpha = recipe.model_copy(update={"topology": "post", "topology_options": TopologyOptions(alpha=alpha)})
    if alpha == 1.0 or wiring(recipe) != wiring(same_but_alpha):
        return None
    notes: tuple[str, ...] = ()
    if has_embedding_norm(recipe):
        notes = (f"eps of the embedding's norm is {post.norm_eps:.3g} instead of {recipe.norm_eps:.3g}",)
    post = post.model_copy(update={"embedding_norm": has_embedding_norm(recipe)})
    return Fold(post, alpha, notes)
