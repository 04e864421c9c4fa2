"""Dropout whose mask is a hash of (key, row, column).

T rows (tokens)   D columns (model dim)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.custom_op import CustomOp
from megaresnorm.kernels.hashing import at_least, hash_elements, hash_number


class Dropout(NamedTuple):
    """Which elements of a tensor are dropped, as plain values; ``dropout`` describes them.

    Attributes:
        probability: more than 0 and less than 1.
        key: 64 random bits, an int64 tensor of one number.
        rows: [T] int64.
    """

    probability: float
    key: Tensor
    rows: Tensor
    first_column: int = 0

    def __call__(self, x_TD: Tensor) -> Tensor:
        """x with these elements dropped."""
        return dropout(x_TD, *self)


def dropout(x_TD: Tensor, probability: float, key: int | Tensor, rows_T: Tensor, first_column: int = 0) -> Tensor:
    """Zero each element with ``probability`` and scale the rest by 1 / (1 - probability).

    The mask is a hash of (key, row, column), not a draw from a generator: it is the same in every parallel layout, in
    every split into microbatches and after every resume.

    Args:
        key: 64 random bits for the run and the place in the model, a number or an int64 tensor.
        rows_T: [T] int64, the global number of every row.
        first_column: the global number of the first column of x.
    """
    if isinstance(key, int):
        key = torch.tensor((key + 2**63) % 2**64 - 2**63, device=rows_T.device)  # the same bits as a signed number
    keep_TD = _keep(rows_T, key, _Place(x_TD.shape[-1], first_column, threshold_of(probability)))
    return torch.where(keep_TD, x_TD * factor_of(probability), 0.0)


def factor_of(probability: float) -> float:
    """What elements that are kept are multiplied by."""
    return 1.0 / (1.0 - probability)


def threshold_of(probability: float) -> int:
    """The least hash of 32 bits whose element is kept."""
    return int(probability * 2**32)


class _Place(NamedTuple):
    columns: int
    first_column: int
    threshold: int

    def values(self) -> tuple:
        return tuple(self)


def _mask(rows_T: Tensor, key: Tensor, place: _Place) -> Tensor:
    columns_D = torch.arange(place.first_column, place.first_column + place.columns, device=rows_T.device)
    return at_least(hash_elements(hash_number(rows_T), columns_D, key.reshape(())), place.threshold)


# One operator: a code generator that sees the forty integer operations of a mask takes minutes for a few blocks.
_keep = CustomOp(
    "dropout_mask(Tensor rows, Tensor key, int columns, int first_column, int threshold) -> Tensor",
    2,
    _Place,
    _mask,
    lambda rows_T, key, place: rows_T.new_empty((rows_T.shape[0], place.columns), dtype=torch.bool),
)
