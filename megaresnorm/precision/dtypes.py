"""Number formats: the dtypes that a recipe names."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def weight_dtype(compute: str) -> torch.dtype:
    """Dtype of weights, gradients and optimizer state: FP32, unless all is FP64."""
    return torch.float64 if compute == "fp64" else torch.float32
