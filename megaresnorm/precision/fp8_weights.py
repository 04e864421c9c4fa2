"""Weights in FP8, rounded once a step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megaresnorm.kernels.fp8.formats import TENSOR, amax_of, quantize
from megaresnorm.parallel.collectives import largest
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.fp8 import Fp8Linear


class Fp8Weights:
    """The FP8 codes of all weights that are read in FP8, made anew after the weights have changed.

    Not for weights that FSDP2 gathers (``Fp8Shards``).

    Args:
        layers: with memory.
        axis: tensor parallelism, whose ranks share the scale of a weight under tensorwise.
    """

    def __init__(self, layers: Mapping[str, tuple[Linear, Fp8Linear]], axis: Axis) -> None:
        self._layers, self._axis = list(layers.values()), axis
        self.refresh()

    @property
    def tensors(self) -> list[Tensor]:
        """See ``WeightCopies``."""
        return [tensor for _, kernel in self._layers for tensor in kernel.weight.tensors]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the current weights.

        Communication:
            Under tensorwise one all-gather of a number for each weight over tp.
        """
        shared = [amax_of(layer.weight, TENSOR) for layer, kernel in self._layers if kernel.forms.weight == TENSOR]
        whole = largest(torch.cat(shared), self._axis) if shared else None
        for i, (layer, kernel) in enumerate(self._layers):
            form = kernel.forms.weight
            kernel.weight = quantize(layer.weight, form, amax=None if whole is None else whole[i : i + 1])
