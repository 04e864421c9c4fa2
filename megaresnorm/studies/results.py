"""Results of a comparison's runs, as they are kept in their folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from megaresnorm.errors import ConfigError, DataError
from megaresnorm.reading import read_json_object

MAX_RESULT_BYTES, MAX_RESULT_VALUES = 1 << 28, 1 << 24  # a loss for each step
Outcome = Literal["trains", "unigram level", "lost"]


@dataclass(frozen=True)
class Result:
    """One run. Losses are means a token in nats; final is the mean of the last steps, best the least smoothed loss.

    max_lr: under a ramp, the learning rate at which what was learned was lost for good; 0 if nothing ever was ("unigram level"),
    None if it was never lost. lr_at_best: where the smoothed loss was least.
    """

    topology: str
    num_blocks: int
    seed: int
    final_loss: float
    valid_loss: float | None
    unigram_entropy: float
    best: float
    lr_at_best: float
    outcome: Outcome
    max_lr: float | None
    losses: list[float]


_RESULT = TypeAdapter(Result)


def kept_result(folder: Path, request: str, run: tuple[str, int, int]) -> Result | None:
    """The result of a run that is done, None for one that is not. Raises: ConfigError if it was begun with other settings."""
    for path in (folder / "request.json", folder / "result.json"):
        result: Result | None = None
        if not path.exists() and not path.is_symlink():
            return None
        try:
            done = read_json_object(path, MAX_RESULT_BYTES, MAX_RESULT_VALUES)
            if path.name == "result.json":
                result = _RESULT.validate_python(done.get("result"))
                if not result.losses or (result.topology, result.num_blocks, result.seed) != run:
                    raise ValueError("of another run")
        except (OSError, ValueError) as e:
            reason = e.errors()[0]["msg"] if isinstance(e, ValidationError) else getattr(e, "strerror", None) or e
            raise DataError(
                f"{path}: not the result of a run ({reason}); delete {folder} to train the run again"
            ) from None
        if done.get("request") != request:
            raise ConfigError(f"{path}: made with other settings or data; use another --out, or delete {folder}")
    return result
