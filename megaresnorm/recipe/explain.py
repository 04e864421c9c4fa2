"""What an error says of a setting that is not known or has a wrong value: in one line, with what was meant."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from megaresnorm.limits import MAX_SHOWN
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.names import foreign_names, meaning_of, short

_NAME = re.compile(r"\w+", re.ASCII)
DEEPSPEED = "engine.deepspeed."
EVERYDAY = ("watchdog.", DEEPSPEED)  # start, step, checkpoint, debug are meant in their own section alone


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a recipe.

    >>> "model.init.std" in set(recipe_keys())
    True
    """
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            yield prefix + name
        else:
            yield from recipe_keys(inner, f"{prefix}{name}.")


def explain(error: Any) -> str:
    """One line for one pydantic error: key, value, what is allowed, a suggestion."""
    key = _shortened(".".join(str(part) for part in error["loc"]))
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "extra_forbidden" and key.startswith(DEEPSPEED):
        return _not_passed_on(key)
    if kind == "extra_forbidden":
        if _NAME.fullmatch(key):  # may be a section of another framework: what is in it?
            key = _shortened(".".join([key, *_first_inside(value)]))
        return f"{key}: no such setting{_suggest_key(key)}"
    if kind == "missing":
        of_a_list = any(isinstance(part, int) for part in error["loc"])
        return f"{key} is missing; " + ("add it there" if of_a_list else f"set it in the file or as {key}=...")
    if kind == "value_error":  # our own validators already name the keys
        return str(context["error"])
    if kind == "model_type":
        return f"{key}={short(value)}: wanted a section with keys, got a {type(value).__name__}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        own = re.sub(r"\.\d+$", "", key)
        meant = suggest(str(value), allowed).replace(f"; did you mean {own}?", ";")
        return f"{key}={short(value)}: wanted one of {', '.join(allowed)}{meant}"
    wanted = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    wanted = "boolean, true or false" if kind == "bool_type" else wanted
    got = f", got a {type(value).__name__}" if kind.endswith(("_type", "_float", "_parsing")) else ""
    if kind == "list_type" and isinstance(value, str):
        got += f"; write {key}='[{short(value)[1:-1]}]'"
    if kind == "string_type" and isinstance(value, int | float):
        got += f"; to mean a text put it in quotes, as in {key}='\"{short(value)}\"'"
    return f"{key}={short(value)}: wanted {wanted[0].lower()}{wanted[1:]}{got}"


def _shortened(key: str) -> str:
    return key if len(key) <= 2 * MAX_SHOWN else f"{key[: 2 * MAX_SHOWN]}..."


def _first_inside(value: Any) -> list[str]:
    """Names that lead to the first setting in a section, whatever a YAML file has as keys."""
    names = []
    while isinstance(value, dict) and value:
        name, value = next(iter(value.items()))
        names.append(str(name))
    return names


def suggest(word: str, allowed: Sequence[str]) -> str:
    """'; did you mean X?' for the allowed word that is nearest, or nothing.

    >>> suggest("deepnrom", ["deepnorm", "keel"])
    '; did you mean deepnorm?'
    """
    if meaning := meaning_of(word):
        return f"; {meaning}"
    # Of short words and numbers half the letters are not enough: fp16 is not a misspelt fp64.
    cutoff = 0.55 if len(word) > 4 and not any(map(str.isdigit, word)) else 0.8
    close = difflib.get_close_matches(word[:MAX_SHOWN], allowed, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def meant_by_option(option: str) -> str | None:
    """What to say where a setting was given as an option, as in ``--num-layers``; None where it is none.

    >>> meant_by_option("--steps")
    'settings are given as section.key=value, this one as train.steps=...'
    """
    name = option.lstrip("-").replace("-", "_")
    telling = [key for key in recipe_keys() if not key.startswith(EVERYDAY)]
    keys = [name] if name in recipe_keys() else [key for key in telling if key.partition(".")[2] == name]
    name = name.rpartition(".")[2]
    keys = keys or [key for key in telling if key.partition(".")[2] == name]
    if len(keys) == 1:
        return f"settings are given as section.key=value, this one as {keys[0]}=..."
    meaning = meaning_of(option.lstrip("-").replace("-", "_")) or meaning_of(name)
    return None if meaning is None else f"settings are given as section.key=value; {meaning}"


def _suggest_key(key: str) -> str:
    """The key meant by a misspelt one: in the same section first, else the same name in another section."""
    section, _, leaf = key.rpartition(".")
    if section.rpartition(".")[2].isdigit() and (own := _keys_of_items(section)):
        close = difflib.get_close_matches(leaf, own, n=1)
        return f"; did you mean {section}.{close[0]}?" if close else f"; {section} has {', '.join(own)}"
    keys = [k for k in recipe_keys() if not k.startswith(EVERYDAY)]
    names = {".".join(k.split(".")[: i + 1]) for k in recipe_keys() for i in range(k.count(".") + 1)}
    if meaning := meaning_of(key):  # names that mean something in their own section alone
        return f"; {meaning}"
    ours = [k for k in keys if k.partition(".")[2] == leaf]
    meaning = meaning_of(leaf)
    if len(ours) == 1 and (meaning is None or section not in names):  # in a section of another framework's
        return f"; did you mean {ours[0]}?"
    if meaning:
        return f"; {meaning}"
    siblings = sorted(n for n in names if n.rpartition(".")[0] == section)
    close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)
    best = close[0] if close and _similar(leaf, close[0].rpartition(".")[2]) else None
    if best is None:
        elsewhere = sorted(keys, key=lambda n: _ratio(leaf, n.rpartition(".")[2]), reverse=True)[0]
        best = elsewhere if _similar(leaf, elsewhere.rpartition(".")[2], 0.75) else None
    if best:
        return f"; did you mean {best}?"
    if section in names:
        return f"; {section} has {', '.join(n.rpartition('.')[2] for n in siblings)}"
    return f"; a recipe has {', '.join(sorted({name.partition('.')[0] for name in names}))}"


def _not_passed_on(key: str) -> str:
    """Why a setting under engine.deepspeed is not passed on: what decides it here, or what was meant.

    >>> _not_passed_on("engine.deepspeed.zero_optimization.stage")
    'engine.deepspeed.zero_optimization.stage is set by engine.zero_stage; remove it'
    """
    own = key.removeprefix(DEEPSPEED)
    leaf = own.rpartition(".")[2]
    theirs = {one.name: one for one in foreign_names() if one.framework == "deepspeed"}
    inside = (one for name, one in theirs.items() if name.startswith(f"{own}."))
    row = theirs.get(own) or next(inside, None) or theirs.get(leaf)
    if row is None:
        within = key.removesuffix(leaf)
        inner = (name.removeprefix(within) for name in recipe_keys() if name.startswith(within))
        beside = list(dict.fromkeys(name.partition(".")[0] for name in inner))
        near = difflib.get_close_matches(leaf, [*beside, *theirs], n=1, cutoff=0.75)
        if not near or near[0] in beside:
            meant = f"did you mean {within}{near[0]}?" if near else f"these are: {', '.join(beside)}"
            return f"{key}: no such setting of DeepSpeed is passed on; {meant}"
        key, row = f"{key}: {near[0]}", theirs[near[0]]
    if row.key.startswith(DEEPSPEED):
        return f"{key}: did you mean {row.key}?"
    return f"{key} is set by {row.key}; remove it" if row.key else f"{key}: {row.sentence}; remove it"


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *(() if get_origin(annotation) is list else get_args(annotation))):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)


def _keys_of_items(section: str) -> list[str]:
    """What an item of a list of sections has, such as data.blend.0; nothing where there is no such list."""
    model: type[BaseModel] | None = Recipe
    for name in section.split("."):
        if model is not None and name in model.model_fields:
            model = next(_sections_in(model.model_fields[name].annotation), None)
        elif not name.isdigit():
            return []
    return [] if model is None else list(model.model_fields)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _similar(a: str, b: str, least: float = 0.65) -> bool:
    """Whether one may be the other misspelt. Of names of two or three letters most must be right."""
    return _ratio(a, b) >= (least if min(len(a), len(b)) > 3 else 0.8)
