"""The interface between an engine and the training loop: statistics of a step, and the decision about it."""

from dataclasses import dataclass
from enum import Enum
from math import isfinite


class Decision(Enum):
    """The training loop's decision about a step once its gradients are known."""

    APPLY = "apply"
    SKIP = "skip"


@dataclass(frozen=True)
class GradientStats:
    """A step after every reduction and before the update, the same on all ranks.

    Attributes:
        loss: mean cross entropy a token, in nats.
        norm: of all gradients together, unclipped.
    """

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether neither is NaN or infinite."""
        return isfinite(self.loss) and isfinite(self.norm)


@dataclass(frozen=True)
class StepStats:
    """One optimizer step.

    Attributes:
        loss: mean cross entropy a token, in nats; None without labels.
        gradient_norm: as in ``GradientStats``; 0 without labels.
        tokens: valid labels of the global batch.
        applied: whether the weights were updated.
    """

    loss: float | None
    gradient_norm: float
    tokens: int
    applied: bool
