"""Digests of tensors: 64 bits that change where a bit of a tensor does, computed where the tensor is.

They find copies that are no longer alike, and are no protection from somebody who wants them to agree.
"""

from functools import cache

import torch
from torch import Tensor

PIECE = 1 << 15  # words: a piece, its multipliers and its scratch together stay in a core's second cache
_AT_ONCE = 128  # pieces that are one call on a GPU, where a call costs more than a piece
_LOW = (1 << 32) - 1
_GOLDEN, _MIX1, _MIX2, _MOD = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 1 << 64


@torch.no_grad()
def digest(x: Tensor) -> Tensor:
    """64 bits of all bytes of a tensor and of its shape, without waiting for the device.

    Bytes are taken in words of 64 bits, the last one filled with zeros. A word w becomes w ^ (w >> 32), so that its
    highest bit counts twice; it is multiplied by an odd number that depends on its position, and all are added modulo
    2^64. Each of these is invertible in one word: two tensors of one shape that differ in a single word have different
    digests, always. Any others agree by chance alone. Without the first step two flips of highest bits would cancel.

    Args:
        x: of any dtype and shape, contiguous or not.

    Returns:
        An int64 scalar on the tensor's device, the same on CPUs and GPUs.

    Source:
        Multilinear hashing (Lemire and Kaser, arXiv:1202.4961); positions are hashed by SplitMix64.
    """
    data = x.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
    end = len(data) // (8 * PIECE) * PIECE  # words of whole pieces
    sums = _sums_of_pieces(data[: 8 * end]) if end else []
    if 8 * end < len(data) or not end:
        words = _words(data[8 * end :])
        mixed = _mixed(words, torch.empty_like(words))
        sums.append(mixed.mul_(_multipliers(PIECE, x.device)[: len(words)]).sum(0, keepdim=True))
    if len(sums) == 1 and len(sums[0]) == 1:
        return sums[0][0].add_(_of_shape(x))
    of_pieces = torch.cat(sums)
    return of_pieces.mul_(_multipliers(len(of_pieces), x.device)).sum().add_(_of_shape(x))


def _sums_of_pieces(data: Tensor) -> list[Tensor]:
    """The sums [P] of whole pieces of bytes."""
    sums, step = list[Tensor](), 8 * PIECE * (1 if data.device.type == "cpu" else _AT_ONCE)
    multipliers = _multipliers(PIECE, data.device)
    scratch = torch.empty(min(step, len(data)) // 8, dtype=torch.int64, device=data.device)
    for part in data.split(step):
        words = _words(part)
        mixed = _mixed(words, scratch[: len(words)]).view(-1, PIECE)
        sums.append(mixed.mul_(multipliers).sum(1))
    return sums


def _words(data: Tensor) -> Tensor:
    """Bytes as words, the last one filled with zeros."""
    missing = -len(data) % 8
    if missing:
        data = torch.cat((data, data.new_zeros(missing)))
    elif data.storage_offset() % 8:
        data = data.clone()
    return data.view(torch.int64)


def _mixed(words: Tensor, out: Tensor) -> Tensor:
    """w ^ (w >> 32), a bijection."""
    torch.bitwise_right_shift(words, 32, out=out)
    return out.bitwise_and_(_LOW).bitwise_xor_(words)  # masked, since a shift repeats the sign


def _of_shape(x: Tensor) -> int:
    """A hash of shape and size of elements, as a number of int64."""
    h = x.element_size()
    for size in x.shape:
        h = _mix64((h * _GOLDEN + size + 1) % _MOD)
    return h - _MOD if h >= _MOD >> 1 else h


def _mix64(h: int) -> int:
    h = (h ^ h >> 30) * _MIX1 % _MOD
    h = (h ^ h >> 27) * _MIX2 % _MOD
    return h ^ h >> 31


@cache
def _multipliers(count: int, device: torch.device) -> Tensor:
    """Odd numbers, hashes of the positions below ``count``."""
    h = torch.arange(1, count + 1, dtype=torch.int64, device=device) * (_GOLDEN - _MOD)
    for shift, factor in ((30, _MIX1 - _MOD), (27, _MIX2 - _MOD), (31, 1)):
        h = (h ^ ((h >> shift) & ((1 << 64 - shift) - 1))) * factor
    return h | 1
