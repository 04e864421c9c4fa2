"""Stochastic rounding of FP32 numbers to BF16."""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.bfloat16).max


def rounded_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """FP32 numbers rounded to BF16, each up or down so that it stays what it is on average.

    NaN and infinities stay what they are. No finite number becomes infinite: beyond BF16's largest it becomes that.

    Args:
        x: FP32, contiguous or not.
        bits: random bits for each element, of which the low 16 of an int64 are used.

    Source:
        Gupta et al. 2015, arXiv:1502.02551, section 3.1.
    """
    # What BF16 drops is a fraction of its last place in units of 2^-16: adding as many random bits carries over with
    # that probability. A number of BF16 drops nothing and is never moved.
    raised = x.clamp(-LARGEST, LARGEST).view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    kept = (raised & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), kept, x).to(torch.bfloat16)
