"""The signature of a model: everything in a recipe that its logits depend on, whatever it is called."""

from typing import Any

from megaresnorm.model.topology import SUBLAYERS, Learned, Position, residual_at, topology
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe, TopologyOptions

PLAIN = (
    "dim num_blocks num_heads kv_heads head_width ffn_width vocab_size seq_len norm norm_eps norm_zero_centered "
    "positions qk_norm ffn bias biases tied_embeddings embedding_multiplier attention_softcap logit_softcap"
)
_NAMES = {"kv_heads": "num_kv_heads", "head_width": "head_dim", "ffn_width": "ffn_dim", "biases": "attention_bias"}


def signature(recipe: ModelRecipe) -> dict[str, Any]:
    """Setting -> value. Models with equal signatures have the same parameters and names, and compute the same."""
    found: dict[str, Any] = {"topology": wiring(recipe)}
    found |= {_NAMES.get(key, key): getattr(recipe, key) for key in PLAIN.split()}
    found["attention_multiplier"] = scale(recipe)
    found["logits_scaling"] = whole_logits_scaling(recipe)
    found["embedding_norm"] = has_embedding_norm(recipe)
    if recipe.norm == "layernorm":
        found["norm_bias"] = recipe.norm_bias
    if recipe.positions == "rope":
        found |= {"rope_theta": recipe.rope_theta, "rotary_width": recipe.rotary_width}
        found["rope_scaling"] = None if recipe.rope_scaling is None else recipe.rope_scaling.model_dump()
    return found


def wiring(recipe: ModelRecipe) -> tuple:
    """Whether there is a final norm, and the norms and constants of every sub-layer."""
    entry = topology(recipe.topology)
    rows: list[Any] = [entry.final_norm]
    for block in range(recipe.num_blocks):
        for sublayer in SUBLAYERS:
            spec = residual_at(recipe, block, sublayer)
            gate: Any = spec.constant_gate
            if gate is None:
                gate = f"learned {spec.gate.shape}" if isinstance(spec.gate, Learned) else "of every token"
            norms = (
                spec.norm_in,
                spec.norm_in_scale if spec.norm_in else 1.0,
                spec.norm_inner,
                spec.norm_branch,
                spec.norm_out,
            )
            rows.append((*norms, spec.alpha, gate))
    return tuple(rows)


def different(one: ModelRecipe, other: ModelRecipe) -> dict[str, tuple[Any, Any]]:
    """The settings in which two models differ, with both values, the topology first."""
    a, b = signature(one), signature(other)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def trunk_alpha(recipe: ModelRecipe) -> float:
    """The factor on the trunk of the first sub-layer."""
    return residual_at(recipe, 0, "attention").alpha


def branch_gate(recipe: ModelRecipe) -> float:
    """The constant factor on the first branch; 1 where it is learned."""
    gate = residual_at(recipe, 0, "attention").constant_gate
    return 1.0 if gate is None else gate


def whole_logits_scaling(recipe: ModelRecipe) -> float:
    """The divisor of the logits, including the topology's factor."""
    return recipe.logits_scaling / topology(recipe.topology).logit_scale(recipe.dim, recipe.topology_options)


def scale(recipe: ModelRecipe) -> float:
    """The factor on products of queries and keys."""
    return recipe.head_width**-0.5 if recipe.attention_multiplier is None else recipe.attention_multiplier


def post_of(alpha: float, num_blocks: int) -> dict[str, Any]:
    """Settings of the post-norm topology with this factor on the trunk, named by the formula that it follows."""
    at = Position.of(0, SUBLAYERS[0], num_blocks, dim=1)
    for name in ("deepnorm", "deepnorm_glm", "post"):
        if topology(name).residual(at, TopologyOptions()).alpha == alpha:
            return {"topology": name}
    return {"topology": "post", "topology_options": {"alpha": alpha}}
