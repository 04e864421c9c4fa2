"""Cross entropy by the C kernel: hands it the tensors' addresses."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cross_entropy import GradientInPlace
from megaresnorm.kernels.registry import register_kernel


class _Structure(ctypes.Structure):
    """The structure of cross_entropy.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "labels", "losses")),
        *((name, ctypes.c_long) for name in ("columns", "pitch", "type", "wants_gradient")),
        ("z_loss", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


@register_kernel("cross_entropy", "cpu", requires=build.requires)
def cpu_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``cross_entropy.cross_entropy_sums`` in C: the logits are **consumed** where they need a gradient."""
    return _CrossEntropy.apply(logits_TV, labels_T, z_loss, scale)


class _CrossEntropy(GradientInPlace):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float) -> tuple[Tensor, Tensor]:
        if logits_TV.dtype not in build.FLOATS:
            raise TypeError(
                f"cross_entropy/cpu: logits are {logits_TV.dtype}, wanted float32 or bfloat16; take another backend"
            )
        wants_gradient = ctx.needs_input_grad[0]
        rows, columns = logits_TV.shape
        if logits_TV.stride(1) != 1 or (rows > 1 and logits_TV.stride(0) < columns):
            logits_TV = logits_TV.contiguous()
        labels_T = labels_T.long().contiguous()
        if labels_T.shape != (rows,):
            raise ValueError(
                f"cross_entropy/cpu: labels have shape {list(labels_T.shape)}; wanted [{rows}], one for each row"
            )
        if rows and int(labels_T.max()) >= columns:
            raise IndexError(f"cross_entropy/cpu: label {int(labels_T.max())} of a vocabulary of {columns}")
        losses_T2 = logits_TV.new_empty((rows, 2), dtype=torch.float32)
        at = build.address
        argument = _Structure(
            at(logits_TV), at(labels_T), at(losses_T2),
            columns, logits_TV.stride(0), build.type_of(logits_TV), wants_gradient, z_loss, scale,
        )  # fmt: skip
        build.call(build.load().cross_entropy, argument, rows, rows * columns)
        if wants_gradient:
            torch.autograd.graph.increment_version(logits_TV)
        ctx.gradient = logits_TV if wants_gradient else None
        nll, penalty = losses_T2.sum(0).unbind()
        nll = nll.clone()
        ctx.mark_non_differentiable(nll)
        return nll, scale * (nll + z_loss * penalty)
