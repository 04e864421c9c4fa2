"""What a step's time is charged to: rows, which are parts of a model or of a step, and phases of each."""

from enum import IntEnum
from typing import NamedTuple


class Phase(IntEnum):
    """What is being done for a row.

    Attributes:
        FORWARD: its forward pass, or all of its work where it has no other.
        BACKWARD: its backward pass without what the next three say.
        INPUT_GRAD, WEIGHT_GRAD: products for gradients of inputs and weights, in steps that tell them apart.
        RECOMPUTE: forward passes that are run again, and branch inputs that are made again.
        EXPOSED: starting messages, and waiting for them.
    """

    FORWARD = 0
    BACKWARD = 1
    INPUT_GRAD = 2
    WEIGHT_GRAD = 3
    RECOMPUTE = 4
    EXPOSED = 5


NUM_PHASES = len(Phase)


class Row(NamedTuple):
    """Something that time is charged to.

    Attributes:
        name: as people read it; rows of several ranks with one name are the same row.
        part: attention, ffn, norm, block (several parts compiled together), embedding, head, stage (what a pipeline
            does around them), weights (gathering them), gradients, optimizer, data, host, bubble, other.
        block: the first block's number; None for what is not of a block.
        stage: of the pipeline; None for what every rank has.
        num_blocks: from ``block`` on, that are compiled together.
    """

    name: str
    part: str
    block: int | None = None
    stage: int | None = None
    num_blocks: int = 1


GRADIENTS = Row("gradients", "gradients")
OPTIMIZER = Row("optimizer", "optimizer")
HOST = Row("host", "host")
DATA = Row("data", "data")
BUBBLE = Row("bubble", "bubble")
WEIGHTS = Row("weights", "weights")


class Rows:
    """The rows of a rank, in the order in which they were named. A place is a row and a phase, as one number.

    Attributes:
        again: rows whose forward pass was run again -> whether all of it was; otherwise all but its last product.
    """

    def __init__(self) -> None:
        self._numbers: dict[Row, int] = {}
        self.again: dict[Row, bool] = {}
        self.other = self.place(Row("unaccounted", "other"), Phase.FORWARD)

    def place(self, row: Row, phase: Phase) -> int:
        """The place of a row and a phase."""
        return self._numbers.setdefault(row, len(self._numbers)) * NUM_PHASES + phase

    def number(self, row: Row) -> int:
        """Where a row stands among ``rows``."""
        return self._numbers[row]

    @property
    def rows(self) -> list[Row]:
        """All rows, by number."""
        return list(self._numbers)

    @property
    def names(self) -> list[str]:
        """The name of every place."""
        return [f"{row.name} {phase.name.lower()}" for row in self._numbers for phase in Phase]


def in_phase(place: int, phase: Phase) -> int:
    """The place of another phase of the same row."""
    return place - place % NUM_PHASES + phase
