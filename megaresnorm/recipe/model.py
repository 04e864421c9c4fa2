"""Settings of the transformer."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from megaresnorm.limits import MAX_WIDTH
from megaresnorm.recipe.section import (
    AtLeast1,
    Blocks,
    Fraction,
    Positive,
    Section,
    SequenceLength,
    Vocabulary,
    Width,
    Word,
    divisors,
    refuse_ignored,
)

Activation = Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"]
NormKind = Literal["layernorm", "rmsnorm"]


class TopologyOptions(Section):
    """Options that a few topologies need beside a block's position; refused by those that do not use them."""

    base_dim: Width | None = None
    """completep: width of the model whose hyper-parameters are transferred."""
    base_num_blocks: Blocks | None = None
    """completep: depth (blocks) of the model whose hyper-parameters are transferred."""
    mix_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """mix_ln: share of the blocks, counted from the input, that are post-norm (the paper's 0.25 when unset)."""
    gate: Positive | None = None
    """pre: factor on every branch, Granite's residual_multiplier (1 when unset)."""
    alpha: Positive | None = None
    """post: factor on the trunk at every add (1 when unset)."""


class RopeScaling(Section):
    """How the rotary frequencies are stretched for a context longer than the one that was trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    """linear: all are divided by factor; llama3: only slow ones, with a smooth transition; yarn: arXiv:2309.00071."""
    factor: AtLeast1
    """How much longer the context becomes."""
    original_seq_len: SequenceLength | None = None
    """llama3, yarn: tokens of the context that was trained on before."""
    low_freq_factor: Positive = 1.0
    """llama3: frequencies that turn less often than this in the original context are divided by factor."""
    high_freq_factor: Positive = 4.0
    """llama3: frequencies that turn more often than this in the original context stay."""
    beta_fast: Positive = 32.0
    """yarn: frequencies that turn more often than this in the original context stay."""
    beta_slow: Positive = 1.0
    """yarn: frequencies that turn less often than this are divided by factor."""
    attention_factor: Positive | None = None
    """yarn: factor on rotated queries and keys each (0.1 ln(factor) + 1 when unset)."""
    truncate: bool = True
    """yarn: round the bounds of the transition between frequencies outwards to whole numbers."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if (self.kind == "linear") != (self.original_seq_len is None):
            problem = "has no effect with" if self.kind == "linear" else "is missing for"
            raise ValueError(f"model.rope_scaling.original_seq_len {problem} model.rope_scaling.kind={self.kind}")
        why = f"model.rope_scaling.kind={self.kind}"
        if self.kind != "llama3":
            refuse_ignored(self, "model.rope_scaling", why, "low_freq_factor", "high_freq_factor")
        elif self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor={self.low_freq_factor} must be below "
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor}"
            )
        if self.kind != "yarn":
            refuse_ignored(self, "model.rope_scaling", why, "beta_fast", "beta_slow", "attention_factor", "truncate")
        return self


class InitRecipe(Section):
    """Initialisation; the gains of the topology multiply it (DeepNorm's beta, GPT-2's 1/sqrt(2N))."""

    distribution: Literal["xavier", "normal"] = "xavier"
    """xavier: normal with variance 2 / (fan_in + fan_out) of the logical q, k, v, gate or up matrix."""
    std: Positive = 0.02
    """Standard deviation of every matrix under ``distribution: normal``."""
    embedding_std: Positive | None = None
    """Token embedding; unset: 1, or min(0.02, dim^-0.5) when tied."""
    position_std: Positive | None = None
    """Learned positions; unset: half of the token embedding's, GPT-2's ratio."""
    head_std: Positive | None = None
    """Output matrix when it is not tied; unset: dim^-0.5 (completep: base_dim^-0.5)."""
    scale_residual: bool = False
    """Multiply the out and down matrices by 1/sqrt(2 * num_blocks) on top of the topology's gains."""

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.distribution == "xavier":
            refuse_ignored(self, "model.init", "model.init.distribution=xavier", "std")
        return self


class ModelRecipe(Section):
    """The transformer: its shape, topology, norms, positions and initialisation."""

    dim: Width
    """Width of the residual stream."""
    num_blocks: Blocks
    """Blocks in the whole model; a block is two sub-layers (attention, ffn)."""
    num_heads: Width
    """Query heads."""
    seq_len: SequenceLength
    """Tokens in one training sequence."""
    num_kv_heads: Width | None = None
    """Key and value heads (grouped-query attention); unset: num_heads."""
    head_dim: Width | None = None
    """Width of one head; unset: dim / num_heads."""
    ffn_dim: Width | None = None
    """Inner width of the ffn; unset: 4 * dim, or with a gate 8/3 * dim rounded up to a multiple of 16."""
    vocab_size: Vocabulary | None = None
    """Tokens the model can predict; unset: the data set's."""
    vocab_multiple: Vocabulary = 64
    """The embedding and output matrices are padded to a multiple of this many rows."""
    topology: Word = "deepnorm"
    """How residual and normalization are wired: a name of megaresnorm.TOPOLOGIES."""
    topology_options: TopologyOptions = TopologyOptions()
    """Options of the topology, for the few that have one."""
    norm: NormKind = "rmsnorm"
    """Kind of every norm of the model."""
    norm_eps: Positive = 1e-5
    """Added to the variance (or mean square) inside every norm."""
    norm_bias: bool = True
    """LayerNorm has a bias; RMSNorm never has one."""
    norm_zero_centered: bool = False
    """A norm multiplies by 1 + weight, and its weights start at 0 (Gemma)."""
    embedding_norm: bool | None = None
    """Normalise the embedding before the first block; unset: the topology's default."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary positions inside attention, or a learned table added to the embedding."""
    rope_theta: AtLeast1 = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a head's width that is rotated (partial rotary positions)."""
    rope_scaling: RopeScaling | None = None
    """Stretch the rotary frequencies for a longer context."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Normalise queries and keys before the positions: per head, or over all heads together."""
    ffn: Activation = "swiglu"
    """swiglu: down(silu(gate(x)) * up(x)); geglu: GELU for SiLU; gelu: down(gelu(up(x))), exact; relu: ReLU for GELU;
    _tanh: GELU's approximation."""
    bias: bool = False
    """Biases in every linear layer of the blocks."""
    attention_bias: Literal["none", "qkv", "all"] | None = None
    """Biases in attention's linear layers: none, in q, k and v alone, or in out as well; unset: as bias."""
    embedding_multiplier: Positive = 1.0
    """Factor on the token embedding."""
    attention_multiplier: Positive | None = None
    """Factor on the products of queries and keys; unset: head_dim^-0.5."""
    attention_softcap: Positive | None = None
    """Attention's scores become softcap * tanh(scores / softcap) before the softmax."""
    dropout: Fraction = 0.0
    """Share of the embedding and of every branch's output that is dropped in training."""
    tied_embeddings: bool = False
    """The output matrix is the token embedding."""
    logits_scaling: Positive = 1.0
    """Logits are divided by this."""
    logit_softcap: Positive | None = None
    """Logits become softcap * tanh(logits / softcap)."""
    init: InitRecipe = InitRecipe()
    """Initialisation."""

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"model.num_heads={self.num_heads} must divide model.dim={self.dim}, or set model.head_dim; "
                f"try num_heads in {divisors(self.dim, self.num_heads)}"
            )
        if self.num_heads * self.head_width > MAX_WIDTH:
            raise ValueError(
                f"model.num_heads={self.num_heads} of model.head_dim={self.head_width} "
                f"are wider together than {MAX_WIDTH}"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads={self.kv_heads} must divide model.num_heads={self.num_heads}; "
                f"try num_kv_heads in {divisors(self.num_heads, self.kv_heads)}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(f"model.head_dim={self.head_width} must be even for model.positions=rope")
        if self.positions == "rope":
            refuse_ignored(self.init, "model.init", "model.positions=rope", "position_std")
            if self.rotary_width % 2 or not self.rotary_width:
                raise ValueError(
                    f"model.rope_fraction={self.rope_fraction} of model.head_dim={self.head_width} rotates "
                    f"{self.rotary_width} columns; wanted an even number"
                )
        else:
            keys = "rope_theta", "rope_fraction", "rope_scaling"
            refuse_ignored(self, "model", f"model.positions={self.positions}", *keys)
        if self.norm == "rmsnorm":
            refuse_ignored(self, "model", "model.norm=rmsnorm", "norm_bias")
        if self.tied_embeddings:
            refuse_ignored(self.init, "model.init", "model.tied_embeddings=true", "head_std")
        return self

    @property
    def kv_heads(self) -> int:
        """Key and value heads, set or not."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """Width of one head, set or not."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def rotary_width(self) -> int:
        """Columns of a head that are rotated."""
        return int(self.head_width * self.rope_fraction)

    @property
    def gated_ffn(self) -> bool:
        """Whether the ffn multiplies by a gate."""
        return self.ffn in ("swiglu", "geglu", "geglu_tanh")

    @property
    def ffn_width(self) -> int:
        """Inner width of the ffn, set or not."""
        if self.ffn_dim:
            return self.ffn_dim
        return -(-8 * self.dim // 3 // 16) * 16 if self.gated_ffn else 4 * self.dim

    @property
    def biases(self) -> str:
        """Attention's linear layers that have a bias: none, qkv or all."""
        return self.attention_bias or ("all" if self.bias else "none")

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer has a bias.

        Args:
            linear: qkv, out, gate_up, up or down.
        """
        if linear in ("qkv", "out"):
            return self.biases == "all" or (self.biases, linear) == ("qkv", "qkv")
        return self.bias

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and output matrices."""
        assert self.vocab_size is not None, "the recipe is resolved against the data before a model is built"
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
