"""Rotary positions: frequencies, as they are or stretched, and the tables that the attention kernels read.

S seq   H head width   R rotated columns of a head
"""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from megaresnorm.recipe import ModelRecipe, RopeScaling


def rotary_tables(recipe: ModelRecipe, seq: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, H] with which the two halves of a head are rotated against each other.

    Where only R columns of a head are rotated, these are the first R / 2 of either half; the others have an angle of 0.
    The first half of sin is negative, as the attention kernels need it.

    Source:
        RoFormer, arXiv:2104.09864, eq. 34.
    """
    width, half = recipe.rotary_width, recipe.head_width // 2
    frequencies = recipe.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    factor = 1.0
    if recipe.rope_scaling is not None:
        frequencies, factor = stretched(frequencies, recipe.rope_scaling, recipe.rope_theta)
    angles = torch.outer(torch.arange(seq, dtype=torch.float64, device=device), frequencies)
    cos, sin = torch.ones(seq, half, dtype=torch.float64, device=device), angles.new_zeros(seq, half)
    cos[:, : width // 2], sin[:, : width // 2] = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def stretched(frequencies: Tensor, scaling: RopeScaling, theta: float) -> tuple[Tensor, float]:
    """The frequencies [R / 2] for a longer context, and the factor on rotated queries and keys."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    assert scaling.original_seq_len is not None
    if scaling.kind == "llama3":
        # Turns of a frequency in the original context; the transition between the two factors is linear in them.
        turns = scaling.original_seq_len * frequencies / (2 * pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        kept = 1 - _yarn_ramp(len(frequencies), scaling, theta).to(frequencies)
    factor = 1.0
    if scaling.kind == "yarn":
        factor = scaling.attention_factor or 0.1 * log(scaling.factor) + 1  # arXiv:2309.00071, eq. 22
    return frequencies * (kept + (1 - kept) / scaling.factor), factor


def _yarn_ramp(count: int, scaling: RopeScaling, theta: float) -> Tensor:
    """0 for frequencies that stay, 1 for those that are divided, linear in their index between.

    Source:
        YaRN, arXiv:2309.00071, section 3.2.
    """
    assert scaling.original_seq_len is not None
    width = 2 * count

    def number(turns: float) -> float:
        """Index of the frequency that turns so often in the original context."""
        return width * log(scaling.original_seq_len / (turns * 2 * pi)) / (2 * log(theta))  # type: ignore[operator]

    low, high = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(count, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
