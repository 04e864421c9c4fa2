"""Random bits as a hash of where they are used: the same in every parallel layout and after every resume.

R rows   C columns
"""

from torch import Tensor

_MASK = 0xFFFFFFFF


def mix32(h: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) in which every input bit moves every output bit (lowbias32)."""
    h = h & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h.bitwise_xor_(h >> shift).mul_(factor).bitwise_and_(_MASK)
    return h.bitwise_xor_(h >> 16)


def hash_elements(rows_R: Tensor, columns_C: Tensor, key: Tensor) -> Tensor:
    """32 bits, held in int64, for every element of a matrix: [*key.shape, R, C].

    Args:
        rows_R: int64, global numbers of the rows.
        columns_C: int64, those of the columns, below 2^32.
        key: 64 random bits as int64, one number or several.
    """
    row_hash_R = mix32(mix32(rows_R ^ mix32(rows_R >> 32)) ^ (key & _MASK).unsqueeze(-1))
    column_hash_C = mix32(columns_C ^ (key >> 32).unsqueeze(-1))
    return mix32(row_hash_R.unsqueeze(-1) ^ column_hash_C.unsqueeze(-2))


def numbered(keys: Tensor, number: Tensor) -> Tensor:
    """64 other bits for each key and each number, both int64."""
    low = mix32(mix32(number ^ mix32(number >> 32)) ^ (keys & _MASK))
    return low | (mix32(low ^ (keys >> 32)) << 32)
