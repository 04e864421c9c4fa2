"""Norms over a hidden dimension that is sharded over tp: merge the statistics, or gather the stored columns.

``ColumnsLayout`` in parallel/layouts.py has a table of what a rank sends in either form.

T tokens   D columns of a whole row   d = D/p columns of this rank   p ranks
n numbers a row: 2 for LayerNorm, 1 for RMSNorm
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, NormWeights
from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels, merge_stats
from megaresnorm.kernels.fp8.formats import Rows
from megaresnorm.parallel.branch_input import GATHER_COLUMNS, BranchInput, Collective
from megaresnorm.parallel.collectives import (
    all_reduce,
    blocks_to_columns,
    reduce_scatter_blocks,
    start_all_gather,
    start_all_reduce,
)
from megaresnorm.parallel.fp8_wire import sent
from megaresnorm.parallel.linear_kernel import PLAIN, LinearKernel
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.remade import Remakes, remade_by_kernel, remade_of_columns
from megaresnorm.parallel.transport import Pending


@dataclass(frozen=True)
class ShardedNorm:
    """A norm over whole rows whose statistics are merged: a rank normalizes its own columns and sends none of them.

    Attributes:
        axis: over which rows are sharded.
        kernels: of the chosen backend.
        chunks: parts of the rows whose statistics are merged one after the other (parallel.merge_chunks): the merge of
            one is under way while the statistics of the next are taken and the one before is normalized.
    """

    axis: Axis
    kernels: ShardedNormKernels = REFERENCE
    chunks: int = 1

    def __call__(self, z_Td: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
        """The norm of this rank's columns.

        Args:
            norm: its weight and bias are this rank's slices [d].

        Returns:
            [T, d] in ``out_dtype``.

        Communication:
            One all-gather of [T, n] statistics, FP32 (FP64 for FP64 z), in as many messages as there are chunks. In
            backward one all-reduce of [T, n] row sums, and the gradients of weight and bias, which are complete on each
            rank, are computed meanwhile.
        """
        return self.with_statistics(z_Td, norm, out_dtype)[0]

    def with_statistics(self, z_Td: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The same, and the merged statistics [T, 2], which have no gradient.

        Communication:
            The same.
        """
        return _ShardedNorm.apply(z_Td, norm.weight, norm.bias, norm.kind, norm.eps, self, out_dtype)

    @property
    def traceable(self) -> ShardedNormKernels:
        """The kernels; the reference while torch.compile traces, which makes kernels of its own from it."""
        return REFERENCE if torch.compiler.is_compiling() else self.kernels


class _ShardedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float, norm: ShardedNorm,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        axis, kernels = norm.axis, norm.traceable
        pieces = z.tensor_split(norm.chunks) if norm.chunks > 1 else (z,)
        arriving = start_all_gather(kernels.stats(pieces[0], kind), axis)
        merged, normalized = [], []
        for i, piece in enumerate(pieces):
            following = kernels.stats(pieces[i + 1], kind) if i + 1 < len(pieces) else None
            statistics = merge_stats(arriving(), kind, z.shape[-1] * axis.size, eps)
            if following is not None:
                arriving = start_all_gather(following, axis)
            merged.append(statistics)
            normalized.append(kernels.apply(piece, statistics, weight, bias, kind, dtype))
        statistics = _joined(merged)
        ctx.save_for_backward(z, weight, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.kind, ctx.axis, ctx.kernels, ctx.has_bias = kind, axis, kernels, bias is not None
        return _joined(normalized), statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        dy, (z, weight, statistics) = grads[0], ctx.saved_tensors
        arriving = start_all_reduce(ctx.kernels.grad_sums(dy, z, statistics, weight, ctx.kind), ctx.axis)
        d_weight, d_bias = ctx.kernels.grad_weights(dy, z, statistics, ctx.kind)
        dz = ctx.kernels.grad_apply(dy, z, statistics, arriving(), weight, ctx.kind, z.shape[-1] * ctx.axis.size)
        return dz, d_weight, d_bias if ctx.has_bias else None, None, None, None, None


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


# [p, T, d] and the norm of whole rows -> the norm of them [T, D], and its statistics [T, 2].
Normalize = Callable[[Tensor, NormWeights], tuple[Tensor, Tensor]]


def gathered_norm(
    z_Td: Tensor, norm: NormWeights, normalize: Normalize, sharded: ShardedNorm, *, keeps: bool = False
) -> tuple[BranchInput, Tensor]:
    """The same norm by gathering z and normalizing whole rows on every rank.

    Args:
        z_Td: this rank's columns, stored in the type of the branch input.
        norm: its weight and bias are this rank's slices [d].
        normalize: of columns that have been gathered.
        keeps: whether whole rows are kept for backward. Otherwise z, which is the residual stream, is, and is gathered
            and normalized once more there, for the linear that reads the rows and for this norm together (for each by
            itself where the linear's product is left for later, and when backward is run again).

    Returns:
        Whole rows of the output [T, D], whose gradient is a partial sum, and this rank's columns of them [T, d].

    Communication:
        A rank sends its z, and its slices of weight and bias as k further rows in the bits of z's dtype: one all-gather
        of [T + k, d], which the branch needs anyway. Each slice is one row, or two where z is BF16 and the slice FP32.
        In backward the same again unless rows are kept, and one reduce-scatter of [p, T, d + n], the partial gradient
        of whole rows with the row sums as n further columns. With a BF16 z the row sums travel apart, so as to stay
        FP32: one reduce-scatter of [p, T, d] and one all-reduce of [T, n].
    """
    keeps = keeps or torch.compiler.is_compiling()  # a compiler decides itself what it keeps
    sources = (z_Td, norm.weight) if norm.bias is None else (z_Td, norm.weight, norm.bias)
    rows = _WholeRows(norm.kind, norm.eps, normalize)
    u, mine = _GatheredNorm.apply(z_Td, norm.weight, norm.bias, rows, sharded, keeps)
    kept = tuple(source.detach() for source in sources)
    return BranchInput(u, Collective(rows.start, None), sharded.axis, kept, keeps, rows=u.detach()), mine


class _WholeRows:
    """Makes whole rows of the norm's output from stored columns, in forward and again in backward.

    Attributes:
        made: what backward has made, for the norm's own node, which takes it: the rows, and weight and bias whole.
    """

    def __init__(self, kind: str, eps: float, normalize: Normalize) -> None:
        self.kind, self.eps, self.normalize = kind, eps, normalize
        self.made: tuple[Tensor, list[Tensor]] | None = None
        self._taken = False

    def start(self, sources: tuple[Tensor, ...], axis: Axis) -> Pending:
        """Gather, as a ``Collective`` does it."""
        arriving = self.begin(sources, axis)

        def finish() -> Tensor:
            u, _, vectors = arriving()
            self.made = None if self._taken else (u, vectors)  # a linear that comes later makes it for itself
            return u

        return finish

    def begin(self, sources: tuple[Tensor, ...], axis: Axis) -> Callable[[], tuple[Tensor, Tensor, list[Tensor]]]:
        """Send z and the vectors; what is returned waits for whole rows, their statistics, and whole vectors."""
        z, *vectors = sources
        arriving = start_all_gather(_packed(z, vectors), axis)

        def finish() -> tuple[Tensor, Tensor, list[Tensor]]:
            everyone = arriving()
            whole = _unpacked(everyone, z.shape[0], vectors)
            norm = NormWeights(self.kind, whole[0], whole[1] if len(whole) > 1 else None, self.eps)
            u, statistics = self.normalize(everyone[:, : z.shape[0]], norm)
            return u, statistics, whole

        return finish

    def take(self, sources: tuple[Tensor, ...], axis: Axis) -> tuple[Tensor, list[Tensor]]:
        """What the linear's node has made, or the same made here where no linear has."""
        if self.made is None:
            self._taken = False
            self.start(sources, axis)()
        made, self.made, self._taken = self.made, None, True
        assert made is not None
        return made


# Weight and bias travel below z, so that they cost no message of their own: as further rows of d numbers of z's dtype,
# bit for bit. An FP32 slice is one row where z is FP32, and two rows where z is BF16, whose numbers are half as long.
# With a BF16 z and a LayerNorm a rank sends:
#
#                 d numbers of BF16
#              +---------------------+
#              | z                   |  T rows
#              |                     |
#              +---------------------+
#              | weight [0 : d/2]    |  2 rows: each FP32 number of the slice as two of BF16
#              | weight [d/2 : d]    |
#              +---------------------+
#              | bias [0 : d/2]      |  2 rows
#              | bias [d/2 : d]      |
#              +---------------------+
def _packed(z: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    lines = [v.view(z.dtype).view(-1, z.shape[1]) if v.dtype != z.dtype else v.unsqueeze(0) for v in vectors]
    return torch.cat((z, *lines))


def _unpacked(everyone: Tensor, rows: int, vectors: Sequence[Tensor]) -> list[Tensor]:
    """The whole vectors [D] from what all ranks have packed."""
    height = (everyone.shape[1] - rows) // len(vectors)
    return [
        everyone[:, rows + i * height : rows + (i + 1) * height]
        .reshape(len(everyone), -1)
        .contiguous()
        .view(vector.dtype)
        .flatten()
        for i, vector in enumerate(vectors)
    ]


class _GatheredNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, rows: _WholeRows, sharded: ShardedNorm, keeps: bool
    ) -> tuple[Tensor, Tensor]:
        sources = (z, weight) if bias is None else (z, weight, bias)
        u, statistics, whole = rows.begin(sources, sharded.axis)()
        mine = _own_columns(u, sharded.axis).contiguous()
        ctx.save_for_backward(statistics, *sources, *([u, *whole] if keeps else []))
        ctx.rows, ctx.axis, ctx.kernels, ctx.num_sources = rows, sharded.axis, sharded.traceable, len(sources)
        ctx.set_materialize_grads(False)
        return u, mine

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        statistics, *saved = ctx.saved_tensors
        sources, kept = tuple(saved[: ctx.num_sources]), saved[ctx.num_sources :]
        (z, weight, *_), axis, kind = sources, ctx.axis, ctx.rows.kind
        u, whole = (kept[0], kept[1:]) if kept else ctx.rows.take(sources, axis)
        du, d_mine = grads
        du = torch.zeros_like(u) if du is None else du
        if d_mine is not None:
            du = du.clone()
            _own_columns(du, axis).add_(d_mine)
        norm = NormWeights(kind, whole[0], whole[1] if len(whole) > 1 else None, ctx.rows.eps)
        packed, sums = ctx.kernels.pack_gradient(du.contiguous(), u, norm, axis.size)
        reduced = reduce_scatter_blocks(packed, axis)
        if sums is None:  # beside its columns: the reduction adds them up as well
            dy, sums = reduced[:, : z.shape[1]].contiguous(), reduced[:, z.shape[1] :].contiguous()
        else:
            dy, sums = reduced, all_reduce(sums, axis)
        d_weight, d_bias = ctx.kernels.grad_weights(dy, z, statistics, kind)
        dz = ctx.kernels.grad_apply(dy, z, statistics, sums, weight, kind, u.shape[1])
        return dz, d_weight, d_bias if len(sources) > 2 else None, None, None, None


def _own_columns(x_TD: Tensor, axis: Axis) -> Tensor:
    return x_TD.chunk(axis.size, dim=1)[axis.rank]


def columns_add_norm(
    kernel: AddNormKernel,
    args: AddNormArgs,
    sharded: ShardedNorm,
    *,
    gather: bool,
    keeps: bool,
    remakes: Remakes = Remakes.NOTHING,
    reader: LinearKernel = PLAIN,
) -> tuple[Tensor, BranchInput | None]:
    """``add_norm`` of a stream sharded over the hidden dimension.

    x, delta, the trunk and all weights are this rank's columns. The branch input is whole rows, gathered, and its
    gradient a partial sum.

    Args:
        gather: whether the norm that makes the branch input is a ``gathered_norm``, which needs a stream stored in the
            branch's type. Otherwise, and for every other norm, statistics are merged.
        keeps: whether gathered rows are kept for backward.
        remakes: as of ``TensorLayout.add_norm``; where z is gathered it is what is kept in any case.
        reader: likewise. Where z is gathered it reads what is made of it.

    Communication:
        That of ``ShardedNorm`` for each norm whose statistics are merged. For a branch input also one all-gather of
        [T, d], in backward one more unless rows are kept, and one reduce-scatter of [T, D]; or with ``gather`` what
        ``gathered_norm`` sends in their place.
    """
    delta, norm, next_norm, stored, out_dtype = (
        args.delta, args.norm, args.next_norm, args.residual_dtype, args.out_dtype,
    )  # fmt: skip
    if args.branch_norm is not None and delta is not None:
        delta = sharded(delta, args.branch_norm, torch.promote_types(delta.dtype, torch.float32))
    z = kernel(replace(args, delta=delta, branch_norm=None, norm=None, next_norm=None, out_dtype=None)).trunk
    # Two norms in a row (norm_out, then the next norm_in), or a norm_out that no branch reads: the first by itself.
    if norm is not None and (next_norm is not None or out_dtype is None):
        z, norm = sharded(z, norm, stored), None
    if out_dtype is None:
        return z, None
    last = norm or next_norm  # post-norm: its output is trunk and branch input; pre-norm: of the branch input alone
    if last is None:
        u, read = _gathered_columns(z.to(out_dtype), sharded.axis, keeps, reader)
        out = AddNormOutput(z, u.local, None, None, z.detach())
        args = replace(args, norm=None, next_norm=None)
        return z, u if keeps else remade_by_kernel(u, out, kernel, args, remakes, read)
    if gather:

        def normalize_whole(z_pTd: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
            return _normalized(z_pTd, norm, kernel, sharded.traceable)

        u, mine = gathered_norm(z, last, normalize_whole, sharded, keeps=keeps)
        return mine if norm is not None else z, u
    rounded = stored if norm is not None else out_dtype
    y, statistics = sharded.with_statistics(z, last, rounded)
    u, read = _gathered_columns(y.to(out_dtype), sharded.axis, keeps, reader)
    if not keeps and remakes.of_what_is_kept:
        u = remade_of_columns(u, z, statistics, last, sharded.traceable, rounded, read)
    return y if norm is not None else z, u


def _gathered_columns(
    u: Tensor, axis: Axis, keeps: bool, reader: LinearKernel
) -> tuple[BranchInput, Callable[[Tensor], Rows] | None]:
    """The branch input of these columns, and what makes its ``part`` of them; None where it has none."""
    return sent(BranchInput(u, GATHER_COLUMNS, axis, (u.detach(),), keeps), reader, 1)


@torch.no_grad()
def _normalized(
    z_pTd: Tensor, norm: NormWeights, kernel: AddNormKernel, norm_kernels: ShardedNormKernels
) -> tuple[Tensor, Tensor]:
    """The norm of whole rows, and their statistics [T, 2]."""
    if norm_kernels.normalize_blocks is not REFERENCE.normalize_blocks:
        return norm_kernels.normalize_blocks(z_pTd, norm)
    x = blocks_to_columns(z_pTd)
    out = kernel(AddNormArgs(x, next_norm=norm, residual_dtype=x.dtype, out_dtype=x.dtype))
    assert out.branch_input is not None
    if out.statistics is None:  # not every backend gives them
        found = norm_kernels.stats(x, norm.kind).unsqueeze(0)
        return out.branch_input, merge_stats(found, norm.kind, x.shape[1], norm.eps)
    return out.branch_input, out.statistics
