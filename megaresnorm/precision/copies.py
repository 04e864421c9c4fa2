"""What is kept of weights in a type of fewer bytes, and renewed after they have changed."""

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.bf16 import Bf16Copies
from megaresnorm.precision.fp8_weights import Fp8Weights, fp8_layers


class Copies(Protocol):
    """Copies of weights, which products read in their place."""

    def refresh(self) -> None:
        """Copy the current weights."""


def copy_weights(models: Iterable[nn.Module], compute: str, axis: Axis) -> list[Copies]:
    """Give the linear layers of a model their copies, where its type of compute has any.

    Args:
        models: stages, with memory; not those that FSDP2 has sharded.
        compute: precision.compute.
        axis: tensor parallelism.
    """
    models, found = list(models), list[Copies]()
    if compute in ("bf16", "fp8"):
        found += [Bf16Copies(model) for model in models]
    if compute == "fp8":
        found.append(Fp8Weights(fp8_layers(models), axis))
    return found
