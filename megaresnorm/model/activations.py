"""Memory that autograd keeps for the backward pass of a block, in bytes per token: an estimate from tensor shapes.

It follows what kernels and branches save: a residual connection saves the sum and what is read from it, a branch the
inputs of its matrices and of its activation. Backends that save more or less than the fastest ones are not told apart.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megaresnorm.model.topology import SUBLAYERS, ResidualSpec, TokenGate, residual_at, topology
from megaresnorm.recipe import ModelRecipe


def logit_bytes(recipe: ModelRecipe, tp: int, compute: int, *, in_place: bool) -> tuple[int, int]:
    """Bytes per token of the logits with their gradient: at most, and what is kept from forward to backward.

    Args:
        compute: bytes of an element.
        in_place: whether the loss reads the outputs of the output matrix as they are, and writes their gradient over
            them (``kernels.cross_entropy.LossPieces``). Otherwise what comes between the two are tensors, too.
    """
    columns = recipe.padded_vocab_size // tp
    if in_place:
        return compute * columns, compute * columns
    scale = topology(recipe.topology).logit_scale(recipe.dim, recipe.topology_options) / recipe.logits_scaling
    padded = recipe.padded_vocab_size != recipe.vocab_size  # the slice's gradient is another tensor
    most = (2 if padded or scale != 1.0 else 1) * compute
    if recipe.logit_softcap is None:
        return most * columns, compute * columns
    wide = max(4, compute)  # the result of tanh is kept for its gradient
    return 3 * wide * columns, 2 * wide * columns


class ResidualKind(NamedTuple):
    """The parts of a residual connection that decide which tensors there are.

    Attributes:
        gate: None where it is a number.
    """

    norm_in: bool
    norm_inner: bool
    norm_branch: bool
    norm_out: bool
    gate: object

    @classmethod
    def of(cls, spec: ResidualSpec) -> "ResidualKind":
        """The kind of one residual connection."""
        gate = spec.gate if spec.constant_gate is None else None
        return cls(spec.norm_in, spec.norm_inner, spec.norm_branch, spec.norm_out, gate)


class BlockKind(NamedTuple):
    """The kind of a block: blocks of one kind have parameters and activations of the same shapes."""

    attention: ResidualKind
    ffn: ResidualKind

    @classmethod
    def of(cls, recipe: ModelRecipe, block: int) -> "BlockKind":
        """The kind of the block of this global number."""
        return cls(*(ResidualKind.of(residual_at(recipe, block, kind)) for kind in SUBLAYERS))


@dataclass(frozen=True)
class Activations:
    """Saved activations of the blocks of one model on one tensor-parallel rank.

    Attributes:
        tp: tensor-parallel ranks.
        divides_stream: whether the stream is sharded over them, by token or by hidden dimension.
        keeps_rows: whether linears keep whole rows of their input (recompute.gathered: keep), or this rank's share.
        compute, stream: bytes of an element of the compute type and of the stream's type.
        writes_scores: whether capped attention scores are written out, as FlexAttention on GPUs does not.
    """

    recipe: ModelRecipe
    tp: int
    divides_stream: bool
    keeps_rows: bool
    compute: int
    stream: int
    writes_scores: bool = True

    def of_block(self, kind: BlockKind) -> int:
        """Bytes per token that a block of this kind keeps."""
        attention, ffn = kind
        return self._of_residual(attention, ffn) + self._of_residual(ffn, attention) + self._of_branches(kind)

    def _of_residual(self, this: ResidualKind, following: ResidualKind) -> int:
        """The sum, what is normalised twice, and the next branch's input, or this rank's share of it."""
        dim, width = self.recipe.dim, self.recipe.dim // (self.tp if self.divides_stream else 1)
        kept = width * self.stream
        if this.norm_branch or (this.gate is not None and not isinstance(this.gate, TokenGate)):
            kept += width * self.compute  # the branch's output, for the gradient of its norm or gate
        if this.norm_out and following.norm_in:
            kept += width * self.stream
        if this.norm_out or following.norm_in or self.compute != self.stream:
            kept += (dim if self.keeps_rows else width) * self.compute
        if isinstance(this.gate, TokenGate):
            kept += dim * 4 * (self.compute < 4) + width * 4  # branch input in FP32 for the gate, y - x
        return kept

    def _of_branches(self, kind: BlockKind) -> int:
        recipe = self.recipe
        q, kv = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
        attention = (q + 2 * kv) * (1 if recipe.qk_norm == "none" else 2) + q * (1 + kind.attention.norm_inner)
        feed_forward = recipe.ffn_width * (2 + recipe.gated_ffn + kind.ffn.norm_inner)
        scores = 4 * recipe.num_heads  # the softmax's normaliser of every row
        if (
            recipe.attention_softcap is not None and self.writes_scores
        ):  # kept in FP32: capped and normalised scores, and what lies between
            scores = 3 * 4 * recipe.num_heads * recipe.seq_len
        return (self.compute * (attention + feed_forward) + scores) // self.tp
