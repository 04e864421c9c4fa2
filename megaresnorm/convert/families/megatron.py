"""Weights of Megatron-Core's GPT model: its names, its qkv by query group, its fused gate and up.

A folder has model.safetensors with the names of GPTModel.state_dict() on one rank, and config.json with the arguments
of TransformerConfig and GPTModel that the weights depend on, under their own names. Names are those of megatron-core
0.16.1, for both of its implementations of a layer. Megatron's own checkpoints are pickles, which are never read:
docs/conversion.md has the lines that write such a folder in a Megatron job, and those that load one.
"""

from typing import Any

from megaresnorm.convert.family import MEGATRON_NAME, Family, Of
from megaresnorm.convert.fields import Always, By, Choice, Config, Field, Fixed, Same, Settings, refused
from megaresnorm.convert.rows import groups, halves, one_head
from megaresnorm.recipe import ModelRecipe

# (gated_linear_unit, activation_func) -> ours. Megatron's fused bias and GELU computes the approximation by tanh.
_ACTIVATIONS = {
    (True, "silu"): "swiglu",
    (True, "gelu"): "geglu",
    (True, "gelu_tanh"): "geglu_tanh",
    (False, "gelu"): "gelu",
    (False, "gelu_tanh"): "gelu_tanh",
    (False, "relu"): "relu",
}


def _write_activation(recipe: ModelRecipe) -> dict[str, Any]:
    gated, function = next(key for key, ours in _ACTIVATIONS.items() if ours == recipe.ffn)
    return {"gated_linear_unit": gated, "activation_func": function}


def _read_activation(config: Config) -> Settings:
    key = config["gated_linear_unit"], config["activation_func"]
    if key not in _ACTIVATIONS:
        raise refused("activation_func", key[1], f"with gated_linear_unit={key[0]} has no counterpart in our model")
    return {"ffn": _ACTIVATIONS[key]}


def _write_biases(recipe: ModelRecipe) -> dict[str, Any]:
    return {"add_bias_linear": recipe.bias, "add_qkv_bias": recipe.bias or recipe.biases == "qkv"}


def _read_biases(config: Config) -> Settings:
    whole = config["add_bias_linear"]
    return {"bias": whole, "attention_bias": "all" if whole else "qkv" if config["add_qkv_bias"] else "none"}


def _read_rope(config: Config) -> Settings:
    if config["position_embedding_type"] != "rope":
        return {}
    return {"rope_theta": float(config["rotary_base"]), "rope_fraction": float(config["rotary_percent"])}


_FIELDS: tuple[Field, ...] = (
    Same("vocab_size", "vocab_size"),
    Same("max_sequence_length", "seq_len"),
    Same("num_layers", "num_blocks"),
    Same("hidden_size", "dim"),
    Same("ffn_hidden_size", "ffn_dim"),
    Same("num_attention_heads", "num_heads"),
    Same("num_query_groups", "num_kv_heads", fallback="num_attention_heads"),
    By(
        ("kv_channels",),
        lambda recipe: {"kv_channels": recipe.head_width},
        lambda config: {"head_dim": config["kv_channels"]},
    ),
    Same("layernorm_epsilon", "norm_eps"),
    Choice("normalization", (("RMSNorm", {"norm": "rmsnorm"}), ("LayerNorm", {"norm": "layernorm"}))),
    Choice("qk_layernorm", ((False, {"qk_norm": "none"}), (True, {"qk_norm": "head"}))),
    Choice(
        "position_embedding_type", (("rope", {"positions": "rope"}), ("learned_absolute", {"positions": "learned"}))
    ),
    By(
        ("rotary_base", "rotary_percent"),
        lambda recipe: {"rotary_base": recipe.rope_theta, "rotary_percent": recipe.rope_fraction},
        _read_rope,
    ),
    By(("gated_linear_unit", "activation_func"), _write_activation, _read_activation),
    By(("add_bias_linear", "add_qkv_bias"), _write_biases, _read_biases),
    Same("share_embeddings_and_output_weights", "tied_embeddings"),
    Fixed("rotary_interleaved", False),
    Fixed("seq_len_interpolation_factor", None),
    Fixed("rope_scaling", False),
    Fixed("apply_residual_connection_post_layernorm", False),
    Always({"topology": "pre", "embedding_norm": False}),
)  # fmt: skip
_LAYER, _BLOCK = "decoder.layers.{}.", "blocks.{}."


def _family(implementation: str, attention_norm: str, ffn_norm: str, *centered: Field) -> Family:
    return Family(
        name=MEGATRON_NAME,
        architecture="GPTModel",
        fields=(Fixed("transformer_impl", implementation), *_FIELDS, *centered),
        modules={
            "embedding.word_embeddings": Of("embedding"),
            "embedding.position_embeddings": Of("positions"),
            _LAYER + attention_norm: Of(_BLOCK + "attention.norm_in"),
            _LAYER + "self_attention.linear_qkv": Of(_BLOCK + "attention.branch.qkv", groups),
            _LAYER + "self_attention.q_layernorm": Of(_BLOCK + "attention.branch.q_norm", one_head(halves)),
            _LAYER + "self_attention.k_layernorm": Of(_BLOCK + "attention.branch.k_norm", one_head(halves)),
            _LAYER + "self_attention.linear_proj": Of(_BLOCK + "attention.branch.out"),
            _LAYER + ffn_norm: Of(_BLOCK + "ffn.norm_in"),
            _LAYER + "mlp.linear_fc1": Of(_BLOCK + "ffn.branch.gate_up|up"),
            _LAYER + "mlp.linear_fc2": Of(_BLOCK + "ffn.branch.down"),
            "decoder.final_layernorm": Of("final_norm"),
            "output_layer": Of("head"),
        },
        prefix="",
        padded=True,
    )


# Transformer Engine's layers have the norm inside the linear layer after it; the local ones have no norm around zero.
_CENTERED = "layernorm_zero_centered_gamma"
MEGATRON = {
    "local": _family(
        "local",
        "input_layernorm",
        "pre_mlp_layernorm",
        Fixed(_CENTERED, False),
        Always({"norm_zero_centered": False}),
    ),
    "transformer_engine": _family(
        "transformer_engine",
        "self_attention.linear_qkv.layer_norm_",
        "mlp.linear_fc1.layer_norm_",
        Same(_CENTERED, "norm_zero_centered"),
    ),
}
