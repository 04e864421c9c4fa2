"""Families with LayerNorm: pre-norm with rotary or learned positions, and post-norm."""

from megaresnorm.convert.family import (
    ATTENTION,
    ATTENTION_BIAS,
    BLOCK,
    DERIVED_HEAD_DIM,
    DERIVED_KV_HEADS,
    DOWN,
    ENDS,
    GATED_ACT,
    KV_HEADS,
    LAYER,
    LAYER_NORM,
    LLAMA,
    OUT,
    PLAIN_ATTENTION,
    PRE,
    PRE_NORMS,
    QKV,
    SIZES,
    UNGATED,
    UNGATED_ACT,
    UP,
    Constant,
    Family,
    Of,
    written_dropout,
)
from megaresnorm.convert.fields import Always, By, Choice, Config, Fixed, Rope, Same, Settings, Window, refused
from megaresnorm.convert.rows import after, groups, part

gpt_neox = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        *SIZES, DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), LAYER_NORM, Rope(partial=True), UNGATED_ACT,
        DERIVED_KV_HEADS,
        ATTENTION_BIAS, Always({"bias": True}), PRE, PLAIN_ATTENTION, Fixed("use_parallel_residual", False),
        Fixed("is_decoder", False, others=(True,)),
    ),
    modules={
        "gpt_neox.embed_in": Of("embedding"),
        "gpt_neox.layers.{}.input_layernorm": Of(BLOCK + "attention.norm_in"),
        "gpt_neox.layers.{}.attention.query_key_value": Of(QKV, groups),
        "gpt_neox.layers.{}.attention.dense": Of(OUT),
        "gpt_neox.layers.{}.post_attention_layernorm": Of(BLOCK + "ffn.norm_in"),
        "gpt_neox.layers.{}.mlp.dense_h_to_4h": Of(UP),
        "gpt_neox.layers.{}.mlp.dense_4h_to_h": Of(DOWN),
        "gpt_neox.final_layer_norm": Of("final_norm"),
        "embed_out": Of("head"),
    },
    inside={"embed_out.weight": "lm_head.weight"},
    prefix="gpt_neox.",
)  # fmt: skip
starcoder2 = Family(
    name="starcoder2",
    unread=(
        "activation_function",
        "attention_softmax_in_fp32",
        "layer_norm_epsilon",
        "mlp_type",
        "norm_type",
        "scale_attention_softmax_in_fp32",
        "scale_attn_weights",
    ),
    architecture="Starcoder2ForCausalLM",
    fields=(
        *SIZES, KV_HEADS, DERIVED_HEAD_DIM, Same("norm_epsilon", "norm_eps"), LAYER_NORM, Rope(), UNGATED_ACT,
        Choice(
            "use_bias",
            ((True, {"bias": True, "attention_bias": "all"}), (False, {"bias": False, "attention_bias": "none"})),
        ),
        PRE, PLAIN_ATTENTION, Window(layers=False),
    ),
    modules=ENDS | PRE_NORMS | ATTENTION | {LAYER + "mlp.c_fc": Of(UP), LAYER + "mlp.c_proj": Of(DOWN)},
)  # fmt: skip
stablelm = Family(
    name="stablelm",
    architecture="StableLmForCausalLM",
    fields=(
        *SIZES, KV_HEADS, DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), LAYER_NORM, Rope(partial=True),
        GATED_ACT, Choice("use_qkv_bias", ((False, {"attention_bias": "none"}), (True, {"attention_bias": "qkv"}))),
        Always({"bias": False}), PRE, PLAIN_ATTENTION, Fixed("qk_layernorm", False),
        Fixed("use_parallel_residual", False),
    ),
    modules=LLAMA,
)  # fmt: skip
LEARNED = Always({"positions": "learned", "bias": True, "attention_bias": "all"})
GPT_SIZES = (
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
    LAYER_NORM,
    LEARNED,
    PLAIN_ATTENTION,
)
GPT_DROPOUT = written_dropout("resid_pdrop", "embd_pdrop", attention="attn_pdrop")
H = "transformer.h.{}."
GPT_MODULES = {
    H + "attn.c_attn": Of(QKV, transposed=True),
    H + "attn.c_proj": Of(OUT, transposed=True),
    H + "mlp.c_fc": Of(UP, transposed=True),
    H + "mlp.c_proj": Of(DOWN, transposed=True),
    "lm_head": Of("head"),
}
gpt2 = Family(
    name="gpt2",
    unread=("n_special", "predict_special_tokens"),
    architecture="GPT2LMHeadModel",
    fields=(
        *GPT_SIZES, GPT_DROPOUT, Choice("activation_function", UNGATED), PRE,
        By(
            ("n_inner",),
            lambda recipe: {"n_inner": recipe.ffn_width},
            lambda config: {"ffn_dim": config.get("n_inner") or 4 * config["n_embd"]},
        ),
        Fixed("scale_attn_weights", True), Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("add_cross_attention", False), Fixed("reorder_and_upcast_attn", False, others=(True,)),
    ),
    modules={
        "transformer.wte": Of("embedding"),
        "transformer.wpe": Of("positions"),
        H + "ln_1": Of(BLOCK + "attention.norm_in"),
        H + "ln_2": Of(BLOCK + "ffn.norm_in"),
        **GPT_MODULES,
        "transformer.ln_f": Of("final_norm"),
    },
    prefix="transformer.",
)  # fmt: skip
DECODER = "model.decoder.layers.{}."


def _opt(norm: str) -> dict[str, Of]:
    return {
        "model.decoder.embed_tokens": Of("embedding"),
        "model.decoder.embed_positions": Of("positions", after(2)),
        DECODER + "self_attn.q_proj": Of(QKV, part("q")),
        DECODER + "self_attn.k_proj": Of(QKV, part("k")),
        DECODER + "self_attn.v_proj": Of(QKV, part("v")),
        DECODER + "self_attn.out_proj": Of(OUT),
        DECODER + "self_attn_layer_norm": Of(BLOCK + f"attention.{norm}"),
        DECODER + "fc1": Of(UP),
        DECODER + "fc2": Of(DOWN),
        DECODER + "final_layer_norm": Of(BLOCK + f"ffn.{norm}"),
        "model.decoder.final_layer_norm": Of("final_norm"),
        "lm_head": Of("head"),
    }


OPT = (
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
    DERIVED_KV_HEADS,
    Choice("activation_function", (UNGATED[4], *UNGATED[:4])),
    Choice(
        "enable_bias",
        ((True, {"bias": True, "attention_bias": "all"}), (False, {"bias": False, "attention_bias": "none"})),
    ),
    written_dropout("dropout", attention="attention_dropout"),
    Fixed("layer_norm_elementwise_affine", True),
    Fixed("_remove_final_layer_norm", False),
    Always({"positions": "learned", "norm_eps": 1e-5, "embedding_norm": False}),
    DERIVED_HEAD_DIM,
    LAYER_NORM,
    PLAIN_ATTENTION,
)


def _no_projection(config: Config) -> Settings:
    if config["word_embed_proj_dim"] != config["hidden_size"]:
        raise refused(
            "word_embed_proj_dim", config["word_embed_proj_dim"], f"is not hidden_size={config['hidden_size']}"
        )
    return {}


# One class with two wirings.
opt_post = Family(
    name="opt",
    architecture="OPTForCausalLM",
    fields=(Fixed("do_layer_norm_before", False), *OPT, Always({"topology": "post"})),
    modules=_opt("norm_out"),
)
opt_pre = Family(
    name="opt",
    architecture="OPTForCausalLM",
    fields=(Fixed("do_layer_norm_before", True), *OPT, Always({"topology": "pre"})),
    modules=_opt("norm_in"),
)
BERT = "bert.encoder.layer.{}."
bert = Family(
    name="bert-generation",
    architecture="BertGenerationDecoder",
    fields=(
        *SIZES, DERIVED_HEAD_DIM, Same("layer_norm_eps", "norm_eps"), LAYER_NORM, LEARNED, UNGATED_ACT, PLAIN_ATTENTION,
        Always({"topology": "post", "embedding_norm": True}), Fixed("is_decoder", True),
        Fixed("add_cross_attention", False),
        DERIVED_KV_HEADS, written_dropout("hidden_dropout_prob", attention="attention_probs_dropout_prob"),
    ),
    modules={
        "bert.embeddings.word_embeddings": Of("embedding"),
        "bert.embeddings.position_embeddings": Of("positions"),
        "bert.embeddings.LayerNorm": Of("embedding_norm"),
        BERT + "attention.self.query": Of(QKV, part("q")),
        BERT + "attention.self.key": Of(QKV, part("k")),
        BERT + "attention.self.value": Of(QKV, part("v")),
        BERT + "attention.output.dense": Of(OUT),
        BERT + "attention.output.LayerNorm": Of(BLOCK + "attention.norm_out"),
        BERT + "intermediate.dense": Of(UP),
        BERT + "output.dense": Of(DOWN),
        BERT + "output.LayerNorm": Of(BLOCK + "ffn.norm_out"),
        "lm_head.decoder": Of("head"),
    },
    constants={
        "lm_head.bias": Constant(("vocab_size",), must_be_zero=True),
        "lm_head.decoder.bias": Constant(("vocab_size",), must_be_zero=True, untied=True),
    },
    prefix="bert.",
)  # fmt: skip
