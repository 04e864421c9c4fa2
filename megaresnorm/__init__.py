"""MegaResNorm: train transformers hundreds of layers deep, with the residual topology of your choice.

The public names below are loaded on first use; importing the package needs nothing beyond Python itself.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0.dev0"

_PUBLIC = {
    "Recipe": "megaresnorm.recipe",
    "load_recipe": "megaresnorm.model.lint",
    "TOPOLOGIES": "megaresnorm.model.topology",
    "Topology": "megaresnorm.model.topology",
    "ResidualSpec": "megaresnorm.model.topology",
    "Position": "megaresnorm.model.topology",
    "Stream": "megaresnorm.model.stream",
    "Transformer": "megaresnorm.model.transformer",
    "parameter_table": "megaresnorm.model.parameters",
    "add_norm": "megaresnorm.kernels.add_norm.reference",
    "ParallelContext": "megaresnorm.parallel.mesh",
    "build_model": "megaresnorm.assemble",
    "train": "megaresnorm.trainer",
    "configure_logging": "megaresnorm.telemetry.log",
    "to_hf": "megaresnorm.convert.to_hf",
    "from_hf": "megaresnorm.convert.from_hf",
    "ExportSettings": "megaresnorm.convert.export",
    "UserError": "megaresnorm.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megaresnorm' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
