"""One order for every sum, on GPUs too."""

import os

import torch
from torch.utils import deterministic

from megaresnorm.errors import ConfigError

WORKSPACES = (":4096:8", ":16:8")


def set_deterministic(device: torch.device) -> None:
    """Let this process repeat every sum in one order; operations that cannot raise an error. CPUs do so anyway.

    Of the kernels of scaled_dot_product_attention flash has a deterministic gradient, those of cuDNN and of memory
    efficiency have none; FP32 is left with the written-out one. Call it before the process's first product, when cuBLAS
    reads its setting.

    Raises:
        ConfigError: CUBLAS_WORKSPACE_CONFIG is set to what is not deterministic.
    """
    if device.type != "cuda":
        return
    found = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACES[0])
    if found not in WORKSPACES:
        raise ConfigError(
            f"train.deterministic=true: CUBLAS_WORKSPACE_CONFIG={found} lets cuBLAS add in any order; unset it, or set "
            f"it to {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
