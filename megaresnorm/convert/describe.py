"""The model that a config.json describes, as a recipe of ours and the match by which its tensors are read."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.families.megatron import MEGATRON
from megaresnorm.convert.family import OURS, Family
from megaresnorm.convert.files import CONFIG
from megaresnorm.convert.match import Match, match_family, mismatches
from megaresnorm.convert.remote import recipe_in, remote_family
from megaresnorm.convert.signature import different
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.recipe import ModelRecipe

# Fields of a config.json that the logits of a model do not depend on: how it was made, trained and is to be sampled.
_NAMES = """
_name_or_path architectures auto_map dtype torch_dtype transformers_version model_type id2label label2id problem_type
bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id decoder_start_token_id
initializer_range init_std use_cache return_dict output_attentions output_hidden_states output_router_logits
attention_dropout attn_pdrop embd_pdrop resid_pdrop dropout hidden_dropout hidden_dropout_prob activation_dropout
attention_probs_dropout_prob embedding_dropout residual_dropout classifier_dropout layerdrop is_encoder_decoder
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
pretraining_tp chunk_size_feed_forward task_specific_params n_ctx prefix tokenizer_class torchscript pruned_heads
use_bfloat16 tf_legacy_loss finetuning_task cache_implementation gradient_checkpointing _attn_implementation
attn_implementation attn_implementation_autoset _attn_implementation_autoset max_window_layers _sliding_window_pattern
sliding_window_pattern router_aux_loss_coef router_jitter_noise block_size linear_attn_alpha_factor
linear_attn_beta_factor do_sample temperature top_k top_p typical_p max_length min_length num_beams num_beam_groups
num_return_sequences repetition_penalty length_penalty diversity_penalty no_repeat_ngram_size early_stopping
encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens return_dict_in_generate output_scores
"""
IGNORED = frozenset(_NAMES.split())


def described(source: Path, config: dict[str, Any], seq_len: int | None) -> tuple[Match, ModelRecipe, tuple[str, ...]]:
    """The model of a config.json.

    A config.json that we have written brings the recipe that it was made from, which counts while the other fields
    still say the same.

    Args:
        config: as ``normalized`` returns it.
        seq_len: longest sequence, where it is to be shorter than the model's.

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
        unknown = sorted(config.keys() - family.keys - IGNORED - {OURS})
        if unknown:
            raise CheckpointError(
                f"{unknown[0]}={repr(config[unknown[0]])[:60]} is not a field that is known of {family.name}"
            )
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
        return Match(family, read), read, ()
    before = _as_exported(family, given)
    if before is None or different(_read_back(before), read):
        told = "config.json was changed after the export: its fields count, the recipe in it does not"
        return Match(family, read), read, (told,)
    return before, given, before.notes


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
