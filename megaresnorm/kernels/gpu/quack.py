"""Kernels of quack (quack-kernels 0.6), which are written in CuTe.

T rows (tokens)   D columns (model dim)   V vocabulary
"""

from typing import Any

import torch
from quack.cross_entropy import cross_entropy_bwd, cross_entropy_fwd
from quack.rmsnorm import layernorm_bwd, layernorm_fwd, rmsnorm
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormOutput, NormWeights, fp8_behind
from megaresnorm.kernels.gpu.packages import add_then, is_plain_add_rms_norm

IGNORED = -1
ALIGNED = 8  # elements: rows of a slice begin at multiples of 16 bytes


@fp8_behind
def add_norm(args: AddNormArgs) -> AddNormOutput:
    """``reference.add_norm``: a plain add before an RMSNorm is one kernel, every other norm one behind our add.

    Where the sum is stored in BF16 the add is ours, too: quack would normalize the sum before it is rounded.
    """
    if not _is_fused(args):
        return add_then(normalize)(args)
    norm = args.next_norm
    assert norm is not None
    branch, trunk = rmsnorm(
        args.delta, norm.weight, residual=args.x, out_dtype=args.out_dtype, residual_dtype=args.residual_dtype,
        eps=norm.eps, prenorm=True,
    )  # fmt: skip
    return AddNormOutput(trunk, branch)


def _is_fused(args: AddNormArgs) -> bool:
    if not is_plain_add_rms_norm(args):
        return False
    return args.residual_dtype == torch.float32 and args.out_dtype in (torch.float32, torch.bfloat16)


def normalize(x_TD: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
    """``reference.normalize``, in ``out_dtype``."""
    if norm.kind == "rmsnorm":
        return rmsnorm(x_TD, norm.weight, out_dtype=out_dtype, eps=norm.eps)
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, out_dtype))
    return _LayerNorm.apply(x_TD, norm.weight, norm.bias, norm.eps).to(out_dtype)


class _LayerNorm(torch.autograd.Function):
    """Quack's LayerNorm, of which it has both passes but no function for autograd. It writes the type of x."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x_TD = x_TD.contiguous()
        y_TD, reciprocal_T, mean_T = layernorm_fwd(x_TD, weight, bias, eps, return_rstd=True, return_mean=True)
        ctx.save_for_backward(x_TD, weight, reciprocal_T, mean_T)
        ctx.has_bias = bias is not None
        return y_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight, reciprocal_T, mean_T = ctx.saved_tensors
        dy_TD = grads[0].contiguous()
        return *layernorm_bwd(x_TD, weight, dy_TD, reciprocal_T, mean_T, has_bias=ctx.has_bias), None


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``cross_entropy.cross_entropy_sums``; the backward pass **consumes** the logits, so that it can run once."""
    if logits_TV.stride(-1) != 1 or logits_TV.stride(0) % ALIGNED:
        logits_TV = logits_TV.contiguous()
    return _CrossEntropy.apply(logits_TV, labels_T, z_loss, scale)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float) -> tuple[Tensor, Tensor]:
        labels_T = labels_T.clamp(min=IGNORED)
        nll_T, log_z_T = cross_entropy_fwd(logits_TV, labels_T, ignore_index=IGNORED, return_lse=True)
        ctx.save_for_backward(logits_TV, labels_T, log_z_T)
        ctx.z_loss, ctx.scale = z_loss, scale
        nll = nll_T.sum()
        ctx.mark_non_differentiable(nll)
        if not z_loss:
            return nll, scale * nll
        return nll, scale * (nll + z_loss * torch.where(labels_T >= 0, log_z_T.square(), 0.0).sum())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """p (1 + 2 z_loss log Z) less 1 at the label, times the factor of the objective.

        Quack's kernel writes (p - onehot) times a factor a row; what the factor has of z_loss is added at the label.
        """
        logits_TV, labels_T, log_z_T = ctx.saved_tensors
        factor, of_z_loss_T = ctx.scale * grads[1], 2.0 * ctx.z_loss * log_z_T
        gradient_TV = cross_entropy_bwd(
            logits_TV, labels_T, factor * (1.0 + of_z_loss_T), log_z_T, ignore_index=IGNORED, inplace_backward=True
        )
        torch.autograd.graph.increment_version(logits_TV)  # a second backward pass, or another reader, is noticed
        if ctx.z_loss:
            at_label_T1 = torch.where(labels_T >= 0, factor * of_z_loss_T, 0.0).to(gradient_TV.dtype).unsqueeze(-1)
            gradient_TV.scatter_add_(-1, labels_T.clamp(min=0).unsqueeze(-1), at_label_T1)
        return gradient_TV, None, None, None
