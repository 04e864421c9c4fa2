"""What is kept of weights in a type of fewer bytes, and renewed after they have changed."""

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor, nn

from megaresnorm.parallel.data_parallel import is_sharded
from megaresnorm.parallel.gathered import gather_in
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.precision.dtypes import half_dtype
from megaresnorm.precision.fp8 import fp8_layers
from megaresnorm.precision.fp8_shards import Fp8Shards
from megaresnorm.precision.fp8_weights import Fp8Weights
from megaresnorm.precision.half import HalfCopies
from megaresnorm.recipe import PrecisionRecipe


class WeightCopies(Protocol):
    """Copies of weights, which products read in their place."""

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, with their scales."""

    def refresh(self) -> None:
        """Copy the current weights."""


def copy_weights(
    models: Iterable[nn.Module], precision: PrecisionRecipe, context: ParallelContext
) -> list[WeightCopies]:
    """Give the linear layers of a model their copies, where its type of compute has any.

    Of weights that FSDP2 has sharded there are no copies in 16 bits: it sends them so. Those in FP8 are of shards.

    Args:
        models: stages, with memory and initial values, before anything has been gathered; sharded all or none.
        precision: which says what types they have.
    """
    half = half_dtype(precision)
    if half is None:
        return []
    models = list(models)
    layers = fp8_layers(models)
    if not any(is_sharded(model) for model in models):
        halves = [HalfCopies(model, half) for model in models]
        return [*halves, Fp8Weights(layers, context.tp)] if layers else [*halves]
    in_fp8 = {layer.weight for layer, _ in layers.values()}
    for model in models:
        gather_in(half, model, but=in_fp8)
    return [Fp8Shards(layers, context)] if layers else []
