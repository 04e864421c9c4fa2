"""A norm sharded over the hidden dimension, in kernels between which parallel/sharded_norm.py puts collectives.

The forward pass takes statistics of the local columns, merges them in one small collective and normalizes the local
columns; the backward pass does the same with two sums. All is computed in FP32, or FP64 for FP64 tensors, from the
stored tensor. A backend of add_norm has kernels of its own, or those here are used (``spec.sharded_norm_kernels``).

T rows (tokens)   d columns of this rank
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import NormWeights, in_type, normalize_with_statistics


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def shard_stats(z_Td: Tensor, kind: str) -> Tensor:
    """Statistics of the local columns of every row.

    Taken in two passes, never as the mean of squares less the square of the mean.

    Returns:
        [T, 2] mean and M2 (the sum of squared deviations) for LayerNorm; [T, 1] the sum of squares for RMSNorm.
    """
    z = _wide(z_Td)
    if kind == "rmsnorm":
        return torch.linalg.vector_norm(z, dim=-1, keepdim=True).square_()
    variance, mean = torch.var_mean(z, dim=-1, correction=0)
    return torch.stack((mean, variance * z.shape[-1]), dim=-1)


def merge_stats(stats_pTn: Tensor, kind: str, columns: int, eps: float) -> Tensor:
    """Statistics of whole rows, merged from those of each rank's columns.

    Args:
        stats_pTn: ``shard_stats`` of every rank; the ranks hold equal numbers of columns.
        columns: of a whole row.
    Returns:
        [T, 2], mean (0 for RMSNorm) and 1 / deviation.
    Source:
        Chan, Golub and LeVeque 1979, eq. 2.1.
    """
    if kind == "rmsnorm":
        reciprocal = (stats_pTn.sum(0) / columns + eps).rsqrt_()
        return torch.cat((torch.zeros_like(reciprocal), reciprocal), dim=-1)
    mean_pT, m2_pT = stats_pTn.unbind(-1)
    mean_T = mean_pT.mean(0)
    m2_T = m2_pT.sum(0) + (mean_pT - mean_T).square().sum(0) * (columns // len(mean_pT))
    return torch.stack((mean_T, (m2_T / columns + eps).rsqrt_()), dim=-1)


def shard_apply(
    z_Td: Tensor, statistics_T2: Tensor, weight: Tensor, bias: Tensor | None, kind: str, out_dtype: torch.dtype
) -> Tensor:
    """The norm's output for the local columns: (z - mean) / deviation * weight + bias.

    Args:
        statistics_T2: of whole rows, from ``merge_stats``.
        weight: [d], this rank's slice.
        bias: likewise.
    """
    unit = _unit(z_Td, statistics_T2, kind)
    y = unit * weight if bias is None else torch.addcmul(bias, unit, weight)
    return in_type(y, out_dtype)


def shard_grad_sums(dy_Td: Tensor, z_Td: Tensor, statistics_T2: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Partial row sums for the gradient of z, over the local columns.

    Returns:
        With g = weight * dy and unit = (z - mean) / deviation: [T, 2] the sums of g unit and g for LayerNorm, [T, 1]
        the sum of g unit for RMSNorm.
    """
    dy, unit = _wide(dy_Td), _unit(z_Td, statistics_T2, kind)
    sums = (unit.mul_(dy) @ weight).unsqueeze(-1)
    return sums if kind == "rmsnorm" else torch.cat((sums, (dy @ weight).unsqueeze(-1)), dim=-1)


def shard_grad_weights(dy_Td: Tensor, z_Td: Tensor, statistics_T2: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias [d]. They are complete: no collective is needed."""
    dy = _wide(dy_Td)
    return _unit(z_Td, statistics_T2, kind).mul_(dy).sum(0), dy.sum(0)


def shard_grad_apply(
    dy_Td: Tensor, z_Td: Tensor, statistics_T2: Tensor, sums: Tensor, weight: Tensor, kind: str, columns: int
) -> Tensor:
    """The gradient of z, in z's type: (g - mean(g) - unit mean(g unit)) / deviation, without mean(g) for RMSNorm.

    Args:
        sums: ``shard_grad_sums`` summed over the ranks.
        columns: of a whole row.
    """
    means = sums / columns
    g = (_wide(dy_Td) * weight).addcmul_(_unit(z_Td, statistics_T2, kind), means[:, :1], value=-1.0)
    if kind == "layernorm":
        g -= means[:, 1:]
    return g.mul_(statistics_T2[:, 1:]).to(z_Td.dtype)


def _unit(z_Td: Tensor, statistics_T2: Tensor, kind: str) -> Tensor:
    mean, reciprocal = statistics_T2.split(1, dim=-1)
    return _wide(z_Td) * reciprocal if kind == "rmsnorm" else (_wide(z_Td) - mean).mul_(reciprocal)


def empty_sums(z_Td: Tensor, kind: str) -> Tensor:
    """Uninitialized FP32 result of ``shard_stats`` or ``shard_grad_sums``: [T, 2] for LayerNorm, [T, 1] for RMSNorm."""
    return z_Td.new_empty((z_Td.shape[0], 2 if kind == "layernorm" else 1), dtype=torch.float32)


def normalize_blocks(z_pTd: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
    """The norm of whole rows whose columns have been gathered from every rank.

    Args:
        z_pTd: [p, T, d]; its blocks need not follow one another in memory.
        norm: weight and bias [D] of whole rows.
    Returns:
        [T, D] in z's type, and [T, 2] the statistics of the rows.
    """
    y, statistics = normalize_with_statistics(_wide(z_pTd.transpose(0, 1).flatten(1)), norm)
    return in_type(y, z_pTd.dtype), statistics


def pack_gradient(du_TD: Tensor, u_TD: Tensor, norm: NormWeights, ranks: int) -> tuple[Tensor, Tensor | None]:
    """What is sent of the gradient of ``normalize_blocks``, so that each rank gets the sum of its columns.

    With g = weight * du the row sums are those of g unit and, for LayerNorm, of g. They go to every rank alike, as
    further columns of its block where they have its type.

    Args:
        u_TD: the norm's output.
    Returns:
        [p, T, d + n] and None for FP32 (FP64); [p, T, d] and [T, n] in FP32 for BF16.
    """
    wide, u = _wide(du_TD), _wide(u_TD)
    sums = (wide * (u if norm.bias is None else u - norm.bias)).sum(-1, keepdim=True)
    if norm.kind == "layernorm":
        sums = torch.cat((sums, (wide @ norm.weight).unsqueeze(-1)), dim=-1)
    blocks = du_TD.view(len(du_TD), ranks, -1).transpose(0, 1)
    if du_TD.dtype != sums.dtype:
        return blocks.contiguous(), sums
    return torch.cat((blocks, sums.expand(ranks, *sums.shape)), dim=-1), None


class ShardedNormKernels(NamedTuple):
    """The kernels of a backend, each as the function of this file, in FP32 for FP32 and BF16 tensors."""

    stats: Callable[[Tensor, str], Tensor]
    apply: Callable[[Tensor, Tensor, Tensor, Tensor | None, str, torch.dtype], Tensor]
    grad_sums: Callable[[Tensor, Tensor, Tensor, Tensor, str], Tensor]
    grad_weights: Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]
    grad_apply: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str, int], Tensor]
    normalize_blocks: Callable[[Tensor, NormWeights], tuple[Tensor, Tensor]] = normalize_blocks
    pack_gradient: Callable[[Tensor, Tensor, NormWeights, int], tuple[Tensor, Tensor | None]] = pack_gradient


REFERENCE = ShardedNormKernels(shard_stats, shard_apply, shard_grad_sums, shard_grad_weights, shard_grad_apply)
