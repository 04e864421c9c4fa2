"""Dropout whose mask is a hash of (key, row, column).

T rows (tokens)   D columns (model dim)
"""

import torch
from torch import Tensor


def dropout(x_TD: Tensor, probability: float, key: int | Tensor, rows_T: Tensor, first_column: int = 0) -> Tensor:
    """Zero each element with ``probability`` and scale the rest by 1 / (1 - probability).

    The mask is a hash of (key, row, column), not a draw from a generator: it is the same in every parallel layout, in
    every split into microbatches and after every resume.

    Args:
        key: 64 random bits for the run and the place in the model, a number or an int64 tensor.
        rows_T: [T] int64, the global number of every row.
        first_column: the global number of the first column of x.
    """
    row_hash_T = _mix32(_mix32(rows_T ^ _mix32(rows_T >> 32)) ^ (key & _MASK))
    columns_D = torch.arange(first_column, first_column + x_TD.shape[-1], device=x_TD.device)
    column_hash_D = _mix32(columns_D ^ (key >> 32))
    keep_TD = _mix32(row_hash_T.unsqueeze(-1) ^ column_hash_D) >= int(probability * 2**32)
    return torch.where(keep_TD, x_TD * (1.0 / (1.0 - probability)), 0.0)


_MASK = 0xFFFFFFFF


def _mix32(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) in which every input bit moves every output bit (lowbias32)."""
    h = h & _MASK
    h = ((h ^ (h >> 16)) * 0x7FEB352D) & _MASK
    h = ((h ^ (h >> 15)) * 0x846CA68B) & _MASK
    return h ^ (h >> 16)
