"""One order for every sum, on GPUs too."""

import os

import torch
from torch.utils import deterministic


def be_deterministic(device: torch.device) -> None:
    """Let this process repeat every sum in one order; operations that cannot raise an error. CPUs do so anyway.

    Of attention's kernels flash has a deterministic gradient, cuDNN's has none.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is made
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
