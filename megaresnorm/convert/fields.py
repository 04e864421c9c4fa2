"""Fields of a config.json and the settings of a model that they stand for, each defined once for both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megaresnorm.errors import CheckpointError
from megaresnorm.recipe import ModelRecipe, RopeScaling

Config = Mapping[str, Any]
Settings = dict[str, Any]


class Field(Protocol):
    """Some keys of a config.json, and how they are written and read."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of config.json that it reads or writes."""
        ...

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """These keys with their values for a model."""
        ...

    def read(self, config: Config) -> Settings:
        """The settings that these keys stand for. Other errors, of missing values or odd types, ``describe`` reports.

        Raises:
            CheckpointError: a value has no counterpart in our model; the key is named.
        """
        ...


def refused(key: str, value: Any, why: str) -> CheckpointError:
    """The error for a key whose value has no counterpart in our model."""
    return CheckpointError(f"{key}={value!r} {why}")


@dataclass(frozen=True)
class Same:
    """One key that is one setting.

    Attributes:
        name: of the setting.
        fallback: the key whose value counts where this one is null.
    """

    key: str
    name: str
    fallback: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The key; the fallback is a field of its own."""
        return (self.key,)

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """The key with the setting, its default resolved."""
        return {self.key: setting(recipe, self.name)}

    def read(self, config: Config) -> Settings:
        """The setting, from the fallback where the key is null or missing."""
        value = config.get(self.key)
        return {self.name: config.get(self.fallback) if value is None and self.fallback else value}


@dataclass(frozen=True)
class Fixed:
    """A key of which our model has one value alone, and no setting.

    Attributes:
        others: values that mean the same.
    """

    key: str
    value: Any
    others: tuple[Any, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """The one key."""
        return (self.key,)

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """The key with its one value."""
        return {self.key: self.value}

    def read(self, config: Config) -> Settings:
        """No settings; a missing key has the one value."""
        found = config.get(self.key, self.value)
        if found != self.value and found not in self.others:
            raise refused(self.key, found, f"has no counterpart in our model; wanted {self.value!r}")
        return {}


@dataclass(frozen=True)
class Choice:
    """A key with a few values, each of which stands for some settings."""

    key: str
    values: tuple[tuple[Any, Settings], ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The one key."""
        return (self.key,)

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """The first value whose settings are the model's, or the first of all where none is."""
        fitting = (v for v, settings in self.values if all(setting(recipe, k) == s for k, s in settings.items()))
        return {self.key: next(fitting, self.values[0][0])}

    def read(self, config: Config) -> Settings:
        """The settings of the value, which must have the same type as in the table."""
        found = config.get(self.key)
        for value, settings in self.values:
            if found == value and type(found) is type(value):
                return dict(settings)
        allowed = ", ".join(dict.fromkeys(repr(value) for value, _ in self.values))
        raise refused(self.key, found, f"has no counterpart in our model; wanted one of {allowed}")


@dataclass(frozen=True)
class Always:
    """Settings that a family has without saying so."""

    settings: Settings
    keys: tuple[str, ...] = ()

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """No keys."""
        return {}

    def read(self, config: Config) -> Settings:
        """The settings, whatever the config."""
        return dict(self.settings)


@dataclass(frozen=True)
class By:
    """Keys that are computed from settings, and settings from keys."""

    keys: tuple[str, ...]
    write: Callable[[ModelRecipe], dict[str, Any]]
    read: Callable[[Config], Settings]


@dataclass(frozen=True)
class Rope:
    """rope_parameters of Transformers 5.

    Attributes:
        partial: whether the class has partial_rotary_factor.
        by_layer_type: whether there is one set for each kind of attention; those in use must be equal.
    """

    partial: bool = False
    by_layer_type: bool = False
    keys: tuple[str, ...] = field(default=("rope_parameters",), init=False)

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """rope_parameters; with ``by_layer_type`` the same set for both kinds of attention."""
        found: dict[str, Any] = {"rope_theta": recipe.rope_theta, "rope_type": "default"}
        if self.partial:
            found["partial_rotary_factor"] = recipe.rope_fraction
        scaling = recipe.rope_scaling
        if scaling is not None:
            found |= {"rope_type": scaling.kind}
            found |= {theirs: getattr(scaling, ours) for theirs, ours in _SCALING[scaling.kind].items()}
            found = {key: value for key, value in found.items() if value is not None}
        if self.by_layer_type:
            return {"rope_parameters": {"full_attention": found, "sliding_attention": found}}
        return {"rope_parameters": found}

    def read(self, config: Config) -> Settings:
        """Settings of rotary positions; any key that has no counterpart in them is refused, unless it is neutral."""
        given = config.get("rope_parameters")
        if self.by_layer_type and isinstance(given, Mapping) and "full_attention" in given:
            used = [given.get(kind) for kind in dict.fromkeys(config.get("layer_types") or ("full_attention",))]
            if any(one != used[0] for one in used):
                raise refused(
                    "rope_parameters", dict(given), "differ between layers, which our model has no setting for"
                )
            given = used[0]
        if not isinstance(given, Mapping) or not isinstance(given.get("rope_theta"), int | float):
            raise refused("rope_parameters", given, "has no rope_theta")
        kind = given.get("rope_type", "default")
        known = {
            "rope_theta",
            "rope_type",
            "type",
            *_SCALING.get(kind, {}),
            *(["partial_rotary_factor"] if self.partial else []),
        }
        if kind not in ("default", *_SCALING):
            raise refused("rope_parameters.rope_type", kind, f"is not supported; wanted default, {', '.join(_SCALING)}")
        for key, value in given.items():
            if key not in known and value is not None and (key, value) not in _NEUTRAL:
                raise refused(f"rope_parameters.{key}", value, f"has no counterpart in our model's {kind} positions")
        settings: Settings = {"positions": "rope", "rope_theta": float(given["rope_theta"])}
        if self.partial:
            settings["rope_fraction"] = float(given.get("partial_rotary_factor", 1.0))
        if kind != "default":
            values = {ours: given[theirs] for theirs, ours in _SCALING[kind].items() if given.get(theirs) is not None}
            floats = {ours: float(v) if ours in _FLOATS else v for ours, v in values.items()}
            settings["rope_scaling"] = {"kind": kind} | floats
        return settings


_FLOATS = {"factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"}
_NEUTRAL = [("partial_rotary_factor", 1.0)]
# rope_type -> their keys -> fields of our RopeScaling
_SCALING: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_seq_len",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}


assert all(set(names.values()) <= set(RopeScaling.model_fields) for names in _SCALING.values())


@dataclass(frozen=True)
class Window:
    """Sliding windows, which our model does not have; it computes the same where no sequence is longer than the window.

    Attributes:
        layers: whether layer_types says which layers have a window; if False, all have where sliding_window is set.
        unless: a key that switches all windows off where it is false; empty for none.
    """

    layers: bool = True
    unless: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """sliding_window, and the keys that decide where it applies."""
        return ("sliding_window", *(["layer_types"] if self.layers else []), *([self.unless] if self.unless else []))

    def write(self, recipe: ModelRecipe) -> dict[str, Any]:
        """Keys that switch all windows off."""
        found: dict[str, Any] = {} if self.layers and not self.unless else {"sliding_window": None}
        if self.layers:
            found["layer_types"] = ["full_attention"] * recipe.num_blocks
        return found | ({self.unless: False} if self.unless else {})

    def read(self, config: Config) -> Settings:
        """No settings; a window that is shorter than the longest sequence is refused."""
        kinds = set(config.get("layer_types") or ()) if self.layers else {"sliding_attention"}
        for kind in sorted(kinds - {"full_attention", "sliding_attention"}):
            raise refused("layer_types", kind, "is no attention that our model has")
        window = config.get("sliding_window")
        if "sliding_attention" in kinds and window is not None and window < config["max_position_embeddings"]:
            longest = config["max_position_embeddings"]
            raise refused(
                "sliding_window",
                window,
                f"is shorter than max_position_embeddings={longest}, and our model has no windows; "
                f"with --seq-len {window} the two are the same",
            )
        return {}


# Settings whose default depends on others, and the properties that resolve it.
_RESOLVED = {"num_kv_heads": "kv_heads", "head_dim": "head_width", "ffn_dim": "ffn_width", "attention_bias": "biases"}


def setting(recipe: ModelRecipe, name: str) -> Any:
    """A setting of the model, its default resolved."""
    return getattr(recipe, _RESOLVED.get(name, name))
