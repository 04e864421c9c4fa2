"""A family of models: the fields of its config.json, the names of its tensors, and tables that many families share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megaresnorm.convert.fields import Always, By, Choice, Config, Field, Same, Settings
from megaresnorm.convert.rows import Rows, every, halves, heads, one_head, part
from megaresnorm.recipe import ModelRecipe

MEGATRON_NAME = "megatron-core"  # model_type of our folders of Megatron-Core's weights
OURS = "megaresnorm"  # our model_type, and the key of every config.json that we write that has the model's recipe


class Of(NamedTuple):
    """The module of ours that a module of theirs corresponds to.

    Attributes:
        name: of our module; {} is the block, and of ``a|b`` the one that exists is meant.
        rows: which of our rows theirs has, and in which order.
        transposed: whether their matrix is the transpose of ours.
    """

    name: str
    rows: Rows = every
    transposed: bool = False


class Constant(NamedTuple):
    """A tensor of theirs, written as zeros, that our model has no place for.

    Attributes:
        must_be_zero: whether a model is refused where it is not zero; if False, it has no effect whatever it holds.
        untied: whether it exists only where the output matrix is not the embedding.
    """

    shape: tuple[str, ...]  # names of settings, or numbers
    must_be_zero: bool = False
    untied: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of another framework.

    Where several families have one name, the first field says which of them a config.json belongs to.

    Attributes:
        name: model_type of config.json.
        architecture: the class.
        modules: theirs -> ours; {next} in a name is the number of the following block.
        renamed: exceptions to the name pattern of ``modules``, pattern -> actual name.
        constants: tensors that our model has no place for.
        inside: names of tensors in files -> inside of the class, where they differ; files may have either.
        prefix: of tensor names, which may be missing in files.
        divided_dim: whether the class refuses heads whose number does not divide the width, even where head_dim says
            how wide they are.
        padded: whether files may have more rows for the vocabulary than it has tokens.
        unread: keys that published files have and the class does not look at.
    """

    name: str
    architecture: str
    fields: tuple[Field, ...]
    modules: Mapping[str, Of]
    renamed: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    inside: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."
    divided_dim: bool = False
    padded: bool = False
    unread: tuple[str, ...] = ()

    def config(self, recipe: ModelRecipe) -> dict[str, Any]:
        """The keys of config.json that describe the model."""
        values: dict[str, Any] = {}
        for one in self.fields:
            values |= one.write(recipe)
        return values

    def settings(self, config: Config) -> Settings:
        """The settings of the model that a config.json describes.

        Raises:
            CheckpointError: a key has no counterpart in our model; it is named.
        """
        found: Settings = {}
        for one in self.fields:
            found |= one.read(config)
        return found

    @property
    def keys(self) -> set[str]:
        """The keys of a config.json that this family understands."""
        return {key for one in self.fields for key in one.keys} | set(self.unread)


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
    """Fields for training alone, whose defaults differ from ours: written and not read.

    Args:
        *stream: keys that get the recipe's dropout.
        attention: the key of dropout in attention, which we do not have.
    """
    return By(
        (*stream, attention), lambda recipe: dict.fromkeys(stream, recipe.dropout) | {attention: 0.0}, lambda config: {}
    )
