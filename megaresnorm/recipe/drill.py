"""Settings of drills: faults that are injected on purpose."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from megaresnorm.limits import MAX_SECONDS
from megaresnorm.recipe.section import BlocksOr0, Count, Positive, Section, Seed, refuse_ignored

MAX_FAULTS = 1_000
FaultKind = Literal[
    "kill", "stop", "hang", "slow", "nan", "flip", "spike", "torn_write", "no_space", "io_error", "cut", "clock"
]
Place = Literal[
    "step", "loader", "forward", "collective", "save", "interpreter",
    "weight", "moment", "gradient", "reduced_gradient", "activation",
]  # fmt: skip

IN_STEP: tuple[Place, ...] = ("step", "loader", "forward", "collective", "save")
NUMBERS: tuple[Place, ...] = ("weight", "moment", "gradient", "reduced_gradient", "activation")
PLACES: dict[FaultKind, tuple[Place, ...]] = {
    "kill": IN_STEP,
    "stop": IN_STEP,
    "hang": (*IN_STEP, "interpreter"),
    "slow": ("loader", "forward"),
    "nan": NUMBERS,
    "flip": NUMBERS,
    "spike": (),
    "torn_write": ("save",),  # before the checkpoint counts; unset: when it does
    "no_space": ("save",),
    "io_error": ("save", "loader"),
    "cut": IN_STEP,
    "clock": IN_STEP,
}
LASTING: tuple[FaultKind, ...] = ("slow", "clock")


class FaultRecipe(Section):
    """One fault of a drill."""

    kind: FaultKind
    """What happens: a process is killed, stopped or hangs; it is slow; a number becomes NaN or has a bit flipped; a
    batch is poisoned; a file is torn, or cannot be written or read; connections are cut; the clock jumps."""
    step: Count
    """In which step."""
    rank: Annotated[int, Field(ge=0)] = 0
    """On which rank; a poisoned batch is one on all."""
    place: Place | None = None
    """Where in the step, or in what; unset: as it begins; of slow the forward pass, of nan and flip a weight."""
    block: BlocksOr0 | None = None
    """nan, flip: of which block numbers are spoilt; unset, or not on that rank: chosen by the seed."""
    times: Count = 1
    """How often it happens: a step that is run again, or done again after a restart, may meet it again. slow: steps."""
    seconds: Annotated[Positive, Field(le=MAX_SECONDS)] | None = None
    """slow: how much slower a step is; clock: how far the clock jumps; unset: 1, and 3600."""

    @model_validator(mode="after")
    def _has_such_a_place(self) -> Self:
        places = PLACES[self.kind]
        if self.place not in (None, *places):
            wanted = f"{', '.join(places)}, or unset" if places else "leave it unset"
            raise ValueError(f"place={self.place} is none of {self.kind}'s: {wanted}")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.kind not in LASTING:
            refuse_ignored(self, "drill.faults", f"kind={self.kind}", "seconds")
        if PLACES[self.kind] != NUMBERS:
            refuse_ignored(self, "drill.faults", f"kind={self.kind}", "block")
        if self.place == "reduced_gradient":
            refuse_ignored(self, "drill.faults", "place=reduced_gradient", "block")
        return self

    @property
    def where(self) -> Place | None:
        """The place, or the usual one of what must be in one to show in the times of a step."""
        return "forward" if self.kind == "slow" and self.place is None else self.place


class DrillRecipe(Section):
    """Faults that are injected on purpose, where MEGARESNORM_DRILL=1 is set as well."""

    faults: Annotated[list[FaultRecipe], Field(min_length=1, max_length=MAX_FAULTS)]
    """What is injected."""
    seed: Seed = 1234
    """Chooses the tensors, elements and bits."""
