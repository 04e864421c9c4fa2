"""The factor of the loss that keeps gradients within what FP16 holds, from 6e-8 to 65504.

Weights' gradients are FP32 before anything reads them, and are divided by the factor there. It is always a power of
two, so that neither multiplying nor dividing rounds.
"""

from pydantic import BaseModel, ConfigDict, Field

from megaresnorm.limits import MAX_STEPS
from megaresnorm.recipe import PrecisionRecipe
from megaresnorm.recipe.precision import PowerOfTwo

START = 2.0**16  # torch's GradScaler begins there: the first steps of most models bear it, and few are skipped if not
GROWTH, BACKOFF = 2.0, 0.5  # powers of two
INTERVAL = 2_000  # good steps in a row before a larger one is tried, which costs a step if it is too large
SMALLEST = 1.0  # a gradient that overflows without a scale is the run's fault
LARGEST = 2.0**24  # lifts FP16's smallest number to 4e-15: what is smaller teaches nothing beside what is seen


class LossScaleState(BaseModel):
    """What a checkpoint has of a scale.

    Attributes:
        value: the factor.
        good_steps: steps without an overflow since the factor was set.
        skipped: steps whose gradients have overflowed, in all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    value: PowerOfTwo = START
    good_steps: int = Field(default=0, ge=0, le=MAX_STEPS)
    skipped: int = Field(default=0, ge=0, le=MAX_STEPS)


class LossScale:
    """The factor of the loss in the next step. Decided on the host from what all ranks have alike: the step's vector.

    A dynamic one is halved at once when gradients overflow. Megatron-LM and DeepSpeed bear a few overflows first
    (hysteresis) and lose as many steps; a factor that is too small by half costs FP16 one of its forty powers of two.

    Args:
        static: a factor that stays; None for a dynamic one.
        interval: good steps after which a dynamic one grows.

    Attributes:
        state: what it is now.

    Source:
        Mixed precision training, arXiv:1710.03740, section 3.2.
    """

    def __init__(self, static: float | None = None, *, interval: int = INTERVAL) -> None:
        self._static, self._interval = static, interval
        self.state = LossScaleState(value=START if static is None else static)

    @classmethod
    def of(cls, precision: PrecisionRecipe) -> "LossScale | None":
        """The one that a recipe asks for; None where gradients need none."""
        if precision.compute != "fp16":
            return None
        return cls(precision.loss_scale if isinstance(precision.loss_scale, float) else None)

    @property
    def is_dynamic(self) -> bool:
        """Whether it follows the gradients."""
        return self._static is None

    @property
    def value(self) -> float:
        """The factor."""
        return self.state.value

    def update(self, overflowed: bool) -> bool:
        """Count a step whose loss was finite, and set the factor of the next one.

        Args:
            overflowed: whether its gradients were not finite.

        Returns:
            Whether the factor was lowered, so that the next step may fit.
        """
        before = after = self.value
        good_steps = 0 if overflowed else self.state.good_steps + 1
        if self.is_dynamic and overflowed:
            after = max(before * BACKOFF, SMALLEST)
        elif self.is_dynamic and good_steps >= self._interval:
            after, good_steps = min(before * GROWTH, LARGEST), 0
        skipped = self.state.skipped + overflowed
        self.state = LossScaleState(value=after, good_steps=good_steps, skipped=skipped)
        return after < before

    def load(self, state: LossScaleState | None) -> None:
        """Go on from a checkpoint; None, from one in another precision: begin anew. A static factor stays."""
        begun = LossScaleState() if state is None else state
        value = min(max(begun.value, SMALLEST), LARGEST) if self._static is None else self._static
        self.state = begun.model_copy(update={"value": value})
