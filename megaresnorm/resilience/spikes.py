"""When a loss or a gradient norm is a spike: far above what the last steps had, by a robust statistic.

Published policies take the mean and six standard deviations of the last 128 steps (OLMo-core's SkipStepOptimizer), or
moving averages of the norm (ZClip, arXiv:2504.02507). A mean and a deviation are moved by the very spikes that they are
to find. Here the median and the median absolute deviation take their place: up to half of the window may be spikes.
"""

from collections import deque
from collections.abc import Iterable
from math import exp, log
from statistics import median
from typing import NamedTuple

WINDOW = 128  # applied steps that are looked back at
NEEDED = 64  # before which nothing is a spike
DEVIATIONS = 6.0
NORMAL = 1.4826  # of a normal distribution, its standard deviation in median absolute deviations
# The least deviation that counts: of the loss a hundredth of it, of the norm a tenth. A smaller one is that of a run
# that repeats itself, in which any change would be a spike.
LEAST_LOSS, LEAST_NORM = 0.01, 0.1


class Bounds(NamedTuple):
    """What a step may have at most, unless it is to be refused as a spike.

    Attributes:
        loss: mean a token, in nats.
        norm: of all gradients together.
    """

    loss: float
    norm: float

    def of_sums(self, tokens: int) -> tuple[float, float]:
        """The same for the sums over all ranks of the losses and of the squares of the gradients."""
        return self.loss * tokens, self.norm**2


class Spikes:
    """The losses and gradient norms of the last applied steps.

    Norms are compared by their logarithms, since they scatter by factors.

    Args:
        losses: of earlier steps in nats a token, oldest first, as a checkpoint has them.
        norms: of their gradients.
    """

    def __init__(self, losses: Iterable[float] = (), norms: Iterable[float] = ()) -> None:
        self._losses, self._norms = deque(losses, WINDOW), deque(norms, WINDOW)

    @property
    def losses(self) -> list[float]:
        """In nats a token, oldest first."""
        return list(self._losses)

    @property
    def norms(self) -> list[float]:
        """Of gradients, oldest first."""
        return list(self._norms)

    def add(self, loss: float, norm: float) -> None:
        """Take note of a step that was applied."""
        self._losses.append(loss)
        self._norms.append(norm)

    def bounds(self) -> Bounds | None:
        """What the next step may have at most; None while too few steps are known.

        >>> spikes = Spikes([2.0, 2.1] * 40, [1.0, 1.2] * 40)
        >>> [round(most, 2) for most in spikes.bounds()]
        [2.49, 2.46]
        """
        if len(self._losses) < NEEDED:
            return None
        return Bounds(
            _most(self._losses, LEAST_LOSS * abs(median(self._losses))),
            exp(_most([log(max(norm, 1e-300)) for norm in self._norms], LEAST_NORM)),
        )


def _most(values: Iterable[float], least: float) -> float:
    """The median and ``DEVIATIONS`` robust standard deviations, each at least ``least``."""
    values = list(values)
    middle = median(values)
    deviation = NORMAL * median(abs(value - middle) for value in values)
    return middle + DEVIATIONS * max(deviation, least)
