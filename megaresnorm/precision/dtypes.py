"""Number formats: the dtypes that a recipe names."""

from typing import NamedTuple

import torch

from megaresnorm.model.specs import ParameterSpec
from megaresnorm.recipe import PrecisionRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def weight_dtype(compute: str) -> torch.dtype:
    """Dtype of gradients, optimizer state and all weights but matrices: FP32, unless all is FP64."""
    return torch.float64 if compute == "fp64" else torch.float32


class StoredDtypes(NamedTuple):
    """Dtypes that weights are stored in.

    Attributes:
        matrices: of weights that are multiplied by or looked up in (``ParameterSpec.matrix``).
        others: of norms, biases and gates.
    """

    matrices: torch.dtype
    others: torch.dtype

    def of(self, spec: ParameterSpec) -> torch.dtype:
        """That of one parameter."""
        return self.matrices if spec.matrix else self.others


def stored_dtypes(precision: PrecisionRecipe) -> StoredDtypes:
    """The dtypes that weights are stored in, from ``precision.weights`` and ``precision.compute``."""
    others = weight_dtype(precision.compute)
    return StoredDtypes(torch.bfloat16 if precision.weights == "bf16" else others, others)


def half_dtype(precision: PrecisionRecipe) -> torch.dtype | None:
    """The 16-bit type that linear layers read their FP32 weights in; None where they read them as they are."""
    dtype = DTYPES[precision.branches]
    return dtype if dtype.itemsize == 2 and precision.weights == "fp32" else None
