"""Random bits as a hash of where they are used: the same in every parallel layout and after every resume.

Their 32 bits are held in int32, whose sign is the highest: products of 64-bit integers are slow on CPUs.

R rows   C columns
"""

import torch
from torch import Tensor

_LOWEST = -(2**31)


def mix32(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every input bit moves every output bit (lowbias32)."""
    h = h ^ ((h >> 16) & 0xFFFF)  # masked, since a shift repeats the sign
    h *= 0x7FEB352D
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= 0x846CA68B - 2**32
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def hash_number(number: Tensor) -> Tensor:
    """32 bits for each number of 64, int64."""
    return mix32(_low(number) ^ mix32(_high(number)))


def hash_elements(rows_R: Tensor, columns_C: Tensor, key: Tensor) -> Tensor:
    """32 bits for every element of a matrix: int32 [*key.shape, R, C].

    Args:
        rows_R: ``hash_number`` of the rows' global numbers.
        columns_C: the columns' global numbers, integers below 2^32.
        key: 64 random bits as int64, one number or several.
    """
    row_hash_R = mix32(rows_R ^ _low(key).unsqueeze(-1))
    column_hash_C = mix32(_low(columns_C) ^ _high(key).unsqueeze(-1))
    return mix32(row_hash_R.unsqueeze(-1) ^ column_hash_C.unsqueeze(-2))


def numbered(key: Tensor, number: Tensor) -> Tensor:
    """64 other bits for each key and each number.

    Args:
        key: int64.
        number: ``hash_number`` of it.
    """
    low = mix32(number ^ _low(key))
    high = mix32(low ^ _high(key))
    return (high.long() << 32) | (low.long() & 0xFFFFFFFF)


def at_least(h: Tensor, threshold: int) -> Tensor:
    """Whether 32 bits, read as a number without a sign, are at least ``threshold``."""
    return (h ^ _LOWEST) >= threshold + _LOWEST


def _low(number: Tensor) -> Tensor:
    return number.to(torch.int32)  # which drops the higher bits


def _high(number: Tensor) -> Tensor:
    return (number >> 32).to(torch.int32)
