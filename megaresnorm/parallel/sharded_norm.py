"""Norms over a hidden dimension that is sharded over tp: merge the statistics, or gather the stored columns.

``ColumnsLayout`` in parallel/layouts.py has a table of what a rank sends in either form.

T tokens   D columns of a whole row   d = D/p columns of this rank   p ranks
n numbers a row: 2 for LayerNorm, 1 for RMSNorm
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormKernel, AddNormOutput, NormWeights
from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels, merge_stats
from megaresnorm.parallel.branch_input import GATHER_COLUMNS, BranchInput, Gathered
from megaresnorm.parallel.collectives import (
    all_gather_blocks,
    all_reduce,
    blocks_to_columns,
    columns_to_blocks,
    reduce_scatter_blocks,
    start_all_reduce,
)
from megaresnorm.parallel.mesh import Axis


def sharded_norm(
    z_Td: Tensor, norm: NormWeights, axis: Axis, out_dtype: torch.dtype, norm_kernels: ShardedNormKernels = REFERENCE
) -> Tensor:
    """A norm over whole rows whose statistics are merged: a rank normalizes its own columns and sends none of them.

    Args:
        z_Td: this rank's columns.
        norm: its weight and bias are this rank's slices [d].

    Returns:
        [T, d] in ``out_dtype``.

    Communication:
        One all-gather of [T, n] statistics, FP32 (FP64 for FP64 z). In backward one all-reduce of [T, n] row sums, and
        the gradients of weight and bias, which are complete on each rank, are computed meanwhile.
    """
    return _ShardedNorm.apply(z_Td, norm.weight, norm.bias, norm.kind, norm.eps, axis, out_dtype, norm_kernels)


class _ShardedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float, axis: Axis, dtype: torch.dtype,
        norm_kernels: ShardedNormKernels,
    ) -> Tensor:  # fmt: skip
        ctx.norm_kernels = norm_kernels = _traceable(norm_kernels)
        everyone = all_gather_blocks(norm_kernels.stats(z, kind), axis)
        statistics = merge_stats(everyone, kind, z.shape[-1] * axis.size, eps)
        ctx.save_for_backward(z, weight, statistics)
        ctx.kind, ctx.axis, ctx.has_bias = kind, axis, bias is not None
        return norm_kernels.apply(z, statistics, weight, bias, kind, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (dy,), (z, weight, statistics) = grads, ctx.saved_tensors
        arriving = start_all_reduce(ctx.norm_kernels.grad_sums(dy, z, statistics, weight, ctx.kind), ctx.axis)
        d_weight, d_bias = ctx.norm_kernels.grad_weights(dy, z, statistics, ctx.kind)
        dz = ctx.norm_kernels.grad_apply(dy, z, statistics, arriving(), weight, ctx.kind, z.shape[-1] * ctx.axis.size)
        return dz, d_weight, d_bias if ctx.has_bias else None, None, None, None, None, None


def _traceable(norm_kernels: ShardedNormKernels) -> ShardedNormKernels:
    """The reference while torch.compile traces, which makes kernels of its own from it."""
    return REFERENCE if torch.compiler.is_compiling() else norm_kernels


def gathered_norm(
    z_Td: Tensor,
    norm: NormWeights,
    axis: Axis,
    normalize: Callable[[Tensor, NormWeights], tuple[Tensor, Tensor]],
    norm_kernels: ShardedNormKernels = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """The same norm by gathering z and normalizing whole rows on every rank.

    Args:
        z_Td: this rank's columns, stored in the type of the branch input.
        norm: its weight and bias are this rank's slices [d].
        normalize: x, norm -> (y, statistics [T, 2]) of whole rows.

    Returns:
        Whole rows of the output [T, D], whose gradient is a partial sum, and this rank's columns of them [T, d].

    Communication:
        A rank sends its z, and its slices of weight and bias as k further rows in the bits of z's dtype: one all-gather
        of [T + k, d], which the branch needs anyway. Each slice is one row, or two where z is BF16 and the slice FP32.
        In backward one reduce-scatter of [p, T, d + n], the partial gradient of whole rows with the row sums as n
        further columns. With a BF16 z the row sums travel apart, so as to stay FP32: one reduce-scatter of [p, T, d]
        and one all-reduce of [T, n].
    """
    return _GatheredNorm.apply(z_Td, norm.weight, norm.bias, norm.kind, norm.eps, axis, normalize, norm_kernels)


class _GatheredNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kind: str,
        eps: float,
        axis: Axis,
        normalize: Callable,
        norm_kernels: ShardedNormKernels,
    ) -> tuple[Tensor, Tensor]:
        ctx.norm_kernels = _traceable(norm_kernels)
        # Weight and bias travel below z, so that they cost no message of their own: as further rows (``lines``) of d
        # numbers of z's dtype, bit for bit. An FP32 slice is one row where z is FP32, and two rows where z is BF16,
        # whose numbers are half as long. With a BF16 z and a LayerNorm a rank sends:
        #
        #                 d numbers of BF16
        #              +---------------------+
        #              | z                   |  T rows
        #              |                     |
        #              +---------------------+
        #              | weight [0 : d/2]    |  2 rows (``height``): each FP32 number of the slice as two of BF16
        #              | weight [d/2 : d]    |
        #              +---------------------+
        #              | bias [0 : d/2]      |  2 rows
        #              | bias [d/2 : d]      |
        #              +---------------------+
        vectors = [weight] if bias is None else [weight, bias]
        lines = [v.view(z.dtype).view(-1, z.shape[1]) if v.dtype != z.dtype else v.unsqueeze(0) for v in vectors]
        packed = all_gather_blocks(torch.cat((z, *lines)), axis)
        rows, height = z.shape[0], lines[0].shape[0]
        whole = [
            packed[:, rows + i * height : rows + (i + 1) * height]
            .reshape(axis.size, -1)
            .contiguous()
            .view(weight.dtype)
            .flatten()
            for i in range(len(vectors))
        ]
        norm = NormWeights(kind, whole[0], whole[1] if len(whole) > 1 else None, eps)
        u, statistics = normalize(blocks_to_columns(packed[:, :rows]), norm)
        mine = _own_columns(u, axis).contiguous()
        ctx.save_for_backward(z, weight, statistics, u, *whole)
        ctx.kind, ctx.axis, ctx.has_bias = kind, axis, bias is not None
        ctx.set_materialize_grads(False)
        return u, mine

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        z, weight, statistics, u, *whole = ctx.saved_tensors
        du, d_mine = grads
        axis, layernorm = ctx.axis, ctx.kind == "layernorm"
        du = torch.zeros_like(u) if du is None else du
        if d_mine is not None:
            du = du.clone()
            _own_columns(du, axis).add_(d_mine)
        wide = du.to(weight.dtype)
        unit_times_weight = u.to(weight.dtype) - whole[1] if len(whole) > 1 else u.to(weight.dtype)
        sums = (wide * unit_times_weight).sum(-1, keepdim=True)
        if layernorm:
            sums = torch.cat((sums, (wide @ whole[0]).unsqueeze(-1)), dim=-1)
        blocks = columns_to_blocks(du, axis.size)
        if blocks.dtype == sums.dtype:
            # The sums go to every rank alike, beside its block of du, [T, d | n]: the reduction adds them up as well.
            packed = torch.cat((blocks, sums.expand(axis.size, *sums.shape)), dim=-1)
            reduced = reduce_scatter_blocks(packed, axis)
            dy, sums = reduced[:, : z.shape[1]].contiguous(), reduced[:, z.shape[1] :].contiguous()
        else:
            dy, sums = reduce_scatter_blocks(blocks, axis), all_reduce(sums, axis)
        d_weight, d_bias = ctx.norm_kernels.grad_weights(dy, z, statistics, ctx.kind)
        dz = ctx.norm_kernels.grad_apply(dy, z, statistics, sums, weight, ctx.kind, u.shape[1])
        return dz, d_weight, d_bias if ctx.has_bias else None, None, None, None, None, None


def _own_columns(x_TD: Tensor, axis: Axis) -> Tensor:
    return x_TD.chunk(axis.size, dim=1)[axis.rank]


class StreamOutput(NamedTuple):
    """``AddNormOutput`` of a sharded stream.

    Attributes:
        trunk: this rank's part of the residual stream.
        branch_input: what a branch reads; None where none does.
    """

    trunk: Tensor
    branch_input: BranchInput | None


class StreamAddNorm(Protocol):
    """``add_norm`` for a stream in a tensor layout: all tensors and weights are this rank's part of them."""

    def __call__(
        self,
        x: Tensor,
        delta: Tensor | None = None,
        /,
        *,
        alpha: float = 1.0,
        gate: float | Tensor = 1.0,
        branch_norm: NormWeights | None = None,
        norm: NormWeights | None = None,
        next_norm: NormWeights | None = None,
        residual_dtype: torch.dtype,
        out_dtype: torch.dtype | None,
    ) -> AddNormOutput | StreamOutput:
        """The trunk, in the stream's layout, and what a branch reads."""


def columns_add_norm(
    add_norm: AddNormKernel, axis: Axis, *, gather: bool, norm_kernels: ShardedNormKernels = REFERENCE
) -> StreamAddNorm:
    """``reference.add_norm`` for a stream sharded over the hidden dimension.

    x, delta, the trunk and all weights are this rank's columns. The branch input is whole rows, gathered, and its
    gradient a partial sum.

    Args:
        gather: whether the norm that makes the branch input is a ``gathered_norm``, which needs a stream stored in the
            branch's type. Otherwise, and for every other norm, statistics are merged.

    Communication:
        That of ``sharded_norm`` for each norm whose statistics are merged. For a branch input also one all-gather of
        [T, d] and in backward one reduce-scatter of [T, D], or with ``gather`` what ``gathered_norm`` sends in their
        place.
    """

    def run(
        x: Tensor,
        delta: Tensor | None = None,
        *,
        alpha: float = 1.0,
        gate: float | Tensor = 1.0,
        branch_norm: NormWeights | None = None,
        norm: NormWeights | None = None,
        next_norm: NormWeights | None = None,
        residual_dtype: torch.dtype,
        out_dtype: torch.dtype | None,
    ) -> StreamOutput:
        if branch_norm is not None and delta is not None:
            delta = sharded_norm(
                delta, branch_norm, axis, torch.promote_types(delta.dtype, torch.float32), norm_kernels
            )
        z = add_norm(x, delta, alpha=alpha, gate=gate, residual_dtype=residual_dtype, out_dtype=None).trunk
        # Two norms in a row (norm_out, then the next norm_in), or a norm_out that no branch reads: the first by itself.
        if norm is not None and (next_norm is not None or out_dtype is None):
            z, norm = sharded_norm(z, norm, axis, residual_dtype, norm_kernels), None
        if out_dtype is None:
            return StreamOutput(z, None)
        last = norm or next_norm  # post-norm: its output is trunk and branch input; pre-norm: of the branch input alone
        if last is None:
            return StreamOutput(z, Gathered.of(z.to(out_dtype), GATHER_COLUMNS, axis))
        if gather:
            u, mine = gathered_norm(z, last, axis, normalize_whole, norm_kernels)
            return StreamOutput(mine if norm is not None else z, u)
        y = sharded_norm(z, last, axis, residual_dtype if norm is not None else out_dtype, norm_kernels)
        return StreamOutput(y if norm is not None else z, Gathered.of(y.to(out_dtype), GATHER_COLUMNS, axis))

    def normalize_whole(x: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out = add_norm(x, next_norm=norm, residual_dtype=x.dtype, out_dtype=x.dtype)
        assert out.branch_input is not None
        if out.statistics is None:  # not every backend gives them
            found = _traceable(norm_kernels).stats(x, norm.kind).unsqueeze(0)
            return out.branch_input, merge_stats(found, norm.kind, x.shape[1], norm.eps)
        return out.branch_input, out.statistics

    return run
