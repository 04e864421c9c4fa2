"""What all sections of a recipe share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse_ignored(section: Section, name: str, why: str, *keys: str) -> None:
    """Raise for a setting that differs from its default but would have no effect."""
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            raise ValueError(f"{name}.{key}={getattr(section, key)} has no effect with {why}; remove it")


def divisors(n: int) -> list[int]:
    """All divisors of n, for error messages."""
    return [d for d in range(1, n + 1) if n % d == 0]
