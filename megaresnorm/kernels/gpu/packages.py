"""Backends that other packages compute. They run when asked for by name, and are imported then and not before.

``torch`` is torch's own norms behind our add. ``liger`` and ``quack`` have a file each; ``te`` and ``apex`` are
registered in add_norm/gpu_backends.py.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.add_norm.gpu_backends import _by_name, add_then
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormOutput, NormWeights
from megaresnorm.kernels.gpu.requires import found, needs_gpu
from megaresnorm.kernels.registry import Refusal, register_kernel


def _package(module: str, name: str, distribution: str) -> Refusal:
    def requires(device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := needs_gpu(device, dtype):
            return reason
        return None if found(module) else f"{name} is not installed (pip install {distribution})"

    return requires


def _adapter(name: str) -> Any:
    return importlib.import_module(f"megaresnorm.kernels.gpu.{name}")


# --- torch ------------------------------------------------------------------------------------------------------------


def torch_normalize(x_TD: Tensor, norm: NormWeights, out_dtype: torch.dtype) -> Tensor:
    """``reference.normalize`` by F.rms_norm or F.layer_norm, in ``out_dtype``.

    x is widened first: on GPUs torch's fused norms want x and weights in one type, and the weights are in FP32.
    """
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x_TD, weight, shape = x_TD.to(wide), norm.weight.to(wide), x_TD.shape[-1:]
    if norm.kind == "rmsnorm":
        return F.rms_norm(x_TD, shape, weight, norm.eps).to(out_dtype)
    return F.layer_norm(x_TD, shape, weight, None if norm.bias is None else norm.bias.to(wide), norm.eps).to(out_dtype)


register_kernel("add_norm", "torch", avoid=_by_name)(add_then(torch_normalize))


# --- Liger ------------------------------------------------------------------------------------------------------------

_liger_requires = _package("liger_kernel", "Liger", "liger-kernel")


@register_kernel("add_norm", "liger", requires=_liger_requires, avoid=_by_name)
def _liger_add_norm(args: AddNormArgs) -> AddNormOutput:
    with torch.cuda.device_of(args.x):
        return _adapter("liger").add_norm(args)


@register_kernel(
    "activation", "liger", requires=_liger_requires, avoid=_by_name, kinds=("swiglu", "geglu_tanh")
)  # its GELU is the tanh approximation
def _liger_activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    with torch.cuda.device_of(h_TF):
        return _adapter("liger").activation(h_TF, bias, kind)


@register_kernel("cross_entropy", "liger", requires=_liger_requires, avoid=_by_name)
def _liger_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits_TV):
        return _adapter("liger").cross_entropy(logits_TV, labels_T, z_loss, scale)


# --- quack ------------------------------------------------------------------------------------------------------------

_quack_requires = _package("quack", "quack", "quack-kernels")


@register_kernel("add_norm", "quack", requires=_quack_requires, avoid=_by_name)
def _quack_add_norm(args: AddNormArgs) -> AddNormOutput:
    with torch.cuda.device_of(args.x):
        return _adapter("quack").add_norm(args)


@register_kernel("cross_entropy", "quack", requires=_quack_requires, avoid=_by_name)
def _quack_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits_TV):
        return _adapter("quack").cross_entropy(logits_TV, labels_T, z_loss, scale)
