"""Norms over a dimension that is divided among ranks: merge the statistics, or gather the stored columns.

T tokens   D columns of a whole row   d = D/p columns of this rank
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
    """A norm over whole rows of which every rank holds its columns, and its slice of weight and bias.

    Communication: LayerNorm 2 and RMSNorm 1 floats a row, forward and backward; there the gradients of weight and bias, which are
    whole, are computed meanwhile.
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
    """torch.compile makes kernels of its own from the reference."""
    return REFERENCE if torch.compiler.is_compiling() else norm_kernels


def gathered_norm(
    z_Td: Tensor,
    norm: NormWeights,
    axis: Axis,
    normalize: Callable[[Tensor, NormWeights], tuple[Tensor, Tensor]],
    norm_kernels: ShardedNormKernels = REFERENCE,
) -> tuple[Tensor, Tensor]:
    """The same norm by gathering z: whole rows of its output [T, D], whose gradient is a partial sum, and this rank's columns.

    Weight and bias travel with z as further rows, in its type's bits. Communication: the all-gather that a branch needs anyway, and
    in backward its reduce-scatter, in which the row sums travel (a BF16 stream sends them apart, in FP32).
    normalize: x, norm -> (y, statistics [T, 2]) of whole rows.
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
    """``AddNormOutput`` of a divided stream: this rank's part of the trunk, and what a branch reads."""

    trunk: Tensor
    branch_input: BranchInput | None


class StreamAddNorm(Protocol):
    """``add_norm`` for a stream in a tensor layout: tensors and weights are this rank's part of it."""

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
    """``reference.add_norm`` for a stream that is divided by column: x, delta, the trunk and all weights are this rank's columns.

    The branch input is whole rows, gathered, and its gradient a partial sum. gather: by the second form where a norm makes the
    branch input, which needs a stream stored in the branch's type; else, and for every other norm, statistics are merged.
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
        if norm is not None and (next_norm is not None or out_dtype is None):
            z, norm = sharded_norm(z, norm, axis, residual_dtype, norm_kernels), None
        if out_dtype is None:
            return StreamOutput(z, None)
        last = norm or next_norm
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
