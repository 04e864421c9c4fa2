"""What an engine does: one optimizer step, and what it tells of it."""

from dataclasses import dataclass
from enum import Enum
from math import isfinite


class Decision(Enum):
    """What to do with a step once its gradients are known."""

    APPLY = "apply"
    SKIP = "skip"


@dataclass(frozen=True)
class GradientStats:
    """After every reduction and before the update, the same on all ranks. loss: mean cross entropy in nats; norm: of all gradients,
    unclipped.
    """

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        return isfinite(self.loss) and isfinite(self.norm)


@dataclass(frozen=True)
class StepStats:
    """One optimizer step.

    loss: mean cross entropy a token in nats, None without labels.   tokens: valid labels of the global batch.
    """

    loss: float | None
    gradient_norm: float
    tokens: int
    applied: bool
