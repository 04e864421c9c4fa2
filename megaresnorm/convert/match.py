"""The choice of the architecture that a model is exported to: the first that holds it exactly.

Constants of a topology are folded into the weights for architectures that have no place for them:
norm(alpha x + F) = norm(x + F / alpha) if eps is divided by alpha^2 as well, and c * norm(x) is a norm with c times its
weights.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.family import OURS, Family
from megaresnorm.convert.remote import remote_family
from megaresnorm.convert.signature import different, trunk_alpha, wiring
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.model.topology import residual_at, topology
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe, TopologyOptions
from megaresnorm.recipe.explain import suggest


@dataclass(frozen=True)
class Fold:
    """A model whose topology's constants are folded into its weights.

    Attributes:
        before: the model as it is.
        recipe: the model with folded weights.
        notes: how the two differ beside rounding.
    """

    before: ModelRecipe
    recipe: ModelRecipe
    notes: tuple[str, ...] = ()

    def factor(self, name: str) -> float:
        """The factor on a parameter, by its name."""
        match name.split("."):
            case ["blocks", block, "attention" | "ffn" as sublayer, "branch", "out" | "down", _]:
                return 1 / residual_at(self.before, int(block), sublayer).alpha
            case ["blocks", block, "attention" | "ffn" as sublayer, "norm_in", _]:
                return residual_at(self.before, int(block), sublayer).norm_in_scale
        return 1.0


def fold(recipe: ModelRecipe) -> Fold | None:
    """The model with its constants folded into the weights; None where nothing can be folded."""
    plain: dict[str, Any] = {"topology_options": TopologyOptions()}
    if recipe.topology == "lns" and not recipe.norm_zero_centered:
        return Fold(recipe, recipe.model_copy(update=plain | {"topology": "pre"}))
    alpha = trunk_alpha(recipe)
    same_but_alpha = recipe.model_copy(update={"topology": "post", "topology_options": TopologyOptions(alpha=alpha)})
    # Norms of queries and keys would have the eps of the others.
    if alpha == 1.0 or recipe.qk_norm != "none" or wiring(recipe) != wiring(same_but_alpha):
        return None
    eps, embedding_norm = recipe.norm_eps / alpha**2, has_embedding_norm(recipe)
    note = f"eps of the embedding's norm is {eps:.3g} instead of {recipe.norm_eps:.3g}"
    folded = plain | {"topology": "post", "norm_eps": eps, "embedding_norm": embedding_norm}
    return Fold(recipe, recipe.model_copy(update=folded), (note,) if embedding_norm else ())


@dataclass(frozen=True)
class Match:
    """An architecture and the model that is written as it.

    Attributes:
        recipe: of the written model.
        fold: how it comes from the original; None where that is written as it is.
        notes: how the written model differs beside rounding.
    """

    family: Family
    recipe: ModelRecipe
    fold: Fold | None = None
    notes: tuple[str, ...] = ()

    def factor(self, name: str) -> float:
        """The factor on a parameter of ours, by its name."""
        return 1.0 if self.fold is None else self.fold.factor(name)


def match_family(recipe: ModelRecipe, arch: str = "auto") -> Match:
    """Choose the architecture that a model is exported to.

    Args:
        arch: a model_type, or remote-code for our own; auto takes the first that holds the model exactly, and our own
            where none of Transformers' does.

    Raises:
        ConfigError: the architecture does not exist or does not hold the model; the setting that it lacks is named.
    """
    if arch in (OURS, "remote-code"):
        return Match(remote_family(), recipe)
    folded = fold(recipe)
    ways: list[tuple[ModelRecipe, Fold | None]] = [
        (recipe, None),
        *([(folded.recipe, folded)] if folded is not None else []),
    ]
    if arch == "auto":
        for fitting, fold_of_it in ways:
            if fold_of_it is not None and fold_of_it.notes:
                continue
            for family in FAMILIES:
                if not mismatches(family, fitting):
                    return Match(family, fitting, fold_of_it)
        return Match(remote_family(), recipe)
    return _asked_for(arch, ways)


def _asked_for(arch: str, ways: list[tuple[ModelRecipe, Fold | None]]) -> Match:
    """The first way in which an architecture holds a model, but for the eps of its norms.

    Raises:
        ConfigError: there is none.
    """
    known = [family for family in FAMILIES if family.name == arch]
    if not known:
        names = list(dict.fromkeys(["auto", *(family.name for family in FAMILIES), "remote-code"]))
        raise ConfigError(f"--arch {arch}: wanted one of {', '.join(names)}{suggest(arch, names)}")
    lacking = None
    for family in known:
        for fitting, folded in ways:
            found = mismatches(family, fitting)
            notes = () if folded is None else folded.notes
            if "norm_eps" in found:
                ours, theirs = found.pop("norm_eps")
                notes = (*notes, f"eps of all norms is {theirs:.3g} instead of {ours:.3g}")
            if not found:
                return Match(family, fitting, folded, notes)
            if (
                lacking is None or lacking[0] == "topology"
            ):  # where a class has two wirings, the reason of the one that fits
                lacking = next(iter(found.items()))
    assert lacking is not None
    key, (ours, theirs) = lacking
    what = f"is {_short(ours)}, there it is {_short(theirs)}" if key != "topology" else f"is {ways[0][0].topology}"
    raise ConfigError(f"--arch {arch} does not hold this model exactly: model.{key} {what}; try --arch auto")


def mismatches(family: Family, recipe: ModelRecipe) -> dict[str, tuple]:
    """Settings in which the model would differ when read back from the family's config.json, as (ours, theirs)."""
    if family.divided_dim and recipe.dim % recipe.num_heads:
        return {"num_heads": (recipe.num_heads, f"a divisor of {recipe.dim}")}
    try:
        topology(recipe.topology)  # refuses one that a config.json of a newer version may name
        return different(recipe, ModelRecipe(**family.settings(family.config(recipe))))
    except (CheckpointError, ConfigError, ValidationError, ArithmeticError, TypeError, ValueError) as e:
        return {"topology": (str(e), None)}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
