"""The state of a run that its manifest holds beside the tensors."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.limits import MAX_STEPS
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.precision.loss_scale import LossScaleState
from megaresnorm.recipe import ModelRecipe, Recipe
from megaresnorm.recipe.load import build_recipe


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_Range = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 63)]], Field(min_length=2, max_length=2)]


class EngineState(_Typed):
    """State of an engine.

    Attributes:
        updates: how many the optimizer has made.
        clipper_steps: how many steps per-tensor clipping has seen.
        loss_scale: of FP16; None under other precisions, and in checkpoints of versions without it.
    """

    updates: int = Field(ge=0, le=MAX_STEPS)
    clipper_steps: int = Field(ge=0, le=MAX_STEPS)
    loss_scale: LossScaleState | None = None


class GuardState(_Typed):
    """State of what judges steps.

    Attributes:
        losses, norms: of the last applied steps, oldest first.
        reruns, skips, rollbacks: how often a step was made again, left out, and the run taken back.
        passed: samples that are passed over, as [position, number].
    """

    losses: list[float] = Field(default=[], max_length=1000)
    norms: list[float] = Field(default=[], max_length=1000)
    reruns: int = Field(default=0, ge=0, le=MAX_STEPS)
    skips: int = Field(default=0, ge=0, le=MAX_STEPS)
    rollbacks: int = Field(default=0, ge=0, le=MAX_STEPS)
    passed: list[_Range] = Field(default=[], max_length=10_000)


class RunState(_Typed):
    """State of a run.

    Attributes:
        samples: how many have been read, which is the position in the data.
        skipped_in_a_row: refused steps up to here.
        first_refused: steps done before the first whose update was refused; checkpoints up to there are not pruned.
        train_loss: of the last step that was applied, in nats a token.
        recipe: the resolved recipe.
        data: digest of the token files.
        split: how these were split at random: by tokens, or by whole documents as before version 0.2.
        tokenizer: its description; None where token files have none.
        kernels: op -> chosen kernel.
        guard: what judges steps; empty in checkpoints of versions without it.
    """

    samples: int = Field(ge=0, lt=1 << 63)
    skipped_in_a_row: int = Field(ge=0, le=MAX_STEPS)
    first_refused: int | None = Field(default=None, ge=0, le=MAX_STEPS)
    train_loss: float | None
    engine: EngineState
    recipe: dict[str, Any]
    data: str
    split: Literal["tokens", "documents"] = "documents"
    tokenizer: dict[str, str] | None = None
    kernels: dict[str, str] = {}
    guard: GuardState = GuardState()
    versions: dict[str, str] = {}


def state_of(folder: Path, state: dict[str, Any]) -> RunState:
    """The state in the manifest of a checkpoint, validated.

    Args:
        folder: the checkpoint's, for errors.

    Raises:
        CheckpointError: it is not the state of a run.
    """
    try:
        return RunState.model_validate(state)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder}: not the checkpoint of a run (state.{where}: {first['msg']})") from None


def recipe_of(folder: Path, state: RunState) -> Recipe:
    """The recipe that a checkpoint was trained with.

    Args:
        folder: the checkpoint's, for errors.

    Raises:
        CheckpointError: no run can have had this recipe.
    """
    try:
        recipe = build_recipe(state.recipe)
    except ConfigError as e:
        raise CheckpointError(f"{folder}: its recipe cannot be used ({e})") from None
    if recipe.model.vocab_size is None:
        raise CheckpointError(f"{folder}: its recipe cannot be used (model.vocab_size is missing)")
    return recipe


def fitting_table(checkpoint: Checkpoint, model: ModelRecipe) -> dict[str, ParameterSpec]:
    """The parameters of ``model`` by name, found to be the checkpoint's weights; call it before making the model.

    Raises:
        CheckpointError: the checkpoint has the weights of another model.
    """
    have = len(checkpoint.names("weights"))
    if model.num_blocks > have:  # a table of so many would take a while
        raise CheckpointError(
            f"{checkpoint.folder}: its {have} weights are not of the {model.num_blocks} blocks of its recipe"
        )
    table = parameter_table(model)
    checkpoint.check_names("weights", {name: spec.shape for name, spec in table.items()})
    return table
