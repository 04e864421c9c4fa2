"""The decoder-only transformer.

T tokens (batch * seq)   B batch   S seq   D model dim   V vocabulary
"""

import functools

import torch
from torch import Tensor, nn

from megaresnorm.model.attention import rotary_tables
from megaresnorm.model.block import Block
from megaresnorm.model.norm import Norm
from megaresnorm.model.residual import DropoutKey, Kernels, KeyValueCache, Rows, Stream
from megaresnorm.model.topology import topology
from megaresnorm.parallel.tensor import Embedding, Linear
from megaresnorm.recipe import ModelRecipe


class Transformer(nn.Module):
    """Token ids [B, S] -> logits [B * S, V].

    Its parameters are left uninitialised: build it on the meta device and materialise it with model/init.py.
    ``recipe`` must be resolved: model.vocab_size is set.
    """

    def __init__(self, recipe: ModelRecipe, kernels: Kernels) -> None:
        super().__init__()
        wiring = topology(recipe.topology)
        self.recipe, self.add_norm = recipe, kernels.add_norm
        self.logit_scale = wiring.logit_scale(recipe.dim, recipe.topology_options)
        norm = functools.partial(Norm, recipe.norm, recipe.dim, eps=recipe.norm_eps, bias=recipe.norm_bias)

        self.embedding = Embedding(recipe.padded_vocab_size, recipe.dim)
        self.positions = Embedding(recipe.seq_len, recipe.dim) if recipe.positions == "learned" else None
        self.embedding_norm = norm() if has_embedding_norm(recipe) else None
        # Named by global block number, so that a pipeline stage has the same names as the whole model.
        self.blocks = nn.ModuleDict({str(i): Block(recipe, i, norm, kernels) for i in range(recipe.num_blocks)})
        self.final_norm = norm() if wiring.final_norm else None
        self.head = Linear(recipe.dim, recipe.padded_vocab_size)
        if recipe.tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens_BS: Tensor,
        dropout: DropoutKey | None = None,
        *,
        documents_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """dropout: given in training only; without it nothing is dropped.
        documents: the number of every token's document, not falling along a row; a token then sees its own document alone,
        and positions start anew with each. None: a row is one document.
        cache: what earlier calls have seen; empty at first, then ``tokens`` is one token a row.

        Raises: ValueError for positions past model.seq_len when they are learned.
        """
        rows = self.rows(tokens_BS, documents_BS, cache)
        logits_TV = self.logits(self.finish(self.run_blocks(self.embed(tokens_BS, rows, dropout), rows, dropout)))
        if cache is not None:
            cache.num_tokens += rows.seq
        return logits_TV

    def rows(self, tokens_BS: Tensor, documents_BS: Tensor | None = None, cache: KeyValueCache | None = None) -> Rows:
        """What the tokens' rows are: their positions, and who sees whom. Every block reads the same."""
        batch, seq = tokens_BS.shape
        start = 0 if cache is None else cache.num_tokens
        assert start == 0 or (seq == 1 and documents_BS is None), (
            "after the first call a cache takes one token at a time"
        )
        positions, mask = torch.arange(start, start + seq, device=tokens_BS.device), None
        if documents_BS is not None:
            positions = positions - torch.searchsorted(documents_BS, documents_BS)
            mask = (documents_BS.unsqueeze(2) == documents_BS.unsqueeze(1)).tril()
        if self.recipe.positions != "rope":
            return Rows(batch, seq, positions, mask=mask, cache=cache)
        wide = torch.promote_types(self.add_norm.compute_dtype, torch.float32)
        recipe, length = self.recipe, max(self.recipe.seq_len, start + seq)
        tables = _rotary_tables(length, recipe.head_width, recipe.rope_theta, wide, tokens_BS.device)
        cos, sin = (table[start : start + seq] if documents_BS is None else table[positions] for table in tables)
        return Rows(batch, seq, positions, cos, sin, mask, cache)

    def embed(self, tokens_BS: Tensor, rows: Rows, dropout: DropoutKey | None = None) -> Stream:
        """The stream before the first block: token and position embeddings, embedding norm, dropout."""
        x_TD = self.embedding(tokens_BS.flatten())
        if self.positions is not None:
            x_TD = (x_TD.view(rows.batch, rows.seq, -1) + self._position_embeddings(rows)).flatten(0, 1)
        x_TD = self.add_norm.trunk(Stream(x_TD), self.embedding_norm)
        if dropout is not None and self.recipe.dropout > 0.0:
            x_TD = dropout.drop(x_TD, self.recipe.dropout, site=2 * self.recipe.num_blocks)
        return Stream(x_TD)

    def run_blocks(self, stream: Stream, rows: Rows, dropout: DropoutKey | None = None) -> Stream:
        """The stream after the last block."""
        for block in self.blocks.values():
            stream = block(stream, rows, dropout)
        return stream

    def finish(self, stream: Stream) -> Tensor:
        """What the output matrix reads [T, D], in the compute type: the resolved stream after the final norm."""
        return self.add_norm(stream, next_norm=None if self.final_norm is None else self.final_norm.weights())[1]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """[T, V], without the padding of the vocabulary."""
        logits_TV = self.head(hidden_TD)
        if logits_TV.shape[1] != self.recipe.vocab_size:
            logits_TV = logits_TV[:, : self.recipe.vocab_size]
        if self.logit_scale != 1.0:
            logits_TV = logits_TV * self.logit_scale
        if self.recipe.logit_softcap is not None:
            cap = self.recipe.logit_softcap
            wide = torch.promote_types(logits_TV.dtype, torch.float32)
            logits_TV = cap * torch.tanh(logits_TV.to(wide) / cap)
        return logits_TV

    def _position_embeddings(self, rows: Rows) -> Tensor:
        """[S, D], or [B, S, D] where documents are kept apart."""
        assert self.positions is not None
        if rows.positions.dim() == 2:
            return self.positions(rows.positions)
        start = 0 if rows.cache is None else rows.cache.num_tokens
        if start + rows.seq > self.recipe.seq_len:
            raise ValueError(
                f"a sequence of {start + rows.seq} tokens is longer than model.seq_len={self.recipe.seq_len}"
            )
        return self.positions.weight[start : start + rows.seq]


# Computed once per shape and shared by every block and step; plain tensors, so nothing can be left uninitialised on meta.
_rotary_tables = functools.lru_cache(maxsize=8)(rotary_tables)


def has_embedding_norm(recipe: ModelRecipe) -> bool:
    """What the recipe says, else the topology's default for this kind of norm."""
    if recipe.embedding_norm is not None:
        return recipe.embedding_norm
    return recipe.norm in topology(recipe.topology).embedding_norm
