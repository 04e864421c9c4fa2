"""Stochastic rounding of FP32 numbers to BF16."""

import torch
from torch import Tensor

_LARGEST = 0x7F7F0000  # of BF16, as the bits of an FP32 number without its sign


def rounded_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """FP32 numbers rounded to BF16, each up or down so that it stays what it is on average.

    NaN and infinities stay what they are. No finite number becomes infinite: beyond BF16's largest it becomes that.
    (Of NaN that is meant of those that arithmetic makes: one whose highest half alone would be infinity becomes that.)

    Args:
        bits: random bits for each element, int32, of which the low 16 are used.

    Source:
        Gupta et al. 2015, arXiv:1502.02551, section 3.1.
    """
    # What BF16 drops is a fraction of its last place in units of 2^-16: adding as many random bits carries over with
    # that probability. A number of BF16 drops nothing and is never moved.
    number = x.view(torch.int32)
    raised = (bits & 0xFFFF).masked_fill_((number & 0x7FFFFFFF) > _LARGEST, 0)
    raised += number
    raised &= -0x10000
    return raised.view(torch.float32).to(torch.bfloat16)
