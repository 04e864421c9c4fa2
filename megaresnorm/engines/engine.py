"""The interface between an engine and the training loop: one optimizer step, evaluation, and the engine's state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.data.loader import StepBatch
from megaresnorm.engines.passes import Passes
from megaresnorm.model.transformer import Transformer
from megaresnorm.optim import Gradient, GradientPlacement

if TYPE_CHECKING:
    from megaresnorm.engines.step_policy import StepPolicy, Totals
    from megaresnorm.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, the same on all ranks.

    Attributes:
        loss: mean cross entropy a token, in nats; None without labels.
        gradient_norm: of all gradients together, unclipped; 0 without labels.
        tokens: valid labels of the global batch.
        applied: whether the weights were updated. They are not without labels, and not where loss or norm is NaN,
            infinite or above ``StepPolicy.bounds``; then nothing has changed.
        stop: whether any rank asked to stop.
        loss_scale: factor of the loss in this step; None where gradients need none.
        lowered_to: that of the next step, where the gradients of a finite loss have overflowed and a smaller one may
            help; else None.
        skipped: steps whose gradients have overflowed so far, with this one.
    """

    loss: float | None
    gradient_norm: float
    tokens: int
    applied: bool
    stop: bool = False
    loss_scale: float | None = None
    lowered_to: float | None = None
    skipped: int = 0

    @property
    def is_finite(self) -> bool:
        """Whether neither loss nor norm is NaN or infinite."""
        return isfinite(self.loss or 0.0) and isfinite(self.gradient_norm)

    @property
    def overflows(self) -> bool:
        """Whether the gradients of a finite loss may be too large for a loss scale alone."""
        return (self.loss_scale or 1.0) > 1.0 and isfinite(self.loss or 0.0)

    def __str__(self) -> str:
        loss = "none" if self.loss is None else f"{self.loss:g}"  # without labels
        return f"loss {loss}, gradient norm {self.gradient_norm:g}"


class Updated(NamedTuple):
    """What a rank updates of one parameter.

    Attributes:
        name: global.
        weight: its elements: live memory.
        state: the optimizer's for them, by name.
        gradient: returns their reduced gradient, which there is from the end of backward until the update.
        placement: of the gradient.
    """

    name: str
    weight: Tensor
    state: Mapping[str, Tensor]
    gradient: Callable[[], Tensor]
    placement: GradientPlacement


class Engine(Protocol):
    """Owns this rank's part of the model, its optimizer and all that is between them. All methods are collective.

    Attributes:
        assembled: the model's stages, and what was decided when they were built.
        passes: the forward passes of single microbatches.
        policy: what becomes of a step.
    """

    assembled: Assembled
    passes: Passes
    policy: "StepPolicy"

    @property
    def pipeline(self) -> "Pipeline | None":
        """The stages of this rank and their schedule; None where there is one stage."""

    @property
    def gathers_weights(self) -> bool:
        """Whether hooks in the modules gather weights as they are needed: of FSDP2, or of ZeRO-3."""

    def backward(self, batch: StepBatch, tokens: int) -> Tensor:
        """Forward and backward of a global batch, in ``step``, up to reduced gradients; without tokens there are none.

        Returns:
            Sum of this rank's losses, FP64; 0 on the stages of a pipeline that have none.
        """

    def update(self, gradients: Sequence[Gradient], totals: "Totals", lr: float) -> None:
        """Clip and update, in ``step``; a no-op where the step is refused."""

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, where it has a single stage of it."""

    @property
    def stack(self) -> Callable[[int], int] | None:
        """Number of microbatches -> how many it needs, stacked into one batch; None: it takes them one by one."""

    @property
    def tensors(self) -> dict[str, dict[str, TensorSlices]]:
        """The whole model's tensors by group and global name, with this rank's live slices of them.

        The groups are weights, optimizer, and clipper where each tensor is clipped against its own history.
        """

    def updated(self) -> Sequence[Updated]:
        """What this rank updates of each of its parameters. Not collective."""

    def step(self, batch: StepBatch, lr: float, stop: Callable[[], bool] = lambda: False) -> StepStats:
        """Make one optimizer step, or refuse it.

        What is not finite, or above the policy's bounds, makes the update a no-op on the device. The caller reads
        ``applied`` afterwards, and may go on, run the step again or go back, from unchanged weights.

        Args:
            batch: this rank's share of the global batch.
            lr: the schedule's learning rate.
            stop: whether this rank asks to stop; called once, after the backward pass.
        """

    def evaluate(self, batch: StepBatch) -> float | None:
        """Mean cross entropy a token, in nats, without dropout and z-loss; None without labels."""

    def state(self) -> EngineState:
        """The part of the engine's state that is not tensors."""

    def load(self, checkpoint: Checkpoint, state: EngineState) -> None:
        """Take over a checkpoint of the same model, saved in whatever layout.

        Args:
            state: the ``state()`` of the engine that saved it.
        """

    def load_weights(self, checkpoint: Checkpoint) -> None:
        """Take over the weights alone of a checkpoint of a model with the same parameters, saved in whatever layout."""

    def weights_changed(self) -> None:
        """Renew what is derived from the weights, after they have been changed from outside."""

    def check_finite(self, where: str) -> None:
        """Check that all weights and optimizer state of this rank are finite.

        Args:
            where: begins the line of the error.

        Raises:
            CheckpointError: one is not; the line names it.
        """
