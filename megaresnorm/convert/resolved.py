"""Values of a recipe with its defaults, its topology's constants among them."""

from typing import Any

from megaresnorm.model.topology import Position, ResidualSpec, Sublayer, topology
from megaresnorm.recipe import ModelRecipe, TopologyOptions

# Settings whose default depends on others.
_RESOLVED = {"num_kv_heads": "kv_heads", "head_dim": "head_width", "ffn_dim": "ffn_width", "attention_bias": "biases"}


def setting(recipe: ModelRecipe, name: str) -> Any:
    """A setting of the model, its default resolved."""
    return getattr(recipe, _RESOLVED.get(name, name))


def residual_at(recipe: ModelRecipe, block: int, sublayer: Sublayer) -> ResidualSpec:
    """The residual connection of a sub-layer."""
    at = Position(block=block, num_blocks=recipe.num_blocks, sublayer=sublayer, dim=recipe.dim)
    return topology(recipe.topology).residual(at, recipe.topology_options)


def trunk_alpha(recipe: ModelRecipe) -> float:
    """The factor on the trunk of the first sub-layer."""
    return residual_at(recipe, 0, "attention").alpha


def branch_gate(recipe: ModelRecipe) -> float:
    """The constant factor on the first branch; 1 where it is learned."""
    gate = residual_at(recipe, 0, "attention").constant_gate
    return 1.0 if gate is None else gate


def whole_logits_scaling(recipe: ModelRecipe) -> float:
    """The divisor of the logits, the topology's part in it included."""
    return recipe.logits_scaling / topology(recipe.topology).logit_scale(recipe.dim, recipe.topology_options)


def scale(recipe: ModelRecipe) -> float:
    """The factor on products of queries and keys."""
    return recipe.head_width**-0.5 if recipe.attention_multiplier is None else recipe.attention_multiplier


def post_of(alpha: float, num_blocks: int) -> dict[str, Any]:
    """Settings of the post-norm topology with this factor on the trunk, under the name of the formula that it follows."""
    at = Position(block=0, num_blocks=num_blocks, sublayer="attention", dim=1)
    for name in ("deepnorm", "deepnorm_glm", "post"):
        if topology(name).residual(at, TopologyOptions()).alpha == alpha:
            return {"topology": name}
    return {"topology": "post", "topology_options": {"alpha": alpha}}
