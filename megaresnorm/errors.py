"""Errors that a user can cause, and their exit codes. Their text is always one line."""

from collections.abc import Sequence
from typing import Any


class UserError(Exception):
    """Something outside the code is wrong: the command line prints the line and exits with ``exit_code``.

    Attributes:
        exit_code: of the process.
        agreed: whether all ranks raise it alike, so that only one of them prints it.
    """

    exit_code = 1
    agreed = False


class ConfigError(UserError):
    """A recipe, an override or a command-line argument that cannot be used."""

    exit_code = 2


class DataError(UserError):
    """Token files, a tokenizer or a corpus that cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is damaged, unsafe or does not fit the recipe."""

    exit_code = 4


class DamagedError(CheckpointError):
    """A checkpoint whose files are not what was written. An older one may be whole."""


class NonFiniteTensorError(CheckpointError):
    """Weights or moments with NaN or infinity. They are neither saved nor converted."""


class TrainingError(UserError):
    """The run itself cannot go on, as all ranks know: a loss stays non-finite, a folder cannot be written."""

    exit_code = 5
    agreed = True


class NonFiniteError(TrainingError):
    """Several steps in a row had a loss or gradient that is not finite."""


class CorruptionError(TrainingError):
    """Ranks that should hold or compute the same do not: memory or a chip has changed a bit.

    Attributes:
        found: what differs where, for whoever repairs it; empty where another rank has said so.
    """

    found: Sequence[Any] = ()


class StoppedError(UserError):
    """A signal came before the first step.

    Args:
        line: text of the error.
        exit_code: 128 and the number of the signal, as in shells.
    """

    agreed = True

    def __init__(self, line: str, exit_code: int = 143) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class LostRankError(UserError):
    """Another rank is gone, or was silent for too long. Started again, the run goes on from its newest checkpoint."""

    exit_code = 6


class TooManyRestartsError(LostRankError):
    """Ranks have died too often since the newest checkpoint. Starting them once more would not help."""


class ConversionError(UserError):
    """A converted model does not compute what the original does."""

    exit_code = 7


def error_of(kind: str, line: str, exit_code: int | None = None) -> UserError:
    """Make the error that another rank has raised.

    Args:
        kind: name of its class.
        line: its text.
        exit_code: None for that of the class.
    """
    kinds = (
        *(ConfigError, DataError, CheckpointError, DamagedError, NonFiniteTensorError),
        *(TrainingError, NonFiniteError, CorruptionError, StoppedError, LostRankError, TooManyRestartsError),
    )
    error = {one.__name__: one for one in kinds}.get(kind, UserError)(line)
    error.exit_code = exit_code or error.exit_code
    error.agreed = True
    return error
