"""Memory that autograd keeps for the backward pass of a block, in bytes per token, by named terms.

It follows what kernels and branches save: a residual connection saves the sum and what is read from it, a branch the
inputs of its matrices and of its activation. Backends that save more or less than the fastest ones are not told apart.

    x ──┬────────────────(+)── norm_out ── x'      stored sum: what a norm or an add keeps for its own gradient
        └── norm_in ── u ── F ── y ─┘              trunk: x between norm_out and the next norm_in
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megaresnorm.model.topology import SUBLAYERS, ResidualSpec, TokenGate, residual_at, topology
from megaresnorm.recipe import ModelRecipe

_INPUT_OF = {"attention": "open", "ffn": "add"}  # the part whose kernel makes a branch's input
STATISTICS = 8  # bytes of a row's mean and 1 / deviation in FP32


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

    @property
    def gates_tokens(self) -> bool:
        """Whether the gate is a token gate, which reads the branch input and stands inside the branch."""
        return isinstance(self.gate, TokenGate)

    @property
    def reads_output(self) -> bool:
        """Whether the add needs the branch's output for a gradient: of the norm on it, or of a learned gate."""
        return not self.gates_tokens and (self.norm_branch or self.gate is not None)

    @property
    def closes(self) -> bool:
        """Whether a block ends with this add, rather than leaving it pending for the next block's kernel."""
        return self.norm_out or self.reads_output


class BlockKind(NamedTuple):
    """The kind of a block: blocks of one kind have parameters and activations of the same shapes and types."""

    attention: ResidualKind
    ffn: ResidualKind
    in_fp8: bool = False

    @classmethod
    def of(cls, recipe: ModelRecipe, block: int, *, in_fp8: bool = False) -> "BlockKind":
        """The kind of the block of this global number."""
        attention, ffn = (ResidualKind.of(residual_at(recipe, block, kind)) for kind in SUBLAYERS)
        return cls(attention, ffn, in_fp8)


class Term(NamedTuple):
    """Tensors that a block keeps, of one name.

    Attributes:
        part: open and add: of the kernel before the attention branch and of that between the branches; close: of the
            last add; attention, ffn: inside of a branch.
        size: bytes per token.
        remade: whether policy ``norm`` drops it, and whatever else drops more.
    """

    name: str
    part: Literal["open", "attention", "add", "ffn", "close"]
    size: int
    remade: bool = False


@dataclass(frozen=True)
class Activations:
    """Saved activations of the blocks of one model on one tensor-parallel rank.

    Attributes:
        tp: tensor-parallel ranks.
        layout: of the stream: full, tokens, or of columns merge or gather.
        keeps_rows: whether linears keep whole rows of their input (recompute.gathered: keep), or this rank's share.
        compute, stream: bytes of an element of the compute type and of the stream's type.
        writes: whether capped attention scores and masks of dropout are written out, and BF16 products copy what they
            read, as on CPUs; not so on GPUs.
        scaled: elements of a token that share a scale in blocks in FP8; None: all of them, or of the whole tensor.
    """

    recipe: ModelRecipe
    tp: int
    layout: Literal["full", "tokens", "merge", "gather"]
    keeps_rows: bool
    compute: int
    stream: int
    writes: bool = True
    scaled: int | None = None

    def of_block(self, kind: BlockKind, policy: str = "none") -> int:
        """Bytes per token that a block of this kind keeps from forward to backward.

        Args:
            policy: of recomputation; under ``every`` what the first block of a span keeps for all of them.
        """
        if policy in ("block", "every"):
            return self._opened(kind)
        return sum(term.size for term in self.terms(kind) if not _drops(policy, term))

    def working(self, kind: BlockKind, policy: str = "none") -> int:
        """Bytes per token beyond ``of_block`` at the fullest moment of the block's backward pass.

        What is run again lives beside gradients. The moments are the backward passes of the FFN's activation, of its
        first matrix and of attention's kernel; what backward has passed by then is gone. A span of k blocks has k - 1
        times ``of_block`` with policy none beside it.
        """
        whole, recipe, c, tp = policy in ("block", "every"), self.recipe, self.compute, self.tp
        reruns = {branch: whole or policy in (branch, "branch") for branch in SUBLAYERS}

        def live(*parts: str, branch: str = "", without: tuple[str, ...] = ()) -> int:
            """Of these parts, with the branch that is in backward run again."""
            again = reruns.get(branch, False)
            made = [part for part in parts if whole or (again and part in (branch, _INPUT_OF[branch]))]
            found = (t for t in self.terms(kind) if t.part in parts and t.name not in without)
            return sum(t.size for t in found if t.part in made or not _drops(policy, t))

        passed = ("inner norm", "token gate", "branch input in FP32")  # by backward, in a branch
        q, kv = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
        width = c * recipe.ffn_width // tp
        first = width * (1 + recipe.gated_ffn)
        # A gradient; under tp also rows that are gathered again, and columns once more as messages have them.
        read = (1 + (tp > 1) * (1 + (self.layout in ("merge", "gather")))) * c * recipe.dim
        copied = (first + c * recipe.dim) * (self.writes and c < 4)  # BF16 products of CPUs reorder their operands
        if kind.in_fp8:  # codes of the gradient, and the input as BF16 again
            copied += first // c + c * recipe.dim
        before = live("open", "attention", "add", branch="ffn")
        moments = (
            before + live("ffn", branch="ffn", without=("activation", *passed)) + width + first,
            before + first + read + copied,
            live("open", "attention", branch="attention", without=passed) + c * (2 * q + 2 * kv) // tp + read,
        )
        return max(moments) + self._width * self.stream - self.of_block(kind, policy)

    def head(self, last: BlockKind) -> int:
        """Bytes per token that final norm and output matrix keep, beside the logits.

        Args:
            last: kind of the last block.
        """
        has_norm = topology(self.recipe.topology).final_norm
        return sum(term.size for term in self._opening(has_norm, pending=not last.ffn.closes))

    def embedding(self, has_norm: bool) -> int:
        """Bytes per token that the embedding keeps for the norm on it."""
        return (self._width * self.stream + STATISTICS) if has_norm else 0

    def terms(self, kind: BlockKind) -> list[Term]:
        """All that a block of this kind keeps without recomputation. Blocks around it are taken to be of its kind."""
        attention, ffn, in_fp8 = kind
        return [
            *self._opening(attention.norm_in, pending=not ffn.closes, gate=attention, in_fp8=in_fp8),
            *self._of_attention(attention, in_fp8),
            *self._between(attention, ffn, in_fp8),
            *self._of_ffn(ffn, in_fp8),
            *self._closing(ffn, attention),
        ]

    def _read(self, width: int, in_fp8: bool) -> int:
        """Bytes that a linear layer keeps of a token's input of so many elements."""
        return width + 4 * -(-width // (self.scaled or width)) if in_fp8 else self.compute * width

    @property
    def _width(self) -> int:
        """Columns of the stream on a rank; sequence parallelism shards the tokens instead, which takes as much."""
        return self.recipe.dim // (1 if self.layout == "full" else self.tp)

    @property
    def _statistics(self) -> int:
        return STATISTICS // (self.tp if self.layout == "tokens" else 1)

    @property
    def _rounds(self) -> bool:
        """Whether a branch input is rounded from the stream, and so a tensor of its own without any norm."""
        return self.compute != self.stream

    @property
    def _mask(self) -> int:
        return self._width if self.writes and self.recipe.dropout > 0.0 else 0

    def _opened(self, kind: BlockKind) -> int:
        """What a block keeps that is run again as a whole: the trunk that its first kernel stores."""
        pending = not kind.ffn.closes
        whole = self.keeps_rows and self.tp > 1 and self.layout != "full"
        rows = self._read(self.recipe.dim, kind.in_fp8) if whole else 0
        kept = self._width * self.stream + rows + (self._statistics if kind.attention.norm_in else 0)
        return kept + (self._mask if pending else 0)

    def _opening(
        self, norm_in: bool, *, pending: bool, gate: ResidualKind | None = None, in_fp8: bool = False
    ) -> Iterator[Term]:
        """Of the kernel that opens a block, or the input of the output matrix."""
        stored = self._width * self.stream
        if norm_in or pending:  # or it was stored by the block before, and belongs to this one as its input
            yield Term("stored sum" if pending else "trunk", "open", stored)
        if norm_in:
            yield Term("statistics", "open", self._statistics)
        if pending and self._mask:
            yield Term("dropout's mask", "open", self._mask)
        rounds = self._rounds or in_fp8
        own, sum_kept = norm_in or rounds or not pending, pending and rounds
        yield from self._input("open", own=own, normed=norm_in, sum_kept=sum_kept, gate=gate, in_fp8=in_fp8)

    def _between(self, this: ResidualKind, following: ResidualKind, in_fp8: bool) -> Iterator[Term]:
        """Of the kernel that closes the attention branch's add and opens the FFN branch."""
        yield Term("stored sum", "add", self._width * self.stream)
        if this.norm_out and following.norm_in:
            yield Term("trunk", "add", self._width * self.stream)
        norms = this.norm_out + following.norm_in + (this.norm_branch and not this.gates_tokens)
        yield Term("statistics", "add", norms * self._statistics)
        yield from self._output("add", this)
        normed = this.norm_out or following.norm_in
        rounds = self._rounds or in_fp8
        own = normed or rounds
        yield from self._input("add", own=own, normed=normed, sum_kept=rounds, gate=following, in_fp8=in_fp8)

    def _closing(self, this: ResidualKind, following: ResidualKind) -> Iterator[Term]:
        """Of the kernel that closes the FFN branch's add, where it is not left pending."""
        if not this.closes:
            return
        if this.norm_out or (self._rounds and not following.norm_in):  # else it is the next block's trunk
            yield Term("stored sum", "close", self._width * self.stream)
        norms = this.norm_out + (this.norm_branch and not this.gates_tokens)
        yield Term("statistics", "close", norms * self._statistics)
        yield from self._output("close", this)

    def _output(self, part: Literal["add", "close"], this: ResidualKind) -> Iterator[Term]:
        if this.reads_output:
            yield Term("branch output", part, self._width * self.compute)
        if self._mask and not this.gates_tokens:
            yield Term("dropout's mask", part, self._mask)

    def _input(
        self,
        part: Literal["open", "add"],
        *,
        own: bool,
        normed: bool,
        sum_kept: bool,
        gate: ResidualKind | None,
        in_fp8: bool,
    ) -> Iterator[Term]:
        """The input of a branch: u, or this rank's share of it, and what a token gate keeps of it.

        Args:
            own: whether it is a tensor of its own, not the stored sum.
            normed: whether the kernel has a norm, of whose stored sum it can be made again.
            sum_kept: whether it can be made again without one.
        """
        dim, whole = self.recipe.dim, self.tp > 1 and self.layout != "full"
        gated = gate is not None and gate.gates_tokens
        branch: Literal["attention", "ffn"] = "attention" if part == "open" else "ffn"
        if whole and self.keeps_rows:
            yield Term("branch input", part, self._read(dim, in_fp8))
        elif own and not (self.layout == "gather" and normed and self.tp > 1):  # then the stored sum is gathered
            shared = gated and self.compute >= 4 and not whole  # with the gate, which keeps it as it is
            remade = (normed or sum_kept) and not shared
            yield Term("branch input", branch if shared else part, self._read(self._width, in_fp8), remade)
        if gated and (self.compute < 4 or (whole and not self.keeps_rows)):
            yield Term("branch input in FP32", branch, dim * max(4, self.compute))

    def _of_attention(self, kind: ResidualKind, in_fp8: bool) -> Iterator[Term]:
        recipe, c, tp = self.recipe, self.compute, self.tp
        q, kv = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
        heads = recipe.num_heads + recipe.kv_heads
        if recipe.qk_norm == "head":  # copies of q and k with a row a head
            yield Term("q, k before their norm", "attention", c * (q + kv) // tp + STATISTICS * heads // tp)
        elif recipe.qk_norm == "full":
            yield Term("q, k before their norm", "attention", c * (q + 2 * kv) // tp + 2 * STATISTICS)
        yield Term("q, k, v", "attention", c * (q + 2 * kv) // tp)
        scores = 4 * recipe.num_heads  # the logarithm of every row's sum
        if recipe.attention_softcap is not None and self.writes:
            scores = 3 * 4 * recipe.num_heads * recipe.seq_len  # in FP32: capped, normalised, and what lies between
        yield Term("normaliser", "attention", scores // tp)
        if kind.norm_inner or not (in_fp8 and self.writes):  # which kernels for GPUs keep for their own gradient
            yield Term("attention output", "attention", c * q // tp)
        if kind.norm_inner:
            yield Term("inner norm", "attention", self._read(q // tp, in_fp8) + STATISTICS)
        elif in_fp8:
            yield Term("attention output in FP8", "attention", self._read(q // tp, in_fp8))
        yield from self._of_gate("attention", kind)

    def _of_ffn(self, kind: ResidualKind, in_fp8: bool) -> Iterator[Term]:
        recipe, width = self.recipe, self.compute * self.recipe.ffn_width // self.tp
        read = self._read(recipe.ffn_width // self.tp, in_fp8)
        yield Term("gate, up" if recipe.gated_ffn else "up", "ffn", width * (1 + recipe.gated_ffn))
        yield Term("activation", "ffn", width if kind.norm_inner else read, remade=not kind.norm_inner)
        if kind.norm_inner:
            yield Term("inner norm", "ffn", read + STATISTICS)
        yield from self._of_gate("ffn", kind)

    def _of_gate(self, branch: Literal["attention", "ffn"], kind: ResidualKind) -> Iterator[Term]:
        if kind.gates_tokens:  # T of every token, and y - x
            wide = max(4, self.compute)
            yield Term("token gate", branch, wide * (1 + self._width) + kind.norm_branch * self._width * self.compute)


def _drops(policy: str, term: Term) -> bool:
    """Whether a policy that runs less than whole blocks again drops a term."""
    if policy == "none":
        return False
    return term.remade or term.part == policy or (policy == "branch" and term.part in SUBLAYERS)
