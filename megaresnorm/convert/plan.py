"""Which architecture a model is exported to: the first that holds it exactly."""

from dataclasses import dataclass

from pydantic import ValidationError

from megaresnorm.config import suggest
from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.families.family import Family
from megaresnorm.convert.fold import Fold, fold
from megaresnorm.convert.native import OURS
from megaresnorm.convert.remote import remote_family
from megaresnorm.convert.signature import different
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.recipe import ModelRecipe


@dataclass(frozen=True)
class Plan:
    """recipe: of what is written, with a topology's constants folded into the weights where ``fold`` says so.   notes: in what
    the written model differs, beside rounding.
    """

    family: Family
    recipe: ModelRecipe
    fold: Fold | None = None
    notes: tuple[str, ...] = ()


def plan(recipe: ModelRecipe, arch: str = "auto") -> Plan:
    """arch: auto takes the first architecture that holds the model exactly, our own code where none of Transformers' does.

    Raises: ConfigError for one that does not exist or does not hold the model, with the setting that it lacks.
    """
    if arch in (OURS, "remote-code"):
        return Plan(remote_family(), recipe)
    folded = fold(recipe)
    if arch == "auto":
        for family in FAMILIES:
            if not problems(family, recipe):
                return Plan(family, recipe)
        for family in FAMILIES if folded is not None and not folded.notes else ():
            assert folded is not None
            if not problems(family, folded.recipe):
                return Plan(family, folded.recipe, folded)
        return Plan(remote_family(), recipe)
    known = [family for family in FAMILIES if family.name == arch]
    if not known:
        names = list(dict.fromkeys(["auto", *(family.name for family in FAMILIES), OURS]))
        raise ConfigError(f"--arch {arch}: wanted one of {', '.join(names)}{suggest(arch, names)}")
    why: list[str] = []
    for family in known:
        if not problems(family, recipe):
            return Plan(family, recipe)
        for fitting, notes in ((recipe, ()), *([(folded.recipe, folded.notes)] if folded is not None else [])):
            found = problems(family, fitting)
            if not found.keys() - {"norm_eps"}:
                eps = tuple(
                    f"eps of all norms is {theirs:.3g} instead of {ours:.3g}" for ours, theirs in found.values()
                )
                return Plan(family, fitting, folded if fitting is not recipe else None, (*notes, *eps))
            key = next(key for key in found if key != "norm_eps")
            ours, theirs = found[key]
            wiring = key == "topology"
            why.append(
                f"model.topology={recipe.topology}"
                if wiring
                else f"model.{key} is {_short(ours)}, there it is {_short(theirs)}"
            )
    raise ConfigError(f"--arch {arch} does not hold this model exactly: {why[0]}; try --arch auto")


def problems(family: Family, recipe: ModelRecipe) -> dict[str, tuple]:
    """The settings in which the model that a family's config.json describes would differ, with ours and theirs."""
    if family.divided_dim and recipe.dim % recipe.num_heads:
        return {"num_heads": (recipe.num_heads, f"a divisor of {recipe.dim}")}
    try:
        return different(recipe, ModelRecipe(**family.settings(family.config(recipe))))
    except (CheckpointError, ValidationError, ArithmeticError, TypeError, ValueError) as e:
        return {"topology": (str(e), None)}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
