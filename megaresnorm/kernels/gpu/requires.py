"""Why a kernel for NVIDIA GPUs cannot run somewhere, as ``register_kernel`` takes it."""

import importlib.util

import torch

from megaresnorm.kernels.custom_op import FLOATS


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
    major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


def only_by_name(device: torch.device, dtype: torch.dtype) -> str:
    """The ``avoid`` of backends that ``auto`` never takes."""
    return "chosen only by name"
