"""From the sums of a step to its figures, on the host."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import isfinite, sqrt

from torch import Tensor

from megaresnorm.telemetry.depth.streams import StreamTotals
from megaresnorm.telemetry.depth.tensors import CLASSES, GRADIENT, OUTER, UPDATE, WEIGHT

Numbers = list[float | None]
# A sub-layer whose branch adds less than a hundredth of its trunk turns the stream by at most 0.6 degrees.
ABOVE = 0.01
# An update so many times its weights is of weights that were 0: what is found of those before it is its rounding.
FROM_ZERO = 1e6


@dataclass(frozen=True)
class DepthFigures:
    """The cheap figures of a step; docs/depth.md has what each means.

    Attributes:
        by_sublayer, by_block, whole: as in depth.jsonl; None where there is nothing to be divided by.
        end_rms: RMS of the stream after the last block.
    """

    by_sublayer: Mapping[str, Numbers]
    by_block: Mapping[str, Numbers]
    whole: Mapping[str, float | None]
    end_rms: float | None


def figures_of(
    alphas: Sequence[float],
    streams: StreamTotals,
    scores: Tensor,
    tensors: Tensor | None,
    *,
    present: AbstractSet[int] = frozenset(),
    scale: float = 1.0,
) -> DepthFigures:
    """The figures of a step.

    Args:
        alphas: factors of the trunk, by sub-layer.
        streams: of all ranks, on the host.
        scores: [N] likewise, the largest of each block.
        tensors: likewise, see ``tensor_sums``; None: not measured.
        present: the places among ``tensors`` at which the model has some.
        scale: what the loss was multiplied by in backward.
    """
    elements: list[float] = streams.elements.tolist()
    by_sublayer, end_rms = _by_sublayer(alphas, streams.moments.tolist(), elements)
    gradients = [root(squares) for squares in streams.gradients.tolist()]
    stream_gradients: Numbers = [None if g is None else g / scale for g in gradients]
    by_block = _angles(streams.angles.tolist())
    by_block["logit_max"] = [finite(score) for score in scores.tolist()]
    by_block["stream_gradient"] = stream_gradients[:-1]
    ratios = by_sublayer["branch_ratio"]
    whole: dict[str, float | None] = {
        "logit_max": max((s for s in by_block["logit_max"] if s is not None), default=None),
        "effective_depth": effective_depth(ratios),
        "sublayers_above": float(sum(ratio is not None and ratio > ABOVE for ratio in ratios)),
        "gradient_ratio": quotient(stream_gradients[0], stream_gradients[-1]),
    }
    if tensors is not None:
        of_blocks, of_outer = _tensors(tensors.tolist(), len(stream_gradients) - 1, present)
        by_block |= of_blocks
        whole |= of_outer
    return DepthFigures(by_sublayer, by_block, whole, end_rms)


def effective_depth(ratios: Iterable[float | None]) -> float | None:
    """How many sub-layers do the work: (sum r^2)^2 / sum r^4 of the ratios of contribution and trunk.

    It is the participation ratio: 2N where all contribute alike, 1 where one does, 0 where none does.

    >>> effective_depth([0.5, 0.5, 0.5, None]), effective_depth([1.0, 0.0]), effective_depth([0.0])
    (3.0, 1.0, 0.0)
    """
    squares = [ratio * ratio for ratio in ratios if ratio is not None]
    fourth = sum(square * square for square in squares)
    return quotient(sum(squares) ** 2, fourth) if fourth or not squares else 0.0


def finite(number: float | None) -> float | None:
    """The number; None where it is not finite."""
    return None if number is None or not isfinite(number) else number


def root(number: float) -> float | None:
    """The square root; None where there is none, and of what is not finite."""
    return sqrt(number) if isfinite(number) and number >= 0 else None


def quotient(a: float | None, b: float | None) -> float | None:
    """a / b; None where that is no number."""
    return None if a is None or not b or not isfinite(b) else finite(a / b)


def _by_sublayer(
    alphas: Sequence[float], moments: list[list[float]], elements: list[float]
) -> tuple[dict[str, Numbers], float | None]:
    names = ("stream_rms", "sum_rms", "branch_rms", "branch_ratio", "branch_cosine", "kurtosis")
    found: dict[str, Numbers] = {name: [] for name in names}
    after = 0.0
    for alpha, (x2, x4, c2, xc), count in zip(alphas, moments[:-1], elements[:-1], strict=True):
        after = alpha**2 * x2 + 2 * alpha * xc + c2
        trunk, branch = root(x2), root(c2)
        fourth = quotient(x4 * count, x2**2)
        one = (
            _rms(x2, count), _rms(max(after, 0.0), count), _rms(c2, count),
            None if branch is None or trunk is None else quotient(branch, abs(alpha) * trunk),
            None if branch is None or trunk is None else quotient(xc, trunk * branch),
            None if fourth is None else fourth - 3.0,
        )  # fmt: skip
        for name, number in zip(names, one, strict=True):
            found[name].append(number)
    closed = bool(elements[-1])
    return found, _rms(moments[-1][0], elements[-1]) if closed else _rms(after, elements[-2])


def _rms(squares: float, count: float) -> float | None:
    mean = quotient(squares, count)
    return None if mean is None else root(mean)


def _angles(angles: list[list[float]]) -> dict[str, Numbers]:
    return {
        "cosine": [quotient(cosine, count) for cosine, _, count in angles],
        "angular_distance": [quotient(angle, count) for _, angle, count in angles],
    }


def _tensors(
    sums: list[list[float]], num_blocks: int, present: AbstractSet[int]
) -> tuple[dict[str, Numbers], dict[str, float | None]]:
    """Norms of gradients and relative updates: by block in all and by class, and of what is outside of blocks."""
    kinds = len(CLASSES)
    gradients = [root(row[GRADIENT]) if place in present else None for place, row in enumerate(sums)]
    updates = [_update(row) for row in sums]
    blocks = [sums[kinds * block : kinds * (block + 1)] for block in range(num_blocks)]
    totals = [[sum(column) for column in zip(*rows, strict=True)] for rows in blocks]
    of_blocks: dict[str, Numbers] = {
        "gradient_norm": [root(row[GRADIENT]) for row in totals],
        "update_ratio": [_update(row) for row in totals],
    }
    last = kinds * num_blocks
    for place, kind in enumerate(CLASSES):
        of_blocks |= {f"gradient_norm/{kind}": gradients[place:last:kinds]}
        of_blocks |= {f"update_ratio/{kind}": updates[place:last:kinds]}
    of_outer = {f"gradient_norm/{name}": number for name, number in zip(OUTER, gradients[last:], strict=False)}
    of_outer |= {f"update_ratio/{name}": number for name, number in zip(OUTER, updates[last:], strict=False)}
    return of_blocks, of_outer


def _update(row: list[float]) -> float | None:
    ratio = quotient(row[UPDATE], row[WEIGHT])
    return None if ratio is None or ratio > FROM_ZERO**2 else root(ratio)
