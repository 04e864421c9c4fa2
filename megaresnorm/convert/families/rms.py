"""Families with RMSNorm and rotary positions: pre-norm, sandwich, reordered norm, and MiniMax's DeepNorm."""

from typing import Any

from megaresnorm.convert.family import (
    ATTENTION,
    ATTENTION_BIAS,
    BLOCK,
    BRANCH_NORMS,
    DERIVED_HEAD_DIM,
    DOWN,
    DOWN_PROJ,
    ENDS,
    FOUR_NORMS,
    GATE_UP,
    GATED,
    GATED_ACT,
    HEAD_DIM,
    KV_HEADS,
    LAYER,
    LLAMA,
    MLP,
    MLP_BIAS,
    NO_BIAS,
    PLAIN_ATTENTION,
    PRE,
    QK_NORMS,
    QKV,
    RMS_NORM,
    SIZES,
    Constant,
    Family,
    Of,
)
from megaresnorm.convert.fields import Always, By, Choice, Config, Fixed, Rope, Same, Settings, Window, refused
from megaresnorm.convert.rows import heads, pairs, part
from megaresnorm.convert.signature import branch_gate, post_of, scale, trunk_alpha, whole_logits_scaling
from megaresnorm.recipe import ModelRecipe


def _gate(config: Config) -> Settings:
    gate = float(config["residual_multiplier"])
    return {"topology": "pre", "topology_options": {} if gate == 1.0 else {"gate": gate}}


def _alpha(config: Config) -> Settings:
    """MiniMax has one factor for attention and one for the ffn."""
    for key in ("full_attn_beta_factor", "mlp_beta_factor"):
        if config[key] != 1:
            raise refused(key, config[key], "has no counterpart in our model; wanted 1")
    alpha, blocks = float(config["full_attn_alpha_factor"]), config["num_hidden_layers"]
    if config["mlp_alpha_factor"] != config["full_attn_alpha_factor"]:
        raise refused("mlp_alpha_factor", config["mlp_alpha_factor"], f"differs from full_attn_alpha_factor={alpha}")
    return post_of(alpha, blocks)


def _all_full(config: Config) -> Settings:
    for kind in config["layer_types"]:
        if kind != "full_attention":
            raise refused("layer_types", kind, "is no attention that our model has")
    return {}


def _gemma_scale(recipe: ModelRecipe) -> dict[str, Any]:
    """The number whose power of -1/2 is the factor on scores, an integer where that is exact."""
    number = scale(recipe) ** -2
    whole = round(number)
    return {"query_pre_attn_scalar": whole if whole > 0 and whole**-0.5 == scale(recipe) else number}


llama = Family(
    name="llama",
    unread=("is_llama_config", "rope_interleaved", "transformers.js_config", "max_sequence_length"),
    divided_dim=True,
    architecture="LlamaForCausalLM",
    fields=(
        *SIZES, KV_HEADS, HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT, ATTENTION_BIAS, MLP_BIAS, PRE, PLAIN_ATTENTION,
    ),
    modules=LLAMA,
)  # fmt: skip
mistral = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fields=(
        *SIZES, KV_HEADS, HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT, NO_BIAS, PRE, PLAIN_ATTENTION, Window(layers=False),
    ),
    modules=LLAMA,
)  # fmt: skip
qwen2 = Family(
    name="qwen2",
    unread=('use_mrope',),
    architecture="Qwen2ForCausalLM",
    fields=(
        *SIZES, KV_HEADS, DERIVED_HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT,
        Always({"bias": False, "attention_bias": "qkv"}), PRE, PLAIN_ATTENTION, Window(unless="use_sliding_window"),
    ),
    modules=LLAMA,
)  # fmt: skip
qwen3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(
        *SIZES, KV_HEADS, HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT, ATTENTION_BIAS,
        Always({"bias": False, "qk_norm": "head"}), PRE, Window(unless="use_sliding_window"),
    ),
    modules=LLAMA | QK_NORMS,
)  # fmt: skip
granite = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    fields=(
        *SIZES, KV_HEADS, DERIVED_HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT, ATTENTION_BIAS, MLP_BIAS, PLAIN_ATTENTION,
        Always({"embedding_norm": False}),
        Same("embedding_multiplier", "embedding_multiplier"),
        By(("residual_multiplier",), lambda recipe: {"residual_multiplier": branch_gate(recipe)}, _gate),
        By(
            ("attention_multiplier",),
            lambda recipe: {"attention_multiplier": scale(recipe)},
            lambda config: {"attention_multiplier": float(config["attention_multiplier"])},
        ),
        By(
            ("logits_scaling",),
            lambda recipe: {"logits_scaling": whole_logits_scaling(recipe)},
            lambda config: {"logits_scaling": float(config["logits_scaling"])},
        ),
    ),
    modules=LLAMA,
)  # fmt: skip
glm4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    fields=(
        *SIZES, KV_HEADS, HEAD_DIM, *RMS_NORM, Rope(partial=True), GATED_ACT,
        Choice("attention_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "qkv"}))),
        Always({"bias": False, "topology": "sandwich", "embedding_norm": False}), PLAIN_ATTENTION,
    ),
    modules={
        **ENDS,
        **ATTENTION,
        LAYER + "self_attn.q_proj": Of(QKV, heads("q", pairs)),
        LAYER + "self_attn.k_proj": Of(QKV, heads("k", pairs)),
        LAYER + "mlp.gate_up_proj": Of(GATE_UP),
        **DOWN_PROJ,
        LAYER + "input_layernorm": Of(BLOCK + "attention.norm_in"),
        LAYER + "post_self_attn_layernorm": Of(BLOCK + "attention.norm_branch"),
        LAYER + "post_attention_layernorm": Of(BLOCK + "ffn.norm_in"),
        LAYER + "post_mlp_layernorm": Of(BLOCK + "ffn.norm_branch"),
    },
)  # fmt: skip
GEMMA = (
    *SIZES, KV_HEADS, HEAD_DIM, ATTENTION_BIAS, Choice("hidden_activation", (GATED[3], GATED[4], *GATED[:3])),
    Same("rms_norm_eps", "norm_eps"),
    By((), lambda recipe: {}, lambda config: {"embedding_multiplier": config["hidden_size"] ** 0.5}),
    By(
        ("query_pre_attn_scalar",),
        _gemma_scale,
        lambda config: {"attention_multiplier": config["query_pre_attn_scalar"] ** -0.5},
    ),
    Same("attn_logit_softcapping", "attention_softcap"),
    Same("final_logit_softcapping", "logit_softcap"),
    Fixed("use_bidirectional_attention", None, others=(False,)),
    Window(),
    Always({
        "norm": "rmsnorm", "norm_zero_centered": True, "bias": False, "topology": "sandwich", "embedding_norm": False,
    }),
)  # fmt: skip
gemma2 = Family(
    name="gemma2",
    unread=("hidden_act", "sliding_window_size"),
    divided_dim=True,
    architecture="Gemma2ForCausalLM",
    fields=(*GEMMA, Rope(), PLAIN_ATTENTION),
    modules=ENDS | FOUR_NORMS | ATTENTION | MLP,
)
gemma3 = Family(
    name="gemma3_text",
    unread=("hidden_act", "sliding_window_size"),
    divided_dim=True,
    architecture="Gemma3ForCausalLM",
    fields=(*GEMMA, Rope(by_layer_type=True), Always({"qk_norm": "head"})),
    modules=ENDS | FOUR_NORMS | ATTENTION | QK_NORMS | MLP,
)
OLMO = (
    *SIZES, KV_HEADS, DERIVED_HEAD_DIM, *RMS_NORM, GATED_ACT, ATTENTION_BIAS,
    Always({"bias": False, "topology": "reordered", "embedding_norm": False, "qk_norm": "full"}),
)  # fmt: skip
olmo2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=(*OLMO, Rope()),
    modules=ENDS | BRANCH_NORMS | ATTENTION | QK_NORMS | MLP,
)
olmo3 = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    fields=(*OLMO, Rope(by_layer_type=True), Window()),
    modules=olmo2.modules,
)
minimax = Family(
    name="minimax",
    architecture="MiniMaxForCausalLM",
    fields=(
        *SIZES, KV_HEADS, HEAD_DIM, *RMS_NORM, Rope(), GATED_ACT, NO_BIAS, PLAIN_ATTENTION,
        Always({"embedding_norm": True}),
        By(
            ("full_attn_alpha_factor", "full_attn_beta_factor", "mlp_alpha_factor", "mlp_beta_factor"),
            lambda recipe: {
                "full_attn_alpha_factor": trunk_alpha(recipe), "full_attn_beta_factor": 1,
                "mlp_alpha_factor": trunk_alpha(recipe), "mlp_beta_factor": 1,
            },
            _alpha,
        ),
        Fixed("num_local_experts", 1),
        Fixed("num_experts_per_tok", 1),
        Fixed("sliding_window", None),
        By(
            ("layer_types",),
            lambda recipe: {"layer_types": ["full_attention"] * recipe.num_blocks},
            lambda config: _all_full(config),
        ),
    ),
    modules={
        **ENDS,
        **ATTENTION,
        "model.layers.0.input_layernorm": Of("embedding_norm"),
        LAYER + "post_attention_layernorm": Of(BLOCK + "attention.norm_out"),
        "model.layers.{next}.input_layernorm": Of(BLOCK + "ffn.norm_out"),
        LAYER + "block_sparse_moe.experts.0.w1": Of(GATE_UP, part("gate")),
        LAYER + "block_sparse_moe.experts.0.w3": Of(GATE_UP, part("up")),
        LAYER + "block_sparse_moe.experts.0.w2": Of(DOWN),
    },
    renamed={"model.layers.{num_blocks}.input_layernorm": "model.norm"},
    constants={LAYER + "block_sparse_moe.gate.weight": Constant(("1", "dim"))},
)  # fmt: skip
