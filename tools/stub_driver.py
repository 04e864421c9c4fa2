"""A driver for Triton where there is no GPU: kernels are compiled for sm_90 and everything on the host happens, but a
launch is only counted.

With it the host's side of the way that a GPU takes can be measured and tested on any machine: binding of arguments,
specialisation, choice of the compiled kernel. Tensors may be those of a CPU; nothing is written to them.
"""

from collections import Counter
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

launches: Counter[str] = Counter()  # by the name of the kernel


class StubDriver:
    """What triton.runtime asks of a driver, for an H100 or H200 that is not there."""

    binary_ext = "cubin"

    def __init__(self) -> None:
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cuda"

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Nothing was loaded."""


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        launches[self._name] += 1


def install() -> None:
    """Make it the driver of this process."""
    triton.runtime.driver.set_active(StubDriver())
