"""The architectures of other frameworks that hold our models, one table each, used in both directions.

Whether an architecture holds a model exactly is not written down: it does if what is read back from its config.json computes the
same (``signature``). So a table says only what the architecture has.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megaresnorm.convert.fields import Always, By, Choice, Config, Field, Fixed, Rope, Same, Settings, Window, refused
from megaresnorm.convert.rows import Rows, after, every, groups, halves, heads, one_head, pairs, part
from megaresnorm.model.topology import Position, topology
from megaresnorm.recipe import ModelRecipe, TopologyOptions


class Of(NamedTuple):
    """Which rows of which of our modules a module of theirs has. {} in a name is the block; of ``a|b`` the one that there is."""

    name: str
    rows: Rows = every
    transposed: bool = False


class Constant(NamedTuple):
    """A tensor of theirs that ours has no place for, of zeros. must: whether it is read only where it is zero; else it has no
    effect whatever it holds.   untied: only where the output matrix is not the embedding.
    """

    shape: tuple[str, ...]  # settings
    must: bool = False
    untied: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """name: model_type of config.json.   modules: theirs -> ours; {next} is the number of the block after.   renamed: names that
    follow the modules' pattern, and what they are called instead.   prefix: may be missing in files.   divided_dim: the class
    refuses heads whose number does not divide the width, even where head_dim says how wide they are.   padded: files may have
    more rows for the vocabulary than it has tokens.
    """

    name: str
    architecture: str
    fields: tuple[Field, ...]
    modules: Mapping[str, Of]
    renamed: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    prefix: str = "model."
    divided_dim: bool = False
    padded: bool = False

    def config(self, recipe: ModelRecipe) -> dict[str, Any]:
        """What config.json says of the model."""
        values: dict[str, Any] = {}
        for one in self.fields:
            values |= one.write(recipe)
        return values

    def settings(self, config: Config) -> Settings:
        """The settings of the model that a config.json describes. Raises: CheckpointError naming a key that has no counterpart."""
        found: Settings = {}
        for one in self.fields:
            found |= one.read(config)
        return found

    @property
    def keys(self) -> set[str]:
        return {key for one in self.fields for key in one.keys}


def _gate(config: Config) -> Settings:
    gate = float(config["residual_multiplier"])
    return {"topology": "pre", "topology_options": {} if gate == 1.0 else {"gate": gate}}


def _alpha(config: Config) -> Settings:
    """Post-norm of MiniMax under the name of the formula that its factor follows."""
    for key in ("full_attn_beta_factor", "mlp_beta_factor"):
        if config[key] != 1:
            raise refused(key, config[key], "has no counterpart in our model; wanted 1")
    alpha, blocks = float(config["full_attn_alpha_factor"]), config["num_hidden_layers"]
    if config["mlp_alpha_factor"] != config["full_attn_alpha_factor"]:
        raise refused("mlp_alpha_factor", config["mlp_alpha_factor"], f"differs from full_attn_alpha_factor={alpha}")
    return post_of(alpha, blocks)


def post_of(alpha: float, num_blocks: int) -> Settings:
    """Settings of the post-norm topology with this factor on the trunk."""
    at = Position(block=0, num_blocks=num_blocks, sublayer="attention", dim=1)
    for name in ("deepnorm", "deepnorm_glm", "post"):
        if topology(name).residual(at, TopologyOptions()).alpha == alpha:
            return {"topology": name}
    return {"topology": "post", "topology_options": {"alpha": alpha}}


def trunk_alpha(recipe: ModelRecipe) -> float:
    """The factor on the trunk of the first sub-layer."""
    at = Position(block=0, num_blocks=recipe.num_blocks, sublayer="attention", dim=recipe.dim)
    return topology(recipe.topology).residual(at, recipe.topology_options).alpha


def branch_gate(recipe: ModelRecipe) -> float:
    """The constant factor on the first branch; 1 where it is learned."""
    at = Position(block=0, num_blocks=recipe.num_blocks, sublayer="attention", dim=recipe.dim)
    gate = topology(recipe.topology).residual(at, recipe.topology_options).constant_gate
    return 1.0 if gate is None else gate


def whole_logits_scaling(recipe: ModelRecipe) -> float:
    """The divisor of the logits, the topology's part in it included."""
    return recipe.logits_scaling / topology(recipe.topology).logit_scale(recipe.dim, recipe.topology_options)


def scale(recipe: ModelRecipe) -> float:
    """The factor on products of queries and keys."""
    return recipe.head_width**-0.5 if recipe.attention_multiplier is None else recipe.attention_multiplier


def _gemma_scale(recipe: ModelRecipe) -> dict[str, Any]:
    """The number whose -1/2nd power is the factor on scores, whole where that is exact."""
    number = scale(recipe) ** -2
    return {"query_pre_attn_scalar": round(number) if round(number) ** -0.5 == scale(recipe) else number}


# What many classes share, in parts.
_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "dim"),
    Same("num_hidden_layers", "num_blocks"),
    Same("num_attention_heads", "num_heads"),
    Same("max_position_embeddings", "seq_len"),
    Same("intermediate_size", "ffn_dim"),
    Same("tie_word_embeddings", "tied_embeddings"),
)
_KV_HEADS = Same("num_key_value_heads", "num_kv_heads", fallback="num_attention_heads")
_HEAD_DIM = By(
    ("head_dim",),
    lambda recipe: {"head_dim": recipe.head_width},
    lambda config: {"head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]},
)
_DERIVED_HEAD_DIM = By(
    (), lambda recipe: {}, lambda config: {"head_dim": config["hidden_size"] // config["num_attention_heads"]}
)
_NO_BIAS = Always({"bias": False, "attention_bias": "none"})
_RMS_NORM = (Same("rms_norm_eps", "norm_eps"), Always({"norm": "rmsnorm", "norm_zero_centered": False}))
_LAYER_NORM = Always({"norm": "layernorm", "norm_bias": True, "norm_zero_centered": False})
_PRE = Always({"topology": "pre", "embedding_norm": False})
_PLAIN_ATTENTION = Always({"qk_norm": "none"})
_ATTENTION_BIAS = Choice("attention_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "all"})))
_MLP_BIAS = Choice("mlp_bias", ((False, {"bias": False}), (True, {"bias": True})))
_SWIGLU = (("silu", {"ffn": "swiglu"}), ("swish", {"ffn": "swiglu"}))
_GATED = (
    *_SWIGLU,
    ("gelu", {"ffn": "geglu"}),
    ("gelu_pytorch_tanh", {"ffn": "geglu_tanh"}),
    ("gelu_new", {"ffn": "geglu_tanh"}),
)
_UNGATED = (
    ("gelu", {"ffn": "gelu"}),
    ("gelu_new", {"ffn": "gelu_tanh"}),
    ("gelu_pytorch_tanh", {"ffn": "gelu_tanh"}),
    ("gelu_fast", {"ffn": "gelu_tanh"}),
    ("relu", {"ffn": "relu"}),
)
_GATED_ACT, _UNGATED_ACT = Choice("hidden_act", _GATED), Choice("hidden_act", _UNGATED)
_BLOCK = "blocks.{}."
_QKV, _OUT = _BLOCK + "attention.branch.qkv", _BLOCK + "attention.branch.out"
_GATE_UP, _UP, _DOWN = (_BLOCK + f"ffn.branch.{name}" for name in ("gate_up", "up", "down"))
_ENDS = {"model.embed_tokens": Of("embedding"), "model.norm": Of("final_norm"), "lm_head": Of("head")}
_LAYER = "model.layers.{}."
_ATTENTION = {
    _LAYER + "self_attn.q_proj": Of(_QKV, heads("q")),
    _LAYER + "self_attn.k_proj": Of(_QKV, heads("k")),
    _LAYER + "self_attn.v_proj": Of(_QKV, part("v")),
    _LAYER + "self_attn.o_proj": Of(_OUT),
}
_QK_NORMS = {
    _LAYER + "self_attn.q_norm": Of(_BLOCK + "attention.branch.q_norm", one_head(halves)),
    _LAYER + "self_attn.k_norm": Of(_BLOCK + "attention.branch.k_norm", one_head(halves)),
}
_DOWN_PROJ = {_LAYER + "mlp.down_proj": Of(_DOWN)}
_MLP = {
    _LAYER + "mlp.gate_proj": Of(_GATE_UP, part("gate")),
    _LAYER + "mlp.up_proj": Of(_GATE_UP, part("up")),
    **_DOWN_PROJ,
}
_PRE_NORMS = {
    _LAYER + "input_layernorm": Of(_BLOCK + "attention.norm_in"),
    _LAYER + "post_attention_layernorm": Of(_BLOCK + "ffn.norm_in"),
}
_LLAMA = _ENDS | _PRE_NORMS | _ATTENTION | _MLP
_BRANCH_NORMS = {
    _LAYER + "post_attention_layernorm": Of(_BLOCK + "attention.norm_branch"),
    _LAYER + "post_feedforward_layernorm": Of(_BLOCK + "ffn.norm_branch"),
}
_FOUR_NORMS = _BRANCH_NORMS | {
    _LAYER + "input_layernorm": Of(_BLOCK + "attention.norm_in"),
    _LAYER + "pre_feedforward_layernorm": Of(_BLOCK + "ffn.norm_in"),
}

_llama = Family(
    name="llama",
    divided_dim=True,
    architecture="LlamaForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, _ATTENTION_BIAS, _MLP_BIAS, _PRE, _PLAIN_ATTENTION,
    ),
    modules=_LLAMA,
)  # fmt: skip
_mistral = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, _NO_BIAS, _PRE, _PLAIN_ATTENTION, Window(layers=False),
    ),
    modules=_LLAMA,
)  # fmt: skip
_qwen2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _DERIVED_HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, Always({"bias": False, "attention_bias": "qkv"}),
        _PRE, _PLAIN_ATTENTION, Window(unless="use_sliding_window"),
    ),
    modules=_LLAMA,
)  # fmt: skip
_qwen3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, _ATTENTION_BIAS, Always({"bias": False, "qk_norm": "head"}),
        _PRE, Window(unless="use_sliding_window"),
    ),
    modules=_LLAMA | _QK_NORMS,
)  # fmt: skip
_granite = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _DERIVED_HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, _ATTENTION_BIAS, _MLP_BIAS, _PLAIN_ATTENTION,
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
    modules=_LLAMA,
)  # fmt: skip
_glm4 = Family(
    name="glm4",
    architecture="Glm4ForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _HEAD_DIM, *_RMS_NORM, Rope(partial=True), _GATED_ACT,
        Choice("attention_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "qkv"}))),
        Always({"bias": False, "topology": "sandwich", "embedding_norm": False}), _PLAIN_ATTENTION,
    ),
    modules={
        **_ENDS,
        **_ATTENTION,
        _LAYER + "self_attn.q_proj": Of(_QKV, heads("q", pairs)),
        _LAYER + "self_attn.k_proj": Of(_QKV, heads("k", pairs)),
        _LAYER + "mlp.gate_up_proj": Of(_GATE_UP),
        **_DOWN_PROJ,
        _LAYER + "input_layernorm": Of(_BLOCK + "attention.norm_in"),
        _LAYER + "post_self_attn_layernorm": Of(_BLOCK + "attention.norm_branch"),
        _LAYER + "post_attention_layernorm": Of(_BLOCK + "ffn.norm_in"),
        _LAYER + "post_mlp_layernorm": Of(_BLOCK + "ffn.norm_branch"),
    },
)  # fmt: skip
_GEMMA = (
    *_SIZES, _KV_HEADS, _HEAD_DIM, _ATTENTION_BIAS, Choice("hidden_activation", (_GATED[3], _GATED[4], *_GATED[:3])),
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
    Always({"norm": "rmsnorm", "norm_zero_centered": True, "bias": False, "topology": "sandwich", "embedding_norm": False}),
)  # fmt: skip
_gemma2 = Family(
    name="gemma2",
    divided_dim=True,
    architecture="Gemma2ForCausalLM",
    fields=(*_GEMMA, Rope(), _PLAIN_ATTENTION),
    modules=_ENDS | _FOUR_NORMS | _ATTENTION | _MLP,
)
_gemma3 = Family(
    name="gemma3_text",
    divided_dim=True,
    architecture="Gemma3ForCausalLM",
    fields=(*_GEMMA, Rope(by_layer_type=True), Always({"qk_norm": "head"})),
    modules=_ENDS | _FOUR_NORMS | _ATTENTION | _QK_NORMS | _MLP,
)
_OLMO = (
    *_SIZES, _KV_HEADS, _DERIVED_HEAD_DIM, *_RMS_NORM, _GATED_ACT, _ATTENTION_BIAS,
    Always({"bias": False, "topology": "reordered", "embedding_norm": False, "qk_norm": "full"}),
)  # fmt: skip
_olmo2 = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=(*_OLMO, Rope()),
    modules=_ENDS | _BRANCH_NORMS | _ATTENTION | _QK_NORMS | _MLP,
)
_olmo3 = Family(
    name="olmo3",
    architecture="Olmo3ForCausalLM",
    fields=(*_OLMO, Rope(by_layer_type=True), Window()),
    modules=_olmo2.modules,
)
_minimax = Family(
    name="minimax",
    architecture="MiniMaxForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _HEAD_DIM, *_RMS_NORM, Rope(), _GATED_ACT, _NO_BIAS, _PLAIN_ATTENTION,
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
        **_ENDS,
        **_ATTENTION,
        "model.layers.0.input_layernorm": Of("embedding_norm"),
        _LAYER + "post_attention_layernorm": Of(_BLOCK + "attention.norm_out"),
        "model.layers.{next}.input_layernorm": Of(_BLOCK + "ffn.norm_out"),
        _LAYER + "block_sparse_moe.experts.0.w1": Of(_GATE_UP, part("gate")),
        _LAYER + "block_sparse_moe.experts.0.w3": Of(_GATE_UP, part("up")),
        _LAYER + "block_sparse_moe.experts.0.w2": Of(_DOWN),
    },
    renamed={"model.layers.{num_blocks}.input_layernorm": "model.norm"},
    constants={_LAYER + "block_sparse_moe.gate.weight": Constant(("1", "dim"))},
)  # fmt: skip


def _all_full(config: Config) -> Settings:
    for kind in config["layer_types"]:
        if kind != "full_attention":
            raise refused("layer_types", kind, "is no attention that our model has")
    return {}


_gpt_neox = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        *_SIZES, _DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), _LAYER_NORM, Rope(partial=True), _UNGATED_ACT,
        By((), lambda recipe: {}, lambda config: {"num_kv_heads": config["num_attention_heads"]}),
        _ATTENTION_BIAS, Always({"bias": True}), _PRE, _PLAIN_ATTENTION, Fixed("use_parallel_residual", False),
        Fixed("is_decoder", False, others=(True,)),
    ),
    modules={
        "gpt_neox.embed_in": Of("embedding"),
        "gpt_neox.layers.{}.input_layernorm": Of(_BLOCK + "attention.norm_in"),
        "gpt_neox.layers.{}.attention.query_key_value": Of(_QKV, groups),
        "gpt_neox.layers.{}.attention.dense": Of(_OUT),
        "gpt_neox.layers.{}.post_attention_layernorm": Of(_BLOCK + "ffn.norm_in"),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": Of(_UP),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": Of(_DOWN),
        "gpt_neox.final_layer_norm": Of("final_norm"),
        "embed_out": Of("head"),
    },
    prefix="gpt_neox.",
)  # fmt: skip
_starcoder2 = Family(
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _DERIVED_HEAD_DIM, Same("norm_epsilon", "norm_eps"), _LAYER_NORM, Rope(), _UNGATED_ACT,
        Choice("use_bias", ((True, {"bias": True, "attention_bias": "all"}), (False, {"bias": False, "attention_bias": "none"}))),
        _PRE, _PLAIN_ATTENTION, Window(layers=False),
    ),
    modules=_ENDS | _PRE_NORMS | _ATTENTION | {_LAYER + "mlp.c_fc": Of(_UP), _LAYER + "mlp.c_proj": Of(_DOWN)},
)  # fmt: skip
_stablelm = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    fields=(
        *_SIZES, _KV_HEADS, _DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), _LAYER_NORM, Rope(partial=True), _GATED_ACT,
        Choice("use_qkv_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "qkv"}))), Always({"bias": False}),
        _PRE, _PLAIN_ATTENTION, Fixed("qk_layernorm", False), Fixed("use_parallel_residual", False),
    ),
    modules=_LLAMA,
)  # fmt: skip
_LEARNED = Always({"positions": "learned", "bias": True, "attention_bias": "all"})
_GPT_SIZES = (
    Same("vocab_size", "vocab_size"),
    Same("n_embd", "dim"),
    Same("n_layer", "num_blocks"),
    Same("n_head", "num_heads"),
    Same("n_positions", "seq_len"),
    Same("layer_norm_epsilon", "norm_eps"),
    Same("tie_word_embeddings", "tied_embeddings"),
    By(
        (),
        lambda recipe: {},
        lambda config: {"num_kv_heads": config["n_head"], "head_dim": config["n_embd"] // config["n_head"]},
    ),
    _LAYER_NORM,
    _LEARNED,
    _PLAIN_ATTENTION,
)
_H = "transformer.h.{}."
_GPT_MODULES = {
    _H + "attn.c_attn": Of(_QKV, transposed=True),
    _H + "attn.c_proj": Of(_OUT, transposed=True),
    _H + "mlp.c_fc": Of(_UP, transposed=True),
    _H + "mlp.c_proj": Of(_DOWN, transposed=True),
    "lm_head": Of("head"),
}
_gpt2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(
        *_GPT_SIZES, Choice("activation_function", _UNGATED), _PRE,
        By(
            ("n_inner",),
            lambda recipe: {"n_inner": recipe.ffn_width},
            lambda config: {"ffn_dim": config.get("n_inner") or 4 * config["n_embd"]},
        ),
        Fixed("scale_attn_weights", True), Fixed("scale_attn_by_inverse_layer_idx", False), Fixed("add_cross_attention", False),
        Fixed("reorder_and_upcast_attn", False, others=(True,)),
    ),
    modules={
        "transformer.wte": Of("embedding"),
        "transformer.wpe": Of("positions"),
        _H + "ln_1": Of(_BLOCK + "attention.norm_in"),
        _H + "ln_2": Of(_BLOCK + "ffn.norm_in"),
        **_GPT_MODULES,
        "transformer.ln_f": Of("final_norm"),
    },
    prefix="transformer.",
)  # fmt: skip
_POST = Always({"topology": "post", "embedding_norm": False})
_openai_gpt = Family(
    name="openai-gpt",
    architecture="OpenAIGPTLMHeadModel",
    fields=(
        *_GPT_SIZES, _POST, Choice("afn", (("gelu", {"ffn": "gelu_tanh"}), ("relu", {"ffn": "relu"}))),
        By((), lambda recipe: {}, lambda config: {"ffn_dim": 4 * config["n_embd"]}),
    ),
    modules={
        "transformer.tokens_embed": Of("embedding"),
        "transformer.positions_embed": Of("positions"),
        _H + "ln_1": Of(_BLOCK + "attention.norm_out"),
        _H + "ln_2": Of(_BLOCK + "ffn.norm_out"),
        **_GPT_MODULES,
    },
    prefix="transformer.",
)  # fmt: skip
_DECODER = "model.decoder.layers.{}."


def _opt(norm: str) -> dict[str, Of]:
    return {
        "model.decoder.embed_tokens": Of("embedding"),
        "model.decoder.embed_positions": Of("positions", after(2)),
        _DECODER + "self_attn.q_proj": Of(_QKV, part("q")),
        _DECODER + "self_attn.k_proj": Of(_QKV, part("k")),
        _DECODER + "self_attn.v_proj": Of(_QKV, part("v")),
        _DECODER + "self_attn.out_proj": Of(_OUT),
        _DECODER + "self_attn_layer_norm": Of(_BLOCK + f"attention.{norm}"),
        _DECODER + "fc1": Of(_UP),
        _DECODER + "fc2": Of(_DOWN),
        _DECODER + "final_layer_norm": Of(_BLOCK + f"ffn.{norm}"),
        "model.decoder.final_layer_norm": Of("final_norm"),
        "lm_head": Of("head"),
    }


_OPT = (
    Same("vocab_size", "vocab_size"),
    Same("hidden_size", "dim"),
    Same("num_hidden_layers", "num_blocks"),
    Same("num_attention_heads", "num_heads"),
    Same("max_position_embeddings", "seq_len"),
    Same("ffn_dim", "ffn_dim"),
    Same("tie_word_embeddings", "tied_embeddings"),
    By(
        ("word_embed_proj_dim",),
        lambda recipe: {"word_embed_proj_dim": recipe.dim},
        lambda config: _no_projection(config),
    ),
    By((), lambda recipe: {}, lambda config: {"num_kv_heads": config["num_attention_heads"]}),
    Choice("activation_function", (_UNGATED[4], *_UNGATED[:4])),
    Choice(
        "enable_bias",
        ((True, {"bias": True, "attention_bias": "all"}), (False, {"bias": False, "attention_bias": "none"})),
    ),
    Fixed("layer_norm_elementwise_affine", True),
    Fixed("_remove_final_layer_norm", False),
    Always({"positions": "learned", "norm_eps": 1e-5, "embedding_norm": False}),
    _DERIVED_HEAD_DIM,
    _LAYER_NORM,
    _PLAIN_ATTENTION,
)


def _no_projection(config: Config) -> Settings:
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        raise refused(
            "word_embed_proj_dim", config["word_embed_proj_dim"], f"is not hidden_size={config['hidden_size']}"
        )
    return {}


# One class with two wirings.
_opt_post = Family(
    name="opt",
    architecture="OPTForCausalLM",
    fields=(*_OPT, Fixed("do_layer_norm_before", False), Always({"topology": "post"})),
    modules=_opt("norm_out"),
)
_opt_pre = Family(
    name="opt",
    architecture="OPTForCausalLM",
    fields=(*_OPT, Fixed("do_layer_norm_before", True), Always({"topology": "pre"})),
    modules=_opt("norm_in"),
)
_BERT = "bert.encoder.layer.{}."
_bert = Family(
    name="bert-generation",
    architecture="BertGenerationDecoder",
    fields=(
        *_SIZES, _DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), _LAYER_NORM, _LEARNED, _UNGATED_ACT, _PLAIN_ATTENTION,
        Always({"topology": "post", "embedding_norm": True}), Fixed("is_decoder", True), Fixed("add_cross_attention", False),
        By((), lambda recipe: {}, lambda config: {"num_kv_heads": config["num_attention_heads"]}),
    ),
    modules={
        "bert.embeddings.word_embeddings": Of("embedding"),
        "bert.embeddings.position_embeddings": Of("positions"),
        "bert.embeddings.LayerNorm": Of("embedding_norm"),
        _BERT + "attention.self.query": Of(_QKV, part("q")),
        _BERT + "attention.self.key": Of(_QKV, part("k")),
        _BERT + "attention.self.value": Of(_QKV, part("v")),
        _BERT + "attention.output.dense": Of(_OUT),
        _BERT + "attention.output.LayerNorm": Of(_BLOCK + "attention.norm_out"),
        _BERT + "intermediate.dense": Of(_UP),
        _BERT + "output.dense": Of(_DOWN),
        _BERT + "output.LayerNorm": Of(_BLOCK + "ffn.norm_out"),
        "lm_head.decoder": Of("head"),
    },
    constants={
        "lm_head.bias": Constant(("vocab_size",), must=True),
        "lm_head.decoder.bias": Constant(("vocab_size",), must=True, untied=True),
    },
    prefix="bert.",
)  # fmt: skip

# In the order in which ``auto`` tries them: of classes that hold the same model the one that most programs know.
FAMILIES = (
    _llama, _qwen2, _qwen3, _granite, _glm4, _olmo2, _minimax, _gpt2, _gpt_neox, _starcoder2, _stablelm, _openai_gpt, _opt_post,
    _opt_pre, _bert, _gemma2, _gemma3, _mistral, _olmo3,
)  # fmt: skip
