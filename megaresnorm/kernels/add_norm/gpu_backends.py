"""Backends of add_norm that need a package of their own, which is imported when one of them is chosen and not before.

``triton`` is ours, for NVIDIA GPUs. ``compile`` is torch.compile of the reference. ``te`` and ``apex`` are the norms of
Transformer Engine and NVIDIA Apex behind an add in PyTorch; they fuse no add and move 10 bytes an element where ours
moves 8. The last three run only when asked for by name.
"""

import functools
import importlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm import reference
from megaresnorm.kernels.add_norm.op import register_add_norm
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, NormWeights
from megaresnorm.kernels.add_norm.sharded import ShardedNormKernels
from megaresnorm.kernels.add_norm.spec import FP8, AddNormBackend, AddNormSpec, Inputs, Outputs, Saved
from megaresnorm.kernels.gpu.requires import found, needs_gpu, triton_requires
from megaresnorm.kernels.registry import register_kernel


def _module(name: str) -> Any:
    return importlib.import_module(f"megaresnorm.kernels.add_norm.{name}")


# --- triton -----------------------------------------------------------------------------------------------------------


def _fp8_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := triton_requires(device, dtype):
        return reason
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 9)
    return None if capability >= (8, 9) else "FP8 needs compute capability 8.9"


def _triton_forward(inputs: Inputs, spec: AddNormSpec, outputs: Outputs) -> None:
    x = inputs.x
    if spec.out_dtype == FP8 and x.is_cuda and (reason := _fp8_requires(x.device, torch.float32)):
        raise ValueError(f"add_norm/triton cannot write FP8: {reason}")
    with torch.cuda.device_of(x):
        _module("triton_launch").forward(inputs, spec, outputs)


def _triton_backward(
    d_trunk: Tensor | None, d_branch: Tensor | None, saved: Saved, spec: AddNormSpec, dx: Tensor, d_delta: Tensor | None
) -> Tensor:
    with torch.cuda.device_of(saved.z):
        return _module("triton_launch").backward(d_trunk, d_branch, saved, spec, dx, d_delta)


def _triton_sharded(name: str) -> Callable:
    def run(*arguments: Any) -> Any:
        with torch.cuda.device_of(arguments[0]):
            return getattr(_module("triton_sharded").SHARDED, name)(*arguments)

    return run


_TRITON = AddNormBackend(
    _triton_forward,
    _triton_backward,
    ShardedNormKernels(*map(_triton_sharded, ShardedNormKernels._fields)),
    drops=True,
)
register_add_norm("triton", _TRITON, requires=triton_requires)


@register_kernel("norm_quant", "triton", requires=_fp8_requires)
def _triton_fp8(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(arguments[0]):
        return _module("triton_fp8").norm_quant(*arguments, **options)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _compile_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        return None if found("triton") else "the package triton is not installed"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler was found"


@functools.cache
def _compiled() -> AddNormKernel:
    return torch.compile(reference.add_norm, dynamic=True)


def _by_name(device: torch.device, dtype: torch.dtype) -> str:
    return "chosen only by name"


@register_kernel("add_norm", "compile", requires=_compile_requires, avoid=_by_name)
def _compiled_add_norm(args: AddNormArgs) -> AddNormOutput:
    return _compiled()(args)


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


def add_then(normalize: Callable[[Tensor, NormWeights, torch.dtype], Tensor]) -> AddNormKernel:
    """Make an ``add_norm`` backend from a norm alone; the add is done in PyTorch.

    Args:
        normalize: called with (x, norm, out_dtype).
    Returns:
        A function as ``reference.add_norm``. It raises ValueError where FP8, statistics or amax are wanted.
    """

    def add_norm(args: AddNormArgs) -> AddNormOutput:
        delta, out_dtype = args.delta, args.out_dtype
        if out_dtype == torch.float8_e4m3fn or (out_dtype is None and args.next_norm is not None):
            raise ValueError(
                "add_norm by another package's norm writes no FP8, statistics or amax; take triton or the reference"
            )
        if delta is not None and args.branch_norm is not None:
            delta = normalize(delta, args.branch_norm, torch.float32)
        trunk = reference.add_norm(
            replace(args, delta=delta, branch_norm=None, norm=None, next_norm=None, out_dtype=None)
        ).trunk
        if args.norm is not None:
            trunk = normalize(trunk, args.norm, args.residual_dtype)
        if out_dtype is None:
            return AddNormOutput(trunk, None, None, None)
        branch = trunk if args.next_norm is None else normalize(trunk, args.next_norm, out_dtype)
        return AddNormOutput(trunk, branch.to(out_dtype), None, None)

    return add_norm


@register_kernel("add_norm", "te", requires=_te_requires, avoid=_by_name)
def _te_add_norm(args: AddNormArgs) -> AddNormOutput:
    return add_then(_module("te").normalize)(args)


@register_kernel("add_norm", "apex", requires=_apex_requires, avoid=_by_name)
def _apex_add_norm(args: AddNormArgs) -> AddNormOutput:
    return add_then(_module("apex").normalize)(args)
