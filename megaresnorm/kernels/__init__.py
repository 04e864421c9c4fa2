"""Pure tensor functions on plain values: no torch.distributed, no recipe. Every op has a folder or a file."""

import importlib

MODULES = (
    "add_norm.reference",
    "add_norm.gpu_backends",
    "add_norm.fp8",
    "fp8.product",
    "gpu.packages",
    "gpu.backends",
    "cpu.add_norm",
    "cpu.attention",
    "cpu.activation",
    "cpu.rotary",
    "cpu.cross_entropy",
    "attention",
    "flex_attention",
    "cross_entropy",
    "activation",
    "rotary",
)


def load_backends() -> None:
    """Import every module that registers kernels. Optional packages are not imported by this."""
    for name in MODULES:
        importlib.import_module(f"megaresnorm.kernels.{name}")
