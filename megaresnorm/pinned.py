"""Pinned host memory, which a GPU can copy from and to beside its computation."""

import weakref

import torch
from torch import Tensor


def pin(memory: Tensor, owner: object) -> int:
    """Register host memory with the driver as it is, until ``owner`` is gone.

    torch's own pinned memory is rounded up to a power of two, which can take up to twice as much.

    Args:
        memory: on the host; no other registered memory may lie in its pages.
        owner: keeps the memory alive.

    Returns:
        The code of CUDA's error, 0 for none.
    """
    runtime, address = torch.cuda.cudart(), memory.data_ptr()
    error = int(runtime.cudaHostRegister(address, memory.nbytes, 0))
    if error == 0:
        weakref.finalize(owner, runtime.cudaHostUnregister, address)
    return error
