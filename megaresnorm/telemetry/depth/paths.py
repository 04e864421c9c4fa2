"""Which paths through a residual network carry the gradient: their number by length times what one of them passes on.

A network of L = 2N residual sub-layers is 2^L paths, each of which goes through the branch of k of them and past the
others. Of length k there are C(L, k), most of them L/2 long; but a long path's gradient is a product of many branches'.

Source:
    Veit et al., arXiv:1605.06431, section 4.3.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp, inf, lgamma, log
from random import Random
from typing import Any

from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.residual import Residual
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.telemetry.depth.streams import blocks_of
from megaresnorm.telemetry.wrapped import Wrapped

DRAWS = 2  # paths of each length that are measured


def lengths(num_sublayers: int) -> list[int]:
    """Those that are measured: 0, the powers of two, and the longest.

    >>> lengths(12)
    [0, 1, 2, 4, 8, 12]
    """
    powers = (2**i for i in range(num_sublayers.bit_length()))
    return [0, *(power for power in powers if power < num_sublayers), num_sublayers]


def draws(num_sublayers: int, seed: int, step: int) -> Iterator[tuple[int, frozenset[int]]]:
    """The paths that are measured after a step: (length, the sub-layers through whose branch it goes).

    Each is a function of (seed, step, length, draw). There is a single path without a branch, and one through all.
    """
    for length in lengths(num_sublayers):
        for draw in range(1 if length in (0, num_sublayers) else DRAWS):
            chosen = Random(f"{seed}/{step}/{length}/{draw}").sample(range(num_sublayers), length)
            yield length, frozenset(chosen)


def wrap_path(wrapped: Wrapped, assembled: Assembled, through: frozenset[int]) -> None:
    """Let gradients pass along one path alone: through the branches of these sub-layers and past those of all others.

    Values stay whole. Where a branch is gone through, its connection's trunk gives no gradient to the add; elsewhere
    what is added gives none. Of a token gate the branch is all that is added, T (F(u) - x). Norms of the sum are on
    every path.
    """
    for number, block in blocks_of(assembled):
        for place, residual in enumerate(block.sublayers):
            passes = number * len(SUBLAYERS) + place in through
            wrapped.method(residual, "close_and_open", _inner(passes))
            wrapped.method(residual, "close", _last(passes))


def _inner(passes: bool) -> Callable[[Callable], Callable]:
    def around(close_and_open: Callable) -> Callable:
        def one_way(following: Residual, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Any:
            return close_and_open(following, *_one_way(x, y, passes), masks)

        return one_way

    return around


def _last(passes: bool) -> Callable[[Callable], Callable]:
    def around(close: Callable) -> Callable:
        def one_way(x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Stream:
            return close(*_one_way(x, y, passes), masks)

        return one_way

    return around


def _one_way(x: Tensor, y: Tensor, passes: bool) -> tuple[Tensor, Tensor]:
    return (x.detach(), y) if passes else (x, y.detach())


def distribution(norms: Mapping[int, Sequence[float]], num_sublayers: int) -> dict[str, list]:
    """The share of the gradient that paths of each length carry.

    share_k is in proportion to C(L, k) times the gradient's norm along a path of length k. That norm is the mean of
    those measured, and between lengths its logarithm is interpolated linearly; the products are made of logarithms. It
    approximates: a sum of paths is shorter than the sum of their norms, and two draws of C(L, k) are few.

    Args:
        norms: the measured ones by length.

    Returns:
        Lists for every length from 0 to L: ``lengths``, ``log_norms`` (None where none is known, or it is 0) and
        ``shares``.
    """
    means = {length: sum(of) / len(of) for length, of in norms.items()}
    known = [(length, log(mean)) for length, mean in sorted(means.items()) if 0 < mean < inf]
    all_lengths = list(range(num_sublayers + 1))
    log_norms = [_between(known, length) for length in all_lengths]
    weights = [None if n is None else n + _log_binomial(num_sublayers, k) for k, n in enumerate(log_norms)]
    largest = max((weight for weight in weights if weight is not None), default=0.0)
    parts = [0.0 if weight is None else exp(weight - largest) for weight in weights]
    total = sum(parts)
    return {
        "lengths": all_lengths,
        "log_norms": log_norms,
        "shares": [part / total if total else 0.0 for part in parts],
    }


def mean_length(paths: Mapping[str, Sequence]) -> float | None:
    """sum k share_k; None where no path carries anything."""
    shares = paths["shares"]
    return sum(k * share for k, share in zip(paths["lengths"], shares, strict=True)) if any(shares) else None


def _between(known: Sequence[tuple[int, float]], length: int) -> float | None:
    below = max((one for one in known if one[0] <= length), default=None)
    above = min((one for one in known if one[0] >= length), default=None)
    if below is None or above is None:
        return None
    (first, low), (last, high) = below, above
    return low if first == last else low + (high - low) * (length - first) / (last - first)


def _log_binomial(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
