"""The residual connection: the equation of topology.py, once, for every topology.

T tokens (batch * seq)   D model dim
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaresnorm.kernels.reference import AddNormOut, NormWeights, dropout
from megaresnorm.model.norm import Norm
from megaresnorm.model.topology import Learned, ResidualSpec, TokenGate
from megaresnorm.parallel.collectives import BranchInput, whole_rows
from megaresnorm.parallel.columns import StreamOut
from megaresnorm.parallel.layouts import TensorLayout


class Stream(NamedTuple):
    """The residual stream with at most one add pending: alpha * x + gate * delta.

    A pre-norm add belongs to the next norm's kernel, a post-norm add to its own: so the pending add travels with the
    data, and whoever owns the next norm closes it. Only plain numbers travel; a learned gate is applied in its block.
    """

    x: Tensor
    delta: Tensor | None = None
    alpha: float = 1.0
    gate: float | Tensor = 1.0


class Rows(NamedTuple):
    """What the rows of the flat stream are: ``batch`` sequences of ``seq`` tokens, each at a position of its document.

    positions: [S], or [B, S] where documents are kept apart.   cos, sin: their rotary tables, [S, H] or [B, S, H].
    mask: [B, S, S], True where a token sees another; None for all before it.   cache: keys and values of earlier tokens.
    """

    batch: int
    seq: int
    positions: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    mask: Tensor | None = None
    cache: "KeyValueCache | None" = None


class KeyValueCache:
    """Keys and values [B, C, K, H] of the tokens that every attention layer has seen, for generation."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: nn.Module, k_BSKH: Tensor, v_BSKH: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; returns all of them, the oldest first."""
        if layer in self._seen:
            k_BSKH, v_BSKH = (torch.cat(both, dim=1) for both in zip(self._seen[layer], (k_BSKH, v_BSKH), strict=True))
        self._seen[layer] = k_BSKH, v_BSKH
        return k_BSKH, v_BSKH


class DropoutKey(NamedTuple):
    """What the masks of a batch are a function of: the run's seed and the global number of every row [T]. A pipeline divides its
    tensors as it divides the batch.
    """

    seed: int
    rows: Tensor

    def of_stream(self, layout: TensorLayout, dim: int, num_blocks: int) -> "DropoutMasks":
        """The masks of what this rank has of a stream of width ``dim``."""
        keys = _keys(self.seed, 2 * num_blocks + 1, self.rows.device)
        return DropoutMasks(keys, layout.tokens(self.rows), layout.first_column(layout.width(dim)))


class DropoutMasks(NamedTuple):
    """Of a stream. keys: 64 random bits for every place of the model.   rows, first_column: global numbers, of every row [T] and of
    the first column.
    """

    keys: Tensor
    rows: Tensor
    first_column: int

    def drop(self, x: Tensor, probability: float, site: int) -> Tensor:
        """Dropout at one place of the model: site 2 i is the attention of block i, 2 i + 1 its FFN, and the embedding the last."""
        return dropout(x, probability, self.keys[site], self.rows, self.first_column)


@functools.lru_cache(maxsize=4)
def _keys(seed: int, num_sites: int, device: torch.device) -> Tensor:
    """A tensor, made once: torch.compile would take a number that differs between blocks for a float."""
    digests = (blake2b(f"{seed}/{site}".encode(), digest_size=8).digest() for site in range(num_sites))
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], device=device)


@dataclass(frozen=True)
class AddNorm:
    """The add_norm kernel of this run, bound to the type the stream is stored in and the type branches compute in."""

    kernel: Callable[..., AddNormOut | StreamOut]
    residual_dtype: torch.dtype
    compute_dtype: torch.dtype

    def __call__(
        self,
        stream: Stream,
        norm: Norm | None = None,
        next_norm: NormWeights | None = None,
        *,
        branch_norm: Norm | None = None,
    ) -> tuple[Tensor, BranchInput]:
        """Close the stream's add and open the next branch: the trunk norm(alpha * x + gate * delta), and next_norm of it."""
        out = self._run(stream, norm, next_norm, branch_norm, self.compute_dtype)
        assert out.branch_input is not None
        return out.trunk, out.branch_input

    def trunk(self, stream: Stream, norm: Norm | None = None, *, branch_norm: Norm | None = None) -> Tensor:
        """Close the stream's add where no branch reads it."""
        return self._run(stream, norm, None, branch_norm, None).trunk

    def normalize(self, x: Tensor, norm: Norm) -> Tensor:
        """One norm by itself, over the last dim, computed in FP32 and returned in x's type (and layout)."""
        flat = x.reshape(-1, x.shape[-1])
        return self.kernel(flat, norm=norm.weights(), residual_dtype=x.dtype, out_dtype=None).trunk.view(x.shape)

    def _run(
        self,
        stream: Stream,
        norm: Norm | None,
        next_norm: NormWeights | None,
        branch_norm: Norm | None,
        out_dtype: torch.dtype | None,
    ) -> AddNormOut | StreamOut:
        return self.kernel(
            stream.x,
            stream.delta,
            alpha=stream.alpha,
            gate=stream.gate,
            branch_norm=None if branch_norm is None else branch_norm.weights(),
            norm=None if norm is None else norm.weights(),
            next_norm=next_norm,
            residual_dtype=self.residual_dtype,
            out_dtype=out_dtype,
        )


class Kernels(NamedTuple):
    """What a model computes with beside matrix products: the chosen backends.

    attend: as kernels/attention.py's ``split_attention`` describes.   activate: as kernels/reference.py's ``activation``.
    normalize: x, norm -> x normalised, of rows that this rank has whole.   normalize_shared: of rows of which every
    tensor-parallel rank has its share of the columns.
    """

    add_norm: AddNorm
    attend: Callable[..., Tensor]
    activate: Callable[..., Tensor]
    normalize: Callable[[Tensor, Norm], Tensor]
    normalize_shared: Callable[[Tensor, Norm], Tensor]


class Residual(nn.Module):
    """One residual connection around one branch.

    A block runs it in three parts, so that what lies between two branches is a single kernel:

        enter    stream -> (x, u)            the pending add, then c * norm_in
        run      (x, u) -> y                 F, dropout, the token gate
        into     (x, y) -> (x', u')          norm_branch, this add and norm_out, then the next connection's c * norm_in
        leave    (x, y) -> stream            norm_branch, this add and norm_out; a plain add is left pending

    Dropout and the token gate act after norm_branch: with one of them that norm is a kernel of its own, inside run.
    """

    def __init__(
        self,
        spec: ResidualSpec,
        branch: nn.Module,
        norm: Callable[[int], Norm],
        dim: int,
        add_norm: AddNorm,
        layout: TensorLayout,
        *,
        site: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.add_norm, self.layout = spec, add_norm, layout
        self.site, self.dropout = site, dropout
        width = layout.width(dim)
        self.norm_in = norm(width) if spec.norm_in else None
        self.norm_branch = norm(width) if spec.norm_branch else None
        self.norm_out = norm(width) if spec.norm_out else None
        self.branch = branch
        self.gate = nn.Parameter(torch.empty(gate_size(spec.gate, width))) if isinstance(spec.gate, Learned) else None
        self.token_gate = nn.Linear(dim, 1) if isinstance(spec.gate, TokenGate) else None

    def enter(self, stream: Stream) -> tuple[Tensor, BranchInput]:
        return self.add_norm(stream, next_norm=self._inner_norm())

    def into(
        self, following: "Residual", x: Tensor, y: Tensor, masks: DropoutMasks | None
    ) -> tuple[Tensor, BranchInput]:
        return self.add_norm(
            self._pending(x, y),
            self.norm_out,
            following._inner_norm(),
            branch_norm=self._fused_branch_norm(masks),
        )

    def leave(self, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Stream:
        stream, branch_norm = self._pending(x, y), self._fused_branch_norm(masks)
        if self.norm_out is None and self.gate is None and branch_norm is None:
            return stream
        return Stream(self.add_norm.trunk(stream, self.norm_out, branch_norm=branch_norm))

    def run(self, x: Tensor, u: BranchInput, rows: Rows, masks: DropoutMasks | None) -> Tensor:
        """The branch's output y for its input u [T, D]; x is the trunk that a token gate mixes it with. y is laid out as x."""
        y = self.branch(u, rows)
        if self.norm_branch is not None and self._fused_branch_norm(masks) is None:
            y = self.add_norm.normalize(y, self.norm_branch)
        if masks is not None and self.dropout > 0.0:  # after the norm, which would undo its scaling
            y = masks.drop(y, self.dropout, self.site)
        if self.token_gate is not None:
            # (1 - T) x + T y = x + T (y - x), in FP32 (or FP64) so that x loses nothing.
            wide = self.token_gate.weight.dtype
            share = self.layout.token_weights(torch.sigmoid(self.token_gate(whole_rows(u).to(wide))))
            y = share * (y.to(wide) - x)
        return y

    def _fused_branch_norm(self, masks: DropoutMasks | None) -> Norm | None:
        """norm_branch where nothing comes between it and the add."""
        drops = masks is not None and self.dropout > 0.0
        return None if drops or self.token_gate is not None else self.norm_branch

    def _inner_norm(self) -> NormWeights | None:
        return None if self.norm_in is None else self.norm_in.weights(self.spec.norm_in_scale)

    def _pending(self, x: Tensor, y: Tensor) -> Stream:
        gate = self.spec.constant_gate if self.gate is None else self.gate
        return Stream(x, y, self.spec.alpha, 1.0 if gate is None else gate)  # None: run applied a token gate


def gate_size(gate: Learned, dim: int) -> int:
    """Numbers in a learned gate; a scalar is a vector of one, since sharding wants a dim."""
    return dim if gate.shape == "vector" else 1
