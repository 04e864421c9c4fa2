"""Results of the runs of a comparison, as they are kept in the runs' folders."""

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
    """One run. Losses are means a token in nats.

    Attributes:
        final_loss: mean of the last steps.
        valid_loss: None without a validation split, or where the run diverged.
        best: least smoothed loss.
        lr_at_best: learning rate at which the smoothed loss was least.
        max_lr: under a ramp, the learning rate at which what was learned was lost for good; 0 if nothing was ever
            learned ("unigram level"), None if it was never lost.
        losses: one for each step; infinite where a step has none.
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
    """Read the result of a run.

    Args:
        request: digest of its recipe and data.
        run: (topology, number of blocks, seed).

    Returns:
        None where the run is not done.

    Raises:
        ConfigError: it was begun with other settings or data.
        DataError: a file in its folder is damaged, or of another run.
    """
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
