"""YAML and dotted overrides -> Recipe, with one-line errors that say what to do.

The YAML read here is the safe subset of YAML 1.2's core schema: ``3e-4`` is a number, ``no`` and ``010`` are not
a boolean and an octal number, and a key given twice is an error.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.reading import first_line, is_beside, read_plain_file
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.explain import explain
from megaresnorm.recipe.names import short, under_new_names

MAX_RECIPE_BYTES = 1 << 18  # a blend of a thousand sources with long paths; PyYAML takes two seconds for so much
MAX_VALUES = 8_000  # of a recipe, every alias counted as all that it stands for
MAX_DEPTH = 16  # of lists and sections in each other
MAX_DIGITS = 400  # of a whole number: Python refuses to read or show one of thousands
_SCALARS = ("str", "int", "float", "bool", "null")


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; refuses duplicate keys, merge keys, YAML 1.1 types, aliases that multiply."""

    yaml_implicit_resolvers: dict = {}

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[int, int] = {}  # how many values every complete node stands for
        self._depth = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH or self._values > MAX_VALUES:
            what = f"more than {MAX_DEPTH} deep" if self._depth > MAX_DEPTH else f"over {MAX_VALUES:,} values"
            raise ConfigError(f"line {self.peek_event().start_mark.line + 1}: {what}; a recipe is not so large")
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise ConfigError("not valid YAML: an anchor contains itself")
        if node is not None and not alias:
            _check_tag(node, self._meant(node))
            self._sizes[id(node)] = self._size(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {key.start_mark.line + 1}: a key must be a name, not a list or mapping")
            if key.value in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {short(key.value)} is given twice; keep one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _meant(self, node: yaml.Node) -> str:
        """The type of a scalar if it had no explicit tag."""
        return self.resolve(yaml.ScalarNode, node.value, (True, False)) if isinstance(node, yaml.ScalarNode) else ""

    def _size(self, node: yaml.Node) -> int:
        """Count the values that a node stands for, and refuse more than a recipe has."""
        inner = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        inner = [one for pair in inner for one in pair] if isinstance(node, yaml.MappingNode) else inner
        size = 1 + sum(self._sizes[id(one)] for one in inner)
        if size > MAX_VALUES:
            raise ConfigError(f"line {node.start_mark.line + 1}: over {MAX_VALUES:,} values; a recipe is not so large")
        return size


def _check_tag(node: yaml.Node, meant: str) -> None:
    """Refuse an explicit tag that is of another kind than its value, or that a recipe has no use for."""
    prefix = "tag:yaml.org,2002:"
    tag = node.tag.removeprefix(prefix)
    if isinstance(node, yaml.ScalarNode):
        plain = node.tag == meant or tag == "str" or (tag == "float" and meant == f"{prefix}int")
        right = tag in _SCALARS and plain
    else:
        right = tag == ("map" if isinstance(node, yaml.MappingNode) else "seq")
    if not right:
        raise ConfigError(f"line {node.start_mark.line + 1}: not valid YAML here: the tag {short(tag)}; leave it out")


_COMMENT = re.compile(r"(^|\s)#")
_KEY = re.compile(rf"\w{{1,{MAX_SHOWN}}}(\.\w{{1,{MAX_SHOWN}}}){{0,{MAX_DEPTH - 1}}}", re.ASCII)


class _Dumper(yaml.SafeDumper):
    """Writes scalars so that _Loader reads them back as they are."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """In one line, whatever is in it."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """In base ten: PyYAML's own constructor would read 010 as octal."""
    text = loader.construct_scalar(node)
    if len(text) > MAX_DIGITS:
        raise ConfigError(f"line {node.start_mark.line + 1}: a whole number of {len(text)} digits; a recipe has none")
    return int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` overrides, each value read by the same YAML rules.

    Raises:
        ConfigError: the file cannot be read, or a key or value cannot be used; one line.
    """
    try:
        values = read_recipe(path)
        for override in overrides:
            apply_override(values, override)
        return build_recipe(values)
    except ConfigError as e:
        raise e if str(e).startswith(f"{path}: ") else ConfigError(f"{path}: {e}") from None


def read_recipe(path: str | Path) -> dict:
    """The plain values of a recipe file, not checked yet. Its paths that begin with ./ or ../ are absolute here.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = read_plain_file(path, MAX_RECIPE_BYTES).decode("utf-8")
    except OSError as e:
        raise ConfigError(
            f"{path}: cannot be read ({e.strerror}); give a recipe such as configs/quickstart.yaml; "
            "megaresnorm recipe quickstart > my.yaml writes one"
        ) from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not UTF-8 text (byte {e.start}); a recipe is a YAML file") from None
    try:
        values = read_yaml(text)
        if values is None:
            raise ConfigError("the file is empty; a recipe needs the sections model, data and train")
        if not isinstance(values, dict):
            raise ConfigError(
                f"got a {type(values).__name__} at the top level; wanted sections model, data, train, ..."
            )
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from None
    return beside(values, os.path.dirname(os.path.abspath(path)))


_PATHS = (("data", "path"), ("data", "tokenizer"), ("data", "blend", "path"), ("data", "valid"), ("train", "output"),
          ("train", "initial_weights"))  # fmt: skip


def beside(values: Any, folder: str, keys: tuple[str, ...] = ()) -> Any:
    """Plain values of a recipe in which paths that are relative to its folder are absolute."""
    if isinstance(values, dict):
        return {key: beside(value, folder, keys if keys in _PATHS else (*keys, key)) for key, value in values.items()}
    if isinstance(values, list):
        return [beside(value, folder, keys) for value in values]
    return (
        os.path.normpath(os.path.join(folder, values))
        if keys in _PATHS and isinstance(values, str) and is_beside(values)
        else values
    )


def read_yaml(text: str) -> Any:
    """One YAML document as plain values.

    >>> read_yaml("{lr: 3e-4, on: no, n: 010}")
    {'lr': 0.0003, 'on': 'no', 'n': 10}
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except yaml.MarkedYAMLError as e:
        where = f"line {e.problem_mark.line + 1}: " if e.problem_mark else ""
        raise ConfigError(f"{where}not valid YAML: {(e.problem or e.context or '')[:200]}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as e:
        raise ConfigError(f"not valid YAML: {first_line(e)}") from None


def apply_override(values: dict, override: str) -> None:
    """Set one dotted key, as in ``model.dim=128``, in place."""
    key, equals, text = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise ConfigError(f"override {short(override)} is not of the form section.key=value, as in model.dim=128")
    *sections, leaf = key.split(".")
    for i, section in enumerate(sections):
        inner = values.setdefault(section, {})
        if inner is None:
            inner = values[section] = {}
        if isinstance(inner, str) and sections[: i + 1] == ["recompute"]:  # short for its policy
            inner = values[section] = {"policy": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {short(override)}: {'.'.join(sections[: i + 1])} is a value, not a section")
        values = inner
    try:
        value = read_yaml(text)
    except ConfigError as e:
        raise ConfigError(f"override {short(override)}: {e}; put the value in quotes to mean a text") from None
    # A # after a blank begins a comment in a file. Whoever types it behind a = means it.
    means_it = isinstance(value, str | None) and _COMMENT.search(text) and text[:1] not in "'\""
    value = text if means_it else value
    if key == "recompute" and isinstance(value, str) and isinstance(values.get(key), dict):
        values[key]["policy"] = value  # for which it is short: the other keys stay
    else:
        values[leaf] = value


def build_recipe(values: dict) -> Recipe:
    """Validate plain values, those of older versions' recipes under their new names.

    Raises:
        ConfigError: something is wrong; the message is about the first such thing.
    """
    try:
        return Recipe.model_validate(under_new_names(values))
    except ValidationError as e:
        # An unknown key explains a missing one better than the other way round.
        errors = sorted(e.errors(), key=lambda error: error["type"] != "extra_forbidden")
        raise ConfigError(explain(errors[0])) from None


def dump_recipe(recipe: Recipe, *, full: bool = True) -> str:
    """The recipe as YAML that load_recipe reads back to an equal recipe.

    Args:
        full: with every setting, rather than those that differ from the defaults.
    """
    return dump_values(recipe.model_dump(exclude_none=True, exclude_defaults=not full))


def dump_values(values: dict) -> str:
    """Plain values of a recipe as YAML."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=10**6)


def differences(before: dict, now: dict, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Dotted key -> (old, new) of every value that differs between two recipes."""
    found: dict[str, tuple[str, str]] = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (json.dumps(old), json.dumps(new))
    return found
