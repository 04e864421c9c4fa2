"""What is kept of weights in a type of fewer bytes, and renewed after they have changed."""

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from megaresnorm.parallel.data_parallel import is_sharded
from megaresnorm.parallel.gathered import gather_in_bf16
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.precision.bf16 import Bf16Copies
from megaresnorm.precision.fp8 import fp8_layers
from megaresnorm.precision.fp8_shards import Fp8Shards
from megaresnorm.precision.fp8_weights import Fp8Weights


class Copies(Protocol):
    """Copies of weights, which products read in their place."""

    def refresh(self) -> None:
        """Copy the current weights."""


def copy_weights(models: Iterable[nn.Module], compute: str, context: ParallelContext) -> list[Copies]:
    """Give the linear layers of a model their copies, where its type of compute has any.

    Of weights that FSDP2 has sharded there are no copies in BF16: it sends them so. Those in FP8 are of shards.

    Args:
        models: stages, with memory and initial values, before anything has been gathered; sharded all or none.
        compute: precision.compute.
    """
    if compute not in ("bf16", "fp8"):
        return []
    models = list(models)
    layers = fp8_layers(models)
    if not any(is_sharded(model) for model in models):
        bf16 = [Bf16Copies(model) for model in models]
        return [*bf16, Fp8Weights(layers, context.tp)] if layers else [*bf16]
    in_fp8 = {layer.weight for layer, _ in layers.values()}
    for model in models:
        gather_in_bf16(model, but=in_fp8)
    return [Fp8Shards(layers, context)] if layers else []
