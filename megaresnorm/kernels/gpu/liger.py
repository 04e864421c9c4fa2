"""Kernels of Liger (liger-kernel 0.8), from the modules of ``liger_kernel.ops`` that have its Triton kernels.

T rows (tokens)   D columns (model dim)   F ffn dim   V vocabulary
"""

from typing import Any

import torch
from liger_kernel.ops.cross_entropy import cross_entropy_forward
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.geglu import geglu_backward, geglu_forward
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormOutput, NormWeights, fp8_behind
from megaresnorm.kernels.cross_entropy import GradientInPlace
from megaresnorm.kernels.gpu.packages import add_then, is_plain_add_rms_norm

# Its "gemma" computes in FP32 and rounds once, as our reference does; "llama" rounds before the weights, too.
CASTING, OFFSET, IN_PLACE = "gemma", 0.0, False
IGNORED = -1


@fp8_behind
def add_norm(args: AddNormArgs) -> AddNormOutput:
    """``reference.add_norm``: a plain add before an RMSNorm is one kernel, every other norm one behind our add."""
    if not _is_fused(args):
        return add_then(normalize)(args)
    norm = args.next_norm
    assert norm is not None and args.out_dtype is not None
    branch, trunk = LigerFusedAddRMSNormFunction.apply(
        args.x, args.delta, norm.weight, norm.eps, OFFSET, CASTING, IN_PLACE
    )
    return AddNormOutput(trunk, branch.to(args.out_dtype))


def _is_fused(args: AddNormArgs) -> bool:
    """Whether a call is Liger's: x + delta, stored in x's type, which is also the type of its normalized output."""
    x, delta, out = args.x, args.delta, args.out_dtype
    if delta is None or not is_plain_add_rms_norm(args):
        return False
    narrower = (torch.bfloat16, x.dtype)
    return args.residual_dtype == x.dtype and delta.dtype in narrower and out in narrower


def normalize(x_TD: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
    """``reference.normalize``, in ``out_dtype``; the kernels write the type that they read."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, out_dtype))
    if norm.kind == "rmsnorm":
        y_TD = LigerRMSNormFunction.apply(x_TD, norm.weight, norm.eps, OFFSET, CASTING, IN_PLACE)
    else:
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        y_TD = LigerLayerNormFunction.apply(x_TD, norm.weight, bias, norm.eps)
    return y_TD.to(out_dtype)


def activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """``activation.activation`` for swiglu and geglu_tanh; the bias is added in PyTorch.

    Raises:
        ValueError: another kind.
    """
    if kind not in ("swiglu", "geglu_tanh"):
        raise ValueError(f"activation/liger: has no {kind}, only swiglu and geglu_tanh; take another backend")
    if bias is not None:
        wide = torch.promote_types(h_TF.dtype, torch.float32)
        h_TF = (h_TF.to(wide) + bias.to(wide)).to(h_TF.dtype)
    return LigerFusedGateUpSiLUMulFunction.apply(h_TF) if kind == "swiglu" else _TanhGEGLU.apply(h_TF)


class _TanhGEGLU(torch.autograd.Function):
    """Liger's GEGLU of one tensor. Its kernels take the halves as tensors and overwrite them with the gradients.

    They are given copies, which live no longer than a call, so that the backward pass can run again.
    """

    @staticmethod
    def forward(ctx: Any, h_TF: Tensor) -> Tensor:
        ctx.save_for_backward(h_TF)
        return geglu_forward(*_halves(h_TF))[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h_TF,) = ctx.saved_tensors
        return torch.cat(geglu_backward(*_halves(h_TF), grads[0].contiguous()), dim=-1)


def _halves(h_TF: Tensor) -> list[Tensor]:
    return [half.clone(memory_format=torch.contiguous_format) for half in h_TF.chunk(2, dim=-1)]


def cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``cross_entropy.cross_entropy_sums``; the logits are **consumed**, in rows without a label in any case.

    Liger rounds each row's loss to the type of the logits; their sums here are in FP32. It reads the labels on the
    host, which waits for the device in every call.
    """
    if logits_TV.stride(-1) != 1:  # outside of the function: Liger asks the tensor it is given for its requires_grad
        logits_TV = logits_TV.contiguous()
    return _CrossEntropy.apply(logits_TV, labels_T, z_loss, scale)


class _CrossEntropy(GradientInPlace):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float) -> tuple[Tensor, Tensor]:
        labels_T = labels_T.clamp(min=IGNORED)
        sums_of_row, penalty_T, _, _, gradient = cross_entropy_forward(
            logits_TV, labels_T, None, IGNORED, z_loss, 0.0, "none", None, z_loss != 0.0
        )
        torch.autograd.graph.increment_version(logits_TV)
        total = sums_of_row.float().sum()
        nll = total.clone() if penalty_T is None else total - penalty_T.float().sum()
        ctx.gradient, ctx.scale = gradient.detach() if ctx.needs_input_grad[0] else None, scale
        ctx.mark_non_differentiable(nll)
        return nll, scale * total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Liger's gradient knows no scale: it comes with the gradient of the objective, in one pass."""
        return GradientInPlace.backward(ctx, grads[0], ctx.scale * grads[1])
