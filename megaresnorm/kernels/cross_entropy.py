"""Cross entropy whose gradient is computed with its value, a few rows at a time.

T rows (tokens)   V vocabulary
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import register_kernel

GPU_ELEMENTS = 1 << 27  # at a time on a GPU: BF16 logits have two copies in FP32 of as many, together 1 GiB
CACHED_ELEMENTS = 1 << 19  # FP32 logits processed at a time on a CPU: 2 MiB, the size of a second-level cache


class CrossEntropyKernel(Protocol):
    """A backend of the loss, called as ``cross_entropy_sums``; it may consume the logits."""

    def __call__(
        self, logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0, /
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses, without a gradient, and the objective to be differentiated."""


@register_kernel("cross_entropy", "chunked")
def chunked_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy as ``cross_entropy_sums``, but the logits are **consumed**.

    Where the logits need a gradient it overwrites them, so that nothing of their size is allocated. Only the objective
    can be differentiated, and once. ``scale`` is applied as the gradient is written; a factor that arrives with the
    backward pass costs another pass over it.
    """
    return _ChunkedCrossEntropy.apply(logits_TV, labels_T, z_loss, scale)


def row_chunks(logits_TV: Tensor) -> list[slice]:
    """Rows to process together: on a CPU as many as a cache holds, on a GPU as many as keep it busy."""
    rows, vocab = logits_TV.shape
    chunk = max(1, (GPU_ELEMENTS if logits_TV.is_cuda else CACHED_ELEMENTS) // vocab)
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


class GradientInPlace(torch.autograd.Function):
    """Backward of a loss whose forward left ``ctx.gradient`` in the place of the logits. It can run once."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of the logits, scaled in place by that of the objective, the second output."""
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the objective can be differentiated once"
        return scaled(gradient, grads[1]), None, None, None


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``gradient`` by ``factor`` in place.

    A factor of 1 is skipped on a CPU; on a GPU reading it would make the host wait.
    """
    return gradient if not factor.is_cuda and factor.item() == 1.0 else gradient.mul_(factor)


class _ChunkedCrossEntropy(GradientInPlace):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        nll = logits_TV.new_zeros((), dtype=wide)
        penalty = torch.zeros_like(nll)
        for rows in row_chunks(logits_TV):
            logits, label = logits_TV[rows], labels_T[rows].unsqueeze(-1)
            valid, label = label >= 0, label.clamp(min=0)
            label_logit = logits.gather(-1, label).to(wide)
            in_place = ctx.needs_input_grad[0] and logits.dtype == wide
            log_p = torch.log_softmax(logits.to(wide), dim=-1, out=logits if in_place else None)
            label_log_p = log_p.gather(-1, label)
            log_z = label_logit - label_log_p
            nll -= torch.where(valid, label_log_p, 0.0).sum()
            penalty += torch.where(valid, log_z.square(), 0.0).sum()
            if ctx.needs_input_grad[0]:
                # p (1 + 2 z_loss log Z) everywhere, less 1 at the label; 0 in rows without a label.
                gradient = log_p.exp_()
                if z_loss:
                    gradient *= 1.0 + 2.0 * z_loss * log_z
                gradient.scatter_add_(-1, label, torch.full_like(label_log_p, -1.0))
                if scale != 1.0:
                    gradient *= scale
                if gradient.is_cuda or not valid.all():  # on a GPU to ask would make the host wait
                    gradient.masked_fill_(~valid, 0.0)
                if not in_place:
                    logits.copy_(gradient)
        ctx.gradient = logits_TV if ctx.needs_input_grad[0] else None
        ctx.mark_non_differentiable(nll)
        return nll, scale * (nll + z_loss * penalty)


@register_kernel("cross_entropy", "reference")
def cross_entropy_sums(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy and objective, summed over the valid tokens.

    A token's cross entropy is -log p(label); its objective is ``scale`` (-log p(label) + z_loss log(Z)^2).

    Args:
        logits_TV: [T, V], computed on in FP32 or FP64.
        labels_T: [T] int64, negative where there is nothing to predict.
    Returns:
        (cross entropy, objective), two scalars; the objective is the one to differentiate.
    Source:
        PaLM, arXiv:2204.02311 (z_loss).
    """
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if z_loss == 0.0:
        nll = F.cross_entropy(logits_TV, labels_T.clamp(min=-1), ignore_index=-1, reduction="sum")
        return nll, scale * nll
    valid_T = labels_T >= 0
    log_z_T = torch.logsumexp(logits_TV, dim=-1)
    label_logit_T = logits_TV.gather(-1, labels_T.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(valid_T, log_z_T - label_logit_T, 0.0).sum()
    return nll, scale * (nll + z_loss * torch.where(valid_T, log_z_T.square(), 0.0).sum())
