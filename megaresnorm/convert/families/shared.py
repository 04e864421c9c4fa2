"""Fields and modules that many families share, in parts."""

from megaresnorm.convert.families.family import Of
from megaresnorm.convert.fields import Always, By, Choice, Same
from megaresnorm.convert.rows import halves, heads, one_head, part

SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "dim"),
    Same("num_hidden_layers", "num_blocks"),
    Same("num_attention_heads", "num_heads"),
    Same("max_position_embeddings", "seq_len"),
    Same("intermediate_size", "ffn_dim"),
    Same("tie_word_embeddings", "tied_embeddings"),
)
KV_HEADS = Same("num_key_value_heads", "num_kv_heads", fallback="num_attention_heads")
HEAD_DIM = By(
    ("head_dim",),
    lambda recipe: {"head_dim": recipe.head_width},
    lambda config: {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]},
)
DERIVED_HEAD_DIM = By(
    (), lambda recipe: {}, lambda config: {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
)
DERIVED_KV_HEADS = By((), lambda recipe: {}, lambda config: {"num_kv_heads": config["num_attention_heads"]})
NO_BIAS = Always({"bias": False, "attention_bias": "none"})
RMS_NORM = (Same("rms_norm_eps", "norm_eps"), Always({"norm": "rmsnorm", "norm_zero_centered": False}))
LAYER_NORM = Always({"norm": "layernorm", "norm_bias": True, "norm_zero_centered": False})
PRE = Always({"topology": "pre", "embedding_norm": False})
PLAIN_ATTENTION = Always({"qk_norm": "none"})
ATTENTION_BIAS = Choice("attention_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "all"})))
MLP_BIAS = Choice("mlp_bias", ((False, {"bias": False}), (True, {"bias": True})))
SWIGLU = (("silu", {"ffn": "swiglu"}), ("swish", {"ffn": "swiglu"}))
GATED = (
    *SWIGLU,
    ("gelu", {"ffn": "geglu"}),
    ("gelu_pytorch_tanh", {"ffn": "geglu_tanh"}),
    ("gelu_new", {"ffn": "geglu_tanh"}),
)
UNGATED = (
    ("gelu", {"ffn": "gelu"}),
    ("gelu_new", {"ffn": "gelu_tanh"}),
    ("gelu_pytorch_tanh", {"ffn": "gelu_tanh"}),
    ("gelu_fast", {"ffn": "gelu_tanh"}),
    ("relu", {"ffn": "relu"}),
)
GATED_ACT, UNGATED_ACT = Choice("hidden_act", GATED), Choice("hidden_act", UNGATED)
BLOCK = "blocks.{}."
QKV, OUT = BLOCK + "attention.branch.qkv", BLOCK + "attention.branch.out"
GATE_UP, UP, DOWN = (BLOCK + f"ffn.branch.{name}" for name in ("gate_up", "up", "down"))
ENDS = {"model.embed_tokens": Of("embedding"), "model.norm": Of("final_norm"), "lm_head": Of("head")}
LAYER = "model.layers.{}."
ATTENTION = {
    LAYER + "self_attn.q_proj": Of(QKV, heads("q")),
    LAYER + "self_attn.k_proj": Of(QKV, heads("k")),
    LAYER + "self_attn.v_proj": Of(QKV, part("v")),
    LAYER + "self_attn.o_proj": Of(OUT),
}
QK_NORMS = {
    LAYER + "self_attn.q_norm": Of(BLOCK + "attention.branch.q_norm", one_head(halves)),
    LAYER + "self_attn.k_norm": Of(BLOCK + "attention.branch.k_norm", one_head(halves)),
}
DOWN_PROJ = {LAYER + "mlp.down_proj": Of(DOWN)}
MLP = {
    LAYER + "mlp.gate_proj": Of(GATE_UP, part("gate")),
    LAYER + "mlp.up_proj": Of(GATE_UP, part("up")),
    **DOWN_PROJ,
}
PRE_NORMS = {
    LAYER + "input_layernorm": Of(BLOCK + "attention.norm_in"),
    LAYER + "post_attention_layernorm": Of(BLOCK + "ffn.norm_in"),
}
LLAMA = ENDS | PRE_NORMS | ATTENTION | MLP
BRANCH_NORMS = {
    LAYER + "post_attention_layernorm": Of(BLOCK + "attention.norm_branch"),
    LAYER + "post_feedforward_layernorm": Of(BLOCK + "ffn.norm_branch"),
}
FOUR_NORMS = BRANCH_NORMS | {
    LAYER + "input_layernorm": Of(BLOCK + "attention.norm_in"),
    LAYER + "pre_feedforward_layernorm": Of(BLOCK + "ffn.norm_in"),
}


def written_dropout(*stream: str, attention: str) -> By:
    """Fields for training alone, which have other defaults than ours: written and not read."""
    return By(
        (*stream, attention), lambda recipe: dict.fromkeys(stream, recipe.dropout) | {attention: 0.0}, lambda config: {}
    )
