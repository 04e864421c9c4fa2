"""Backends of add_norm that Triton compiles: ours, for NVIDIA GPUs, and by name torch.compile of the reference.

Triton is imported when one of them is chosen and not before. kernels/gpu/packages.py has those of other packages.
"""

import functools
import importlib
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm import reference
from megaresnorm.kernels.add_norm.op import register_add_norm
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, fp8_behind
from megaresnorm.kernels.add_norm.sharded import ShardedNormKernels
from megaresnorm.kernels.add_norm.spec import AddNormBackend, AddNormSpec, Inputs, Outputs, Saved
from megaresnorm.kernels.gpu.requires import converts_fp8, found, only_by_name, triton_requires
from megaresnorm.kernels.registry import register_kernel


def _module(name: str) -> Any:
    return importlib.import_module(f"megaresnorm.kernels.add_norm.{name}")


# --- triton -----------------------------------------------------------------------------------------------------------


def _triton_forward(inputs: Inputs, spec: AddNormSpec, outputs: Outputs) -> None:
    with torch.cuda.device_of(inputs.x):
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
    writes_fp8=converts_fp8,
)
register_add_norm("triton", _TRITON, requires=triton_requires)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def _compile_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type == "cuda":
        return None if found("triton") else "the package triton is not installed"
    return None if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler was found"


@functools.cache
def _compiled() -> AddNormKernel:
    return torch.compile(reference.add_norm, dynamic=True)


@register_kernel("add_norm", "compile", requires=_compile_requires, avoid=only_by_name)
@fp8_behind  # and not compiled with it: the branch input would not be rounded before
def _compiled_add_norm(args: AddNormArgs) -> AddNormOutput:
    return _compiled()(args)
