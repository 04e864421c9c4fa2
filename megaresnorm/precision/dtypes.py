"""Number formats: the dtypes that a recipe names."""

import torch

from megaresnorm.recipe import PrecisionRecipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def weight_dtype(compute: str) -> torch.dtype:
    """Dtype of weights, gradients and optimizer state: FP32, unless all is FP64."""
    return torch.float64 if compute == "fp64" else torch.float32


def half_dtype(precision: PrecisionRecipe) -> torch.dtype | None:
    """The 16-bit type that linear layers read their FP32 weights in; None where they read them as they are."""
    dtype = DTYPES[precision.branches]
    return dtype if dtype.itemsize == 2 else None
