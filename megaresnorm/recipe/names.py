"""What settings are called elsewhere, and what they were called before."""

import json
import reprlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SHOWN

FOREIGN_NAMES = Path(__file__).with_name("foreign_names.tsv")


class Foreign(NamedTuple):
    """What another framework calls a setting.

    Attributes:
        framework: megatron, torchtitan, deepspeed, hf or others.
        key: our dotted key; empty where there is none.
        sentence: how it differs, or what to do instead; may be empty where there is a key.
    """

    framework: str
    name: str
    key: str
    sentence: str

    @property
    def meaning(self) -> str:
        """Our key, the sentence, or both."""
        return f"{self.key}, {self.sentence}" if self.key and self.sentence else self.key or self.sentence


@cache
def foreign_names() -> tuple[Foreign, ...]:
    """Names that other frameworks have, the most used ones first in each."""
    lines = FOREIGN_NAMES.read_text(encoding="utf-8").splitlines()
    return tuple(Foreign(*line.split("\t")) for line in lines if not line.startswith("#"))


def meaning_of(name: str) -> str | None:
    """What to say of a name that another framework has; None where none has it.

    Where frameworks mean different things by it, all are said.

    >>> meaning_of("learning_rate")
    'did you mean optim.lr?'
    """
    found = [one for one in foreign_names() if one.name == name]
    if not found:
        return None
    if len({one.key for one in found}) == 1 and found[0].key:
        sentences = list(dict.fromkeys(one.sentence for one in found if one.sentence))
        return f"did you mean {found[0].key}?" + (f" ({'; '.join(sentences)})" if sentences else "")
    meanings: dict[str, list[str]] = {}
    for one in found:
        meanings.setdefault(one.meaning, []).append(one.framework)
    if len(meanings) == 1:
        return found[0].sentence
    return "; ".join(f"in {' and '.join(dict.fromkeys(names))}: {meaning}" for meaning, names in meanings.items())


# Settings of older versions: their present names, and the present value for each of theirs.
OLD_NAMES: dict[str, tuple[str, dict]] = {
    "parallel.shard": ("reshard_after_forward", {"parameters": True, "gradients": False}),
    "train.tensorboard": ("loggers", {True: ["tensorboard"], False: []}),
}


def under_new_names(values: dict) -> dict:
    """The values under today's names; refuse a setting that has both of its names, or never had such a value."""
    for old, (new, meanings) in OLD_NAMES.items():
        section, _, key = old.partition(".")
        given = values.get(section) if isinstance(values, dict) else None
        if not isinstance(given, dict) or key not in given:
            continue
        if new in given:
            raise ConfigError(f"{old} is called {section}.{new} now, and both are given; remove {old}")
        if not isinstance(given[key], str | bool) or given[key] not in meanings:
            meant = ", ".join(f"{json.dumps(meaning)} ({value})".lower() for value, meaning in meanings.items())
            raise ConfigError(f"{old}={short(given[key])}: it is called {section}.{new} now; set that to {meant}")
        rest = {name: value for name, value in given.items() if name != key}
        values = values | {section: rest | {new: meanings[given[key]]}}
    return values


NEWER = {  # settings that there once were not, which is None today
    "data": ("tokenizer", "split", "valid"),
    "precision": ("loss_scale",),
    "schedule": ("warmup_ratio", "min_lr"),
}


def under_first_names(values: dict) -> dict:
    """The plain values of a recipe with every setting under the name that it had first, to digest or compare them.

    Newer settings that are not set are left out.

    >>> under_first_names({"parallel": {"tp": 2, "reshard_after_forward": False}})
    {'parallel': {'tp': 2, 'shard': 'gradients'}}
    """
    for old, (new, meanings) in OLD_NAMES.items():
        section, _, key = old.partition(".")
        if new in values.get(section, {}):
            rest = dict(values[section])
            given = rest.pop(new)
            values = values | {section: rest | {key: next((v for v, m in meanings.items() if m == given), given)}}
    for section, keys in NEWER.items():
        if section in values:
            kept = {key: value for key, value in values[section].items() if key not in keys or value is not None}
            values = values | {section: kept}
    return values


def flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of every setting.

    >>> flat({"train": {"steps": 3}})
    {'train.steps': 3}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def short(value: Any) -> str:
    """A value of a recipe as an error shows it."""
    if isinstance(value, int) and abs(value) >= 10**MAX_SHOWN:
        return f"a whole number of over {MAX_SHOWN} digits"
    text = reprlib.repr(value)  # not repr: aliases can make a small file an enormous value
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
