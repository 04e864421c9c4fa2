"""Why a kernel for NVIDIA GPUs cannot run somewhere, as ``register_kernel`` takes it."""

import importlib.util

import torch

from megaresnorm.kernels.custom_op import FLOATS
from megaresnorm.kernels.registry import Refusal


def found(package: str) -> bool:
    """Whether a package is installed. Does not import it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def needs_gpu(
    device: torch.device, dtype: torch.dtype, floats: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> str | None:
    """The ``requires`` of kernels that compute in FP32 on NVIDIA GPUs.

    Args:
        floats: types that they read and write; packages are not tried in FP16.
    """
    if device.type != "cuda":
        return "made for NVIDIA GPUs"
    if dtype not in floats:
        return f"it computes in FP32, not in {dtype}"
    return None


def triton_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of kernels in Triton."""
    if reason := needs_gpu(device, dtype, FLOATS):
        return reason
    if not found("triton"):
        return "the package triton is not installed"
    return needs_capability(8, 0)(device, dtype)


def needs_capability(major: int, minor: int) -> Refusal:
    """The ``requires`` of kernels for GPUs of this compute capability and newer; None where there is no GPU to ask."""

    def requires(device: torch.device, dtype: torch.dtype) -> str | None:
        has = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (major, minor)
        enough = has >= (major, minor)
        return None if enough else f"it needs compute capability {major}.{minor}, this GPU has {has[0]}.{has[1]}"

    return requires


def converts_fp8(device: torch.device) -> bool:
    """Whether Triton has casts to FP8 (E4M3) there; on a CPU its interpreter has."""
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)  # which torch.compile takes for a constant
    return (properties.major, properties.minor) >= (8, 9)


def fp8_requires(device: torch.device, dtype: torch.dtype) -> str | None:
    """The ``requires`` of kernels in Triton that write FP8."""
    if reason := triton_requires(device, dtype):
        return reason
    known = not torch.cuda.is_available() or converts_fp8(device)
    return None if known else "it needs compute capability 8.9 for FP8"


def only_by_name(device: torch.device, dtype: torch.dtype) -> str:
    """The ``avoid`` of backends that ``auto`` never takes."""
    return "chosen only by name"
