"""Pure tensor functions on plain values: no torch.distributed, no recipe."""

import importlib

MODULES = (
    "optional",
    "cpu.add_norm",
    "cpu.attention",
    "cpu.activation",
    "cpu.cross_entropy",
    "cpu.sharded",
    "attention",
    "cross_entropy",
    "fp8",
)


def load_backends() -> None:
    """Import every module that registers kernels; optional packages are not imported by this."""
    for name in MODULES:
        importlib.import_module(f"megaresnorm.kernels.{name}")
