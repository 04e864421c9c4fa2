"""The model that a config.json describes, as a recipe of ours and the match by which its tensors are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaresnorm.convert.config_json import IGNORED, is_mark
from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.families.megatron import MEGATRON
from megaresnorm.convert.family import MEGATRON_NAME, OURS, Family
from megaresnorm.convert.files import CONFIG
from megaresnorm.convert.match import Match, match_family, mismatches
from megaresnorm.convert.remote import recipe_in, remote_family
from megaresnorm.convert.signature import different
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.recipe import ModelRecipe


def described(
    source: Path,
    config: dict[str, Any],
    seq_len: int | None,
    *,
    verified: bool = True,
    ignore_fields: Sequence[str] = (),
) -> tuple[Match, ModelRecipe, tuple[str, ...]]:
    """The model of a config.json.

    A config.json that we have written brings the recipe that it was made from, which counts while the other fields
    still say the same.

    Args:
        config: as ``normalized`` returns it.
        seq_len: longest sequence, where it is to be shorter than the model's.
        verified: whether logits will be compared, which shows whether an unknown field matters.
        ignore_fields: unknown fields that are not to matter.

    Returns:
        The architecture as a match, our recipe of the model, and notes for the user.

    Raises:
        CheckpointError: a field has no counterpart in our model, or is missing; it is named.
        ConfigError: the model cannot have this ``seq_len``.
    """
    path = source / CONFIG
    try:
        family = _family_of(config)
    except (CheckpointError, ConfigError) as e:
        raise CheckpointError(f"{path}: {e}") from None
    given = recipe_in(config)
    if seq_len is not None:
        config, given = _shortened(family, config, given, seq_len)
    try:
        left = _unknown_fields(family, config, verified, ignore_fields)
        read = ModelRecipe.model_validate(family.settings(config))
        if read.vocab_size is None:
            raise CheckpointError("vocab_size is missing")
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path}: {where or 'the model'}: {first['msg'].removeprefix('Value error, ')}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: a field is missing or has an odd value ({type(e).__name__}: {e})") from None
    if given is None:
        return Match(family, read), read, left
    before = _as_exported(family, given)
    if before is None or different(_read_back(before), read):
        told = "config.json was changed after the export: its fields count, the recipe in it does not"
        return Match(family, read), read, (told, *left)
    return before, given, (*before.notes, *left)


def _unknown_fields(family: Family, config: dict[str, Any], verified: bool, ignored: Sequence[str]) -> tuple[str, ...]:
    """A note on the fields that are known neither of the family nor of all models.

    Raises:
        CheckpointError: one may say something of the model: what it has is not empty, and no mark of another tool; or
            it is empty or a mark, but no logits are compared.
        ConfigError: ``ignored`` has a field that is known.
    """
    unknown = sorted(config.keys() - family.keys - IGNORED - {OURS})
    wrong = [name for name in ignored if name not in unknown]
    if wrong:
        why = "which is known" if wrong[0] in family.keys | IGNORED else "which is not there"
        raise ConfigError(f"--ignore-fields {wrong[0][:60]}: a field of config.json {why}; leave it out")
    for name in unknown:
        harmless = not config[name] or is_mark(name)  # null, false, 0, and what is empty
        if name in ignored or (harmless and verified):
            continue
        how = f"--ignore-fields {name[:60]} passes it over"
        compared = harmless and family.name != MEGATRON_NAME  # whose logits are never compared
        how = f"compare the logits (without --verify off), or {how}" if compared else f"if it does not matter, {how}"
        value = repr(config[name])[:60]
        raise CheckpointError(f"{name[:60]}={value} is not a field that is known of {family.name}; {how}")
    return (f"fields of config.json that nobody knows were passed over: {', '.join(unknown)}",) if unknown else ()


def _family_of(config: dict[str, Any]) -> Family:
    """The family of a config.json's model_type; where several have that name, the one whose first field fits."""
    named = [one for one in (*FAMILIES, remote_family(), *MEGATRON.values()) if one.name == config["model_type"]]
    errors = []
    for family in named:
        try:
            family.fields[0].read(config)
        except CheckpointError as e:
            errors.append(str(e))
        else:
            return family
    if len(named) == 1:  # its other fields are then looked at, too
        return named[0]
    raise CheckpointError("; or ".join(errors))


def _shortened(
    family: Family, config: dict[str, Any], given: ModelRecipe | None, seq_len: int
) -> tuple[dict[str, Any], ModelRecipe | None]:
    """The config.json, and the recipe in it, of the same model for shorter sequences.

    Raises:
        ConfigError: it would be another model.
    """
    length = config.get("max_position_embeddings")
    learned = "rope_parameters" not in family.keys and config.get("positions") != "rope"
    if learned or not isinstance(length, int):
        raise ConfigError(
            f"--seq-len {seq_len}: {family.name} has learned positions, whose number cannot be changed; leave it out"
        )
    if seq_len > length:
        raise ConfigError(f"--seq-len {seq_len} is above max_position_embeddings={length}; give at most that")
    config = config | {"max_position_embeddings": seq_len}
    if given is not None:
        given = given.model_copy(update={"seq_len": seq_len})
        config[OURS] = config[OURS] | {"model": given.model_dump(exclude_none=True)}
    return config, given


def _as_exported(family: Family, given: ModelRecipe) -> Match | None:
    """The match by which a model was exported to this family; None if it cannot have been."""
    try:
        if not mismatches(family, given):
            return Match(family, given)
        before = match_family(given, family.name)
    except ConfigError:
        return None
    return before if before.family is family else None


def _read_back(before: Match) -> ModelRecipe:
    """The model that the config.json of an exported match describes."""
    if before.family is remote_family():
        return before.recipe
    return ModelRecipe.model_validate(before.family.settings(before.family.config(before.recipe)))
