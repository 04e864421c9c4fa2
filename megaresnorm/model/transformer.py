"""The decoder-only transformer.

T tokens (batch * seq)   B batch   S seq   D model dim   V vocabulary
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from megaresnorm.kernels.attention import Segments
from megaresnorm.kernels.cross_entropy import LogitForm
from megaresnorm.model.block import Block
from megaresnorm.model.compiled import CompiledBlocks
from megaresnorm.model.dropout import DropoutKey, DropoutMasks
from megaresnorm.model.norm import norm_of
from megaresnorm.model.rotary import rotary_tables
from megaresnorm.model.sequence import KeyValueCache, SequenceInfo
from megaresnorm.model.spans import Span
from megaresnorm.model.stream import Kernels, Stream
from megaresnorm.model.topology import SUBLAYERS, topology
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.head import OutputMatrix
from megaresnorm.parallel.layouts import FullLayout, TensorLayout
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.vocab import Embedding, VocabEmbedding, first_row
from megaresnorm.parallel.wide import widened
from megaresnorm.recipe import ModelRecipe


@dataclass(frozen=True)
class Stage:
    """The part of the model in one pipeline stage: consecutive blocks, and perhaps embedding and output matrix."""

    blocks: range
    has_embedding: bool = True
    has_head: bool = True


class Transformer(nn.Module):
    """Token ids [B, S] -> logits [B * S, V]; or a stage of it, and on a tensor-parallel axis this rank's share of it.

    Its parameters are left uninitialised: build it on the meta device and materialise it with model/init.py.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        layout: tensor layout of the stream; None: that of one rank.
        stage: None: the whole model.

    Attributes:
        runs: the blocks as they run, by the number of the first: one by one, or those that are recomputed together.
        compiled: the blocks compiled; None: they run as they are.
    """

    def __init__(
        self,
        recipe: ModelRecipe,
        kernels: Kernels,
        layout: TensorLayout | None = None,
        stage: Stage | None = None,
    ) -> None:
        super().__init__()
        wiring = topology(recipe.topology)
        self.layout = layout = layout or FullLayout(Axis("tp"))
        self.stage = stage = stage or Stage(range(recipe.num_blocks))
        self.recipe, self.add_norm = recipe, kernels.add_norm
        self.prepare_attention = kernels.prepare_attention
        self.num_sublayers = len(SUBLAYERS) * recipe.num_blocks
        self.logit_scale = wiring.logit_scale(recipe.dim, recipe.topology_options) / recipe.logits_scaling
        norm = norm_of(recipe)
        width, rows = layout.width(recipe.dim), recipe.padded_vocab_size

        self.embedding = VocabEmbedding(rows, recipe.dim, layout.axis) if stage.has_embedding else None
        learned = stage.has_embedding and recipe.positions == "learned"
        self.positions = Embedding(recipe.seq_len, width) if learned else None
        self.embedding_norm = norm(width) if stage.has_embedding and has_embedding_norm(recipe) else None
        # Named by global block number, so that a pipeline stage has the same names as the whole model.
        self.blocks = nn.ModuleDict({str(i): Block(recipe, i, norm, kernels, layout) for i in stage.blocks})
        self.runs: dict[int, Block | Span] = {int(number): cast(Block, block) for number, block in self.blocks.items()}
        self.compiled: CompiledBlocks | None = None
        self.final_norm = norm(width) if stage.has_head and wiring.final_norm else None
        self.head = OutputMatrix(recipe.dim, rows, layout.axis, kernel=kernels.linear) if stage.has_head else None
        if recipe.tied_embeddings and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        *received: Tensor,
        tokens_BS: Tensor | None = None,
        dropout: DropoutKey | None = None,
        documents_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
        labels_BS: Tensor | None = None,
        z_loss: float = 0.0,
        scale: float | Tensor = 1.0,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the model, or this stage of it.

        Args:
            *received: the token ids [B, S]; for a stage without the embedding, what the stage before it has returned.
            tokens_BS: the token ids, where they are not ``received``.
            dropout: given in training only; without it nothing is dropped.
            documents_BS: the number of every token's document, not falling along a row; a token then sees its own
                document alone, and positions start anew with each. None: a row is one document.
            cache: what earlier calls have seen; empty at first, afterwards every call has one token per row.

            labels_BS: the tokens to predict, negative where there is nothing to; for the loss.
            z_loss: of the loss, as ``cross_entropy_sums`` has it.
            scale: likewise.

        Returns:
            Logits [T, V]; with labels the sum of the losses and the objective to be differentiated; of a stage without
            the output matrix the tensors of ``wire``.

        Raises:
            ValueError: positions are learned, and some lie past model.seq_len.
            TypeError: the first stage is given more than token ids.
        """
        if self.stage.has_embedding and len(received) > 1:
            raise TypeError("a stage with the embedding receives token ids alone; all else is given by its name")
        tokens_BS = received[0] if tokens_BS is None else tokens_BS
        rows = self.rows(tokens_BS, documents_BS, cache)
        masks = None
        if dropout is not None:  # kept for a CUDA graph, as the tables of ``rows`` are
            masks = self._masks = dropout.of_stream(self.layout, self.recipe.dim, self.num_sublayers)
        stream = self.embed(tokens_BS, rows, masks) if self.stage.has_embedding else Stream.from_wire(received)
        stream = self.run_blocks(stream, rows, masks)
        if cache is not None:
            cache.num_tokens += rows.seq
        if not self.stage.has_head:
            return stream.to_wire(self.add_norm)
        if labels_BS is None:
            return self.logits(self.finish(stream))
        assert self.head is not None
        return self.head(self.finish(stream), labels_BS.flatten(), z_loss, scale)

    def wire(self, batch: int, seq: int) -> tuple[Tensor, ...]:
        """What a stage returns to the next for ``batch`` sequences of ``seq`` tokens, as tensors on the meta device."""
        rows = self.layout.tokens(torch.empty(batch * seq, device="meta"))
        shape = (len(rows), self.layout.width(self.recipe.dim))
        return (torch.empty(shape, dtype=self.add_norm.residual_dtype, device="meta"),)

    def rows(
        self, tokens_BS: Tensor, documents_BS: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> SequenceInfo:
        """The tokens' positions, rotary tables and segments, which are the same for every block."""
        batch, seq = tokens_BS.shape
        start = 0 if cache is None else cache.num_tokens
        assert start == 0 or (seq == 1 and documents_BS is None), (
            "after the first call a cache takes one token at a time"
        )
        positions = torch.arange(start, start + seq, device=tokens_BS.device)
        segments = None if documents_BS is None else Segments(documents_BS)
        if segments is not None:
            positions = positions - segments.first
            if self.prepare_attention is not None:
                self.prepare_attention(segments, self.add_norm.compute_dtype)
        if self.recipe.positions != "rope":
            return SequenceInfo(batch, seq, positions, segments=segments, cache=cache)
        wide = torch.promote_types(self.add_norm.compute_dtype, torch.float32)
        recipe, length = self.recipe, max(self.recipe.seq_len, start + seq)
        tables = _rotary_tables(recipe, length, wide, tokens_BS.device)
        self._tables = tables  # a CUDA graph goes on reading them, also where the cache has dropped them
        cos, sin = (table[start : start + seq] if segments is None else table[positions] for table in tables)
        return SequenceInfo(batch, seq, positions, cos, sin, segments, cache)

    def embed(self, tokens_BS: Tensor, rows: SequenceInfo, masks: DropoutMasks | None = None) -> Stream:
        """The stream before the first block: token and position embeddings, embedding norm, dropout."""
        assert self.embedding is not None
        x_TD = self.layout.reduce(self.embedding(tokens_BS.flatten()))
        if self.recipe.embedding_multiplier != 1.0:
            x_TD = x_TD * self.recipe.embedding_multiplier
        if self.positions is not None:
            x_TD = self._add_positions(x_TD, rows)
        x_TD = self.add_norm.trunk(Stream(x_TD), self.embedding_norm)
        if masks is not None and self.recipe.dropout > 0.0:
            x_TD = masks.at(self.num_sublayers, self.recipe.dropout)(x_TD)
        return Stream(x_TD)

    def run_blocks(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None = None) -> Stream:
        """The stream after the last block."""
        if self.compiled is not None and self.compiled.serves(rows):
            return self.compiled(stream, rows, masks)
        for first, run in self.runs.items():
            count = len(run.blocks) if isinstance(run, Span) else 1
            stream = run(stream, rows, None if masks is None else masks.of_blocks(first, count))
        return stream

    def finish(self, stream: Stream) -> BranchInput:
        """The input of the output matrix [T, D], in the compute type: the resolved stream after the final norm."""
        return self.add_norm(stream, next_norm=None if self.final_norm is None else self.final_norm.weights())[1]

    def logits(self, hidden_TD: BranchInput) -> Tensor:
        """Logits [T, V], without the padding of the vocabulary.

        Returns:
            On a tensor-parallel rank those of its share of the vocabulary, from ``first_logit`` on.
        """
        assert self.head is not None
        return self.logit_form(self.head(hidden_TD))

    def parts(self) -> Iterator[nn.Module]:
        """The modules that can be sharded by themselves, as they run: embedding, blocks, output matrix.

        Embedding and output matrix are none where they are tied.
        """
        alone = not self.recipe.tied_embeddings
        if alone and self.embedding is not None:
            yield self.embedding
        yield from self.blocks.values()
        if alone and self.head is not None:
            yield self.head

    @property
    def logit_form(self) -> LogitForm:
        """How this rank's outputs of the output matrix become logits."""
        assert self.recipe.vocab_size is not None
        rows = self.recipe.padded_vocab_size // self.layout.axis.size
        columns = min(rows, self.recipe.vocab_size - self.first_logit)
        return LogitForm(columns, self.logit_scale, self.recipe.logit_softcap)

    @property
    def first_logit(self) -> int:
        """The token id of this rank's first logit."""
        return first_row(self.recipe.padded_vocab_size, self.layout.axis)

    def _add_positions(self, x_TD: Tensor, rows: SequenceInfo) -> Tensor:
        assert self.positions is not None
        start = 0 if rows.cache is None else rows.cache.num_tokens
        if start + rows.seq > self.recipe.seq_len:
            raise ValueError(
                f"a sequence of {start + rows.seq} tokens is longer than model.seq_len={self.recipe.seq_len}"
            )
        has_all_rows = x_TD.shape[0] == rows.batch * rows.seq
        if rows.positions.dim() == 1 and has_all_rows:
            position_SD = widened(self.positions.weight)[start : start + rows.seq]
            return (x_TD.view(rows.batch, rows.seq, -1) + position_SD).flatten(0, 1)
        return x_TD + self.positions(self.layout.tokens(rows.positions.expand(rows.batch, -1).flatten()))


# Computed once per shape and shared by every block and step. They are no buffers of the model, which would be left
# uninitialised where it is built on the meta device.
_rotary_tables = functools.lru_cache(maxsize=8)(rotary_tables)


def has_embedding_norm(recipe: ModelRecipe) -> bool:
    """Whether the embedding is normalised: as the recipe says, else the topology's default for this kind of norm."""
    if recipe.embedding_norm is not None:
        return recipe.embedding_norm
    return recipe.norm in topology(recipe.topology).embedding_norm
