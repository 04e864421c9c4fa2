"""What a family of models is: the fields of its config.json and the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megaresnorm.convert.fields import Config, Field, Settings
from megaresnorm.convert.rows import Rows, every
from megaresnorm.recipe import ModelRecipe


class Of(NamedTuple):
    """Which rows of which of our modules a module of theirs has. {} in a name is the block; of ``a|b`` the one that there is."""

    name: str
    rows: Rows = every
    transposed: bool = False


class Constant(NamedTuple):
    """A tensor of theirs that ours has no place for, of zeros. must_be_zero: whether it is read only where it is; else it has
    no effect whatever it holds.   untied: only where the output matrix is not the embedding.
    """

    shape: tuple[str, ...]  # settings
    must_be_zero: bool = False
    untied: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """name: model_type of config.json.   modules: theirs -> ours; {next} is the number of the block after.   renamed: names that
    follow the modules' pattern, and what they are called instead.   prefix: may be missing in files.   divided_dim: the class
    refuses heads whose number does not divide the width, even where head_dim says how wide they are.   padded: files may have
    more rows for the vocabulary than it has tokens.   unread: keys that published files have and the class does not look at.

    Of several families of one name the first field says which a config.json is of.
    """

    name: str
    architecture: str
    fields: tuple[Field, ...]
    modules: Mapping[str, Of]
    renamed: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    prefix: str = "model."
    divided_dim: bool = False
    padded: bool = False
    unread: tuple[str, ...] = ()

    def config(self, recipe: ModelRecipe) -> dict[str, Any]:
        """What config.json says of the model."""
        values: dict[str, Any] = {}
        for one in self.fields:
            values |= one.write(recipe)
        return values

    def settings(self, config: Config) -> Settings:
        """The settings of the model that a config.json describes. Raises: CheckpointError naming a key that has no counterpart."""
        found: Settings = {}
        for one in self.fields:
            found |= one.read(config)
        return found

    @property
    def keys(self) -> set[str]:
        """Those of a config.json that it understands."""
        return {key for one in self.fields for key in one.keys} | set(self.unread)
