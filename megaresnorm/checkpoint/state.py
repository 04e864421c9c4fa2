"""What a manifest says of a run beside its tensors."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaresnorm.errors import CheckpointError


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EngineState(_Typed):
    """updates: that the optimizer has made.   clipper_steps: those that per-tensor clipping has seen."""

    updates: int = Field(ge=0)
    clipper_steps: int = Field(ge=0)


class RunState(_Typed):
    """samples: read so far, which is the position in the data.   train_loss: of the last step that was applied.   recipe: resolved.
    data: digest of the token files.   tokenizer: its description, None where token files have none.   kernels: op -> choice.
    """

    samples: int = Field(ge=0)
    skipped_in_a_row: int = Field(ge=0)
    train_loss: float | None
    engine: EngineState
    recipe: dict[str, Any]
    data: str
    tokenizer: dict[str, Any] | None = None
    kernels: dict[str, str] = {}
    versions: dict[str, str] = {}


def state_of(folder: Path, state: dict[str, Any]) -> RunState:
    """Of a checkpoint's folder and its manifest's state. Raises: CheckpointError for one that is not of a run."""
    try:
        return RunState.model_validate(state)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{folder}: not the checkpoint of a run (state.{where}: {first['msg']})") from None
