"""What all sections of a recipe share: the types of settings."""

import os
from math import isqrt
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megaresnorm.limits import (
    FP32_MAX,
    FP32_TINY,
    MAX_BATCH,
    MAX_BLOCKS,
    MAX_RANKS,
    MAX_SEQ_LEN,
    MAX_STEPS,
    MAX_VOCAB,
    MAX_WIDTH,
)
from megaresnorm.reading import expanded, is_beside


def _held_by_fp32(value: float) -> float:
    if value and not FP32_TINY <= abs(value) <= FP32_MAX:
        raise PydanticCustomError("beyond_fp32", f"a number that FP32 holds, from {FP32_TINY:.6g} to {FP32_MAX:.6g}")
    return value


def _no_nul(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("nul", "a name without NUL characters")
    return value


def _path(value: str) -> str:
    try:
        found = expanded(value)
    except ValueError as e:
        raise PydanticCustomError("path", "a path that can be used ({why})", {"why": str(e)}) from None
    return os.path.abspath(found) if is_beside(found) else found


Count = Annotated[int, Field(ge=1, le=MAX_STEPS)]
CountOr0 = Annotated[int, Field(ge=0, le=MAX_STEPS)]
Blocks = Annotated[int, Field(ge=1, le=MAX_BLOCKS)]
BlocksOr0 = Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Vocabulary = Annotated[int, Field(ge=1, le=MAX_VOCAB)]
SequenceLength = Annotated[int, Field(ge=1, le=MAX_SEQ_LEN)]
Batch = Annotated[int, Field(ge=1, le=MAX_BATCH)]
Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]
Positive = Annotated[float, Field(gt=0), AfterValidator(_held_by_fp32)]
PositiveOr0 = Annotated[float, Field(ge=0), AfterValidator(_held_by_fp32)]
AtLeast1 = Annotated[float, Field(ge=1), AfterValidator(_held_by_fp32)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Word = Annotated[str, Field(min_length=1, max_length=100)]
Name = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_nul)]
# In a recipe's file ./ and ../ are its own folder (recipe.load), elsewhere the working directory; ~ and $NAME are
# expanded. All other paths are relative to the working directory.
PathName = Annotated[Name, AfterValidator(_path), Field(json_schema_extra={"format": "path"})]


class Section(BaseModel):
    """One section of a recipe: frozen and strict, each field described by the string under it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def refuse_ignored(section: Section, name: str, why: str, *keys: str, advice: str = "remove it") -> None:
    """Refuse settings that differ from their defaults but would have no effect.

    Args:
        name: the section's, as in ``model.init``.
        why: the setting under which they have none, as in ``model.norm=rmsnorm``.
        *keys: the fields of the section to look at.
        advice: what to do.

    Raises:
        ValueError: one of them is such a setting.
    """
    for key in keys:
        if getattr(section, key) != type(section).model_fields[key].default:
            raise ValueError(f"{name}.{key}={getattr(section, key)} has no effect with {why}; {advice}")


def divisors(n: int, near: int | None = None, most: int = 12) -> list[int]:
    """Divisors of n, in order, for error messages.

    Takes about the square root of n steps: no time for any number that a recipe can have.

    Args:
        near: the number to stay near to where there are too many; None: the smallest are taken.
        most: how many divisors to return at most.

    >>> divisors(64), divisors(720720, near=100, most=4)
    ([1, 2, 4, 8, 16, 32, 64], [91, 99, 104, 105])
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    found = small + [n // d for d in reversed(small) if d * d != n]
    if len(found) <= most:
        return found
    return sorted(sorted(found, key=lambda d: abs(d - near))[:most]) if near is not None else found[:most]
