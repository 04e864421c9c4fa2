"""Backends that other packages compute. They run when asked for by name, and are imported then and not before.

``torch`` is torch's own norms behind our add, ``te`` and ``apex`` those of Transformer Engine and NVIDIA Apex: they
fuse no add and move 10 bytes an element where ours moves 8. ``liger`` and ``quack`` fuse a plain add before an RMSNorm.
Of Transformer Engine there is also the product in FP8.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.add_norm import reference
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, NormWeights, fp8_behind
from megaresnorm.kernels.fp8.formats import Fp8
from megaresnorm.kernels.gpu.requires import found, needs_capability, needs_gpu, only_by_name
from megaresnorm.kernels.registry import Refusal, anywhere, register_kernel
from megaresnorm.packages import numbers_of, version_of


def _package(module: str, name: str, distribution: str) -> Refusal:
    def requires(device: torch.device, dtype: torch.dtype) -> str | None:
        if reason := needs_gpu(device, dtype):
            return reason
        return None if found(module) else f"{name} is not installed (pip install {distribution})"

    return requires


def _adapter(name: str, folder: str = "gpu") -> Any:
    return importlib.import_module(f"megaresnorm.kernels.{folder}.{name}")


def add_then(normalize: Callable[[Tensor, NormWeights, torch.dtype], Tensor]) -> AddNormKernel:
    """Make an ``add_norm`` backend from a norm alone; the add is done in PyTorch.

    Args:
        normalize: called with (x, norm, out_dtype).
    Returns:
        A function as ``reference.add_norm``, which gives no statistics.
    """

    @fp8_behind
    def add_norm(args: AddNormArgs) -> AddNormOutput:
        delta, out_dtype = args.delta, args.out_dtype
        if delta is not None and args.branch_norm is not None:
            delta = normalize(delta, args.branch_norm, torch.float32)
        trunk = reference.add_norm(
            replace(args, delta=delta, branch_norm=None, norm=None, next_norm=None, out_dtype=None, fp8=None)
        ).trunk
        if args.norm is not None:
            trunk = normalize(trunk, args.norm, args.residual_dtype)
        if out_dtype is None:
            assert args.next_norm is None
            return AddNormOutput(trunk)
        branch = trunk if args.next_norm is None else normalize(trunk, args.next_norm, out_dtype)
        return AddNormOutput(trunk, branch.to(out_dtype))

    return add_norm


def is_plain_add_rms_norm(args: AddNormArgs) -> bool:
    """Whether a call is next_norm(x + delta) with an RMSNorm, which is what other packages fuse."""
    if args.delta is None or args.next_norm is None or args.next_norm.kind != "rmsnorm":
        return False
    if args.dropout is not None or args.branch_norm is not None or args.norm is not None:
        return False
    return args.alpha == 1.0 and isinstance(args.gate, float) and args.gate == 1.0


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


register_kernel("add_norm", "torch", avoid=only_by_name)(add_then(torch_normalize))


# --- Liger ------------------------------------------------------------------------------------------------------------

_liger_requires = _package("liger_kernel", "Liger", "liger-kernel")


@register_kernel("add_norm", "liger", requires=_liger_requires, avoid=only_by_name)
def _liger_add_norm(args: AddNormArgs) -> AddNormOutput:
    with torch.cuda.device_of(args.x):
        return _adapter("liger").add_norm(args)


@register_kernel(
    "activation", "liger", requires=_liger_requires, avoid=only_by_name, kinds=("swiglu", "geglu_tanh")
)  # its GELU is the tanh approximation
def _liger_activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    with torch.cuda.device_of(h_TF):
        return _adapter("liger").activation(h_TF, bias, kind)


@register_kernel("cross_entropy", "liger", requires=_liger_requires, avoid=only_by_name)
def _liger_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits_TV):
        return _adapter("liger").cross_entropy(logits_TV, labels_T, z_loss, scale)


# --- quack ------------------------------------------------------------------------------------------------------------

_quack_requires = _package("quack", "quack", "quack-kernels")


@register_kernel("add_norm", "quack", requires=_quack_requires, avoid=only_by_name)
def _quack_add_norm(args: AddNormArgs) -> AddNormOutput:
    with torch.cuda.device_of(args.x):
        return _adapter("quack").add_norm(args)


@register_kernel("cross_entropy", "quack", requires=_quack_requires, avoid=only_by_name)
def _quack_cross_entropy(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(logits_TV):
        return _adapter("quack").cross_entropy(logits_TV, labels_T, z_loss, scale)


# --- Transformer Engine and Apex --------------------------------------------------------------------------------------


def _te_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := needs_gpu(device, dtype):
        return reason
    return None if found("transformer_engine_torch") else "Transformer Engine is not installed (its PyTorch extension)"


def _apex_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := needs_gpu(device, dtype):
        return reason
    # The package of that name on PyPI is another program: what counts is Apex's extension.
    return None if found("fused_layer_norm_cuda") else "NVIDIA Apex is not installed (built with its CUDA extensions)"


@register_kernel("add_norm", "te", requires=_te_requires, avoid=only_by_name)
def _te_add_norm(args: AddNormArgs) -> AddNormOutput:
    return add_then(_adapter("te", "add_norm").normalize)(args)


@register_kernel("add_norm", "apex", requires=_apex_requires, avoid=only_by_name)
def _apex_add_norm(args: AddNormArgs) -> AddNormOutput:
    return add_then(_adapter("apex", "add_norm").normalize)(args)


# The oldest version whose GEMM and storage have the arguments that fp8/te.py gives them.
TE_WITH_PRODUCTS = (2, 12)


def _te_product_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _te_requires(device, dtype):
        return reason
    version = version_of("transformer_engine")
    if version is None:
        return "Transformer Engine is not installed whole (pip install 'transformer_engine[pytorch]')"
    if numbers_of(version)[:2] < TE_WITH_PRODUCTS:
        return f"it needs Transformer Engine {'.'.join(map(str, TE_WITH_PRODUCTS))} or newer, this is {version}"
    return needs_capability(8, 9)(device, dtype)


@register_kernel(
    "fp8_product", "te", requires=_te_product_requires, avoid=only_by_name,
    kinds={"tensorwise": anywhere, "block": needs_capability(9, 0)},
)  # fmt: skip  # it gives no row a scale of its own, and its MXFP8 wants scales in E8M0, in an order of its own
def _te_product(a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
    with torch.cuda.device_of(a.codes):
        return _adapter("te", "fp8").product(a, b, bias, dtype, precise=precise)
