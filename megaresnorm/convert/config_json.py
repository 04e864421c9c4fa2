"""The config.json of a downloaded model, in the form of the installed Transformers."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.family import MEGATRON_NAME, OURS
from megaresnorm.convert.files import CONFIG, check_plain_files, read_json
from megaresnorm.errors import CheckpointError
from megaresnorm.limits import MAX_BLOCKS, MAX_SEQ_LEN, MAX_VOCAB, MAX_WIDTH

MAX_CONFIG_VALUES = 100_000  # Transformers makes tables of them while it reads them
# Limits of the numbers that classes of Transformers make a list, a table or a tensor of before a weight is looked at.
_LARGEST = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_blocks", "max_window_layers"), MAX_BLOCKS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "intermediate_size", "ffn_hidden_size", "n_inner", "head_dim"), MAX_WIDTH
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "n_head", "word_embed_proj_dim", "ffn_dim"), MAX_WIDTH
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "block_size"), MAX_SEQ_LEN),
    "vocab_size": MAX_VOCAB,
    "num_labels": 100_000,
}
MAX_NUMBER = 1 << 53  # limit of all other fields
_OTHER_WEIGHTS = {
    "quantization": "quantized weights are not read",
    "quantization_config": "quantized weights are not read",
    "transformers_weights": "weights of another name are not read; call them model.safetensors",
}


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
output_past keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan model_max_length tokenizer_name
bos_token eos_token pad_token unk_token sep_token cls_token mask_token
encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id remove_invalid_values
exponential_decay_length_penalty suppress_tokens begin_suppress_tokens return_dict_in_generate output_scores
"""
IGNORED = frozenset(_NAMES.split())
# Marks that other tools leave in a config.json, of which none says anything of the model.
_TOOLS = "transformers|tokenizers|torch|peft|trl|unsloth|axolotl|mergekit|datasets|diffusers|llama_?factory|mlx|gguf"
_MARKS = re.compile(
    rf"_?({_TOOLS})([._-].*)?|_(name_or_path|commit_hash|num_labels|auto_class|flash_attn\w*|quantization\w*)"
    r"|_\w+_version|version|revision|commit(_hash)?|model_(name|creator|author|card|version)"
    r"|(creator|author|date|url|license|language|trained_by|finetuned_from)"
)


def is_mark(name: str) -> bool:
    """Whether a field of a config.json is a mark that another tool has left.

    >>> is_mark("unsloth_version"), is_mark("_commit_hash"), is_mark("num_experts")
    (True, True, False)
    """
    return _MARKS.fullmatch(name) is not None


def normalized(source: Path) -> dict[str, Any]:
    """The config.json of a folder with every field of its class; that of our or Megatron-Core's weights as it is.

    Raises:
        CheckpointError: it cannot be read, or describes an architecture or weights that are not supported.
    """
    path, raw = source / CONFIG, _raw(source)
    kind = raw.get("model_type")
    for name, why in _OTHER_WEIGHTS.items():
        if raw.get(name):
            raise CheckpointError(f"{path}: {name}: {why}")
    if (source / "adapter_config.json").exists():
        raise CheckpointError(f"{source}: has an adapter, which is not read; merge it into the model first")
    _check_numbers(path, raw)
    if kind in (OURS, MEGATRON_NAME):
        return raw
    known = list(dict.fromkeys([family.name for family in FAMILIES] + [OURS, MEGATRON_NAME]))
    if kind not in known:
        raise CheckpointError(f"{path}: model_type={kind!r} is not one of {', '.join(known)}")
    return their_config(source).to_dict()


def their_config(source: Path) -> Any:
    """The configuration object of Transformers of a folder of one of its architectures.

    A null in a field that cannot be null is what older versions of Transformers made of it: false where the field is a
    switch, and the default where logits do not depend on the field.

    Raises:
        CheckpointError: its class does not take the fields.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # Which implementation a class takes is ours to say: a name there may even stand for code to fetch.
    raw = {name: value for name, value in _raw(source).items() if "_implementation" not in name}
    try:
        made = CONFIG_MAPPING[raw["model_type"]]
        try:
            return made.from_dict(dict(raw))
        except Exception:  # noqa: BLE001 - as below
            return made.from_dict(_without_nulls(raw, made().to_dict()))
    except Exception as e:  # noqa: BLE001 - any error that a class of theirs makes of bad values
        raise CheckpointError(
            f"{source / CONFIG}: not a configuration of {raw['model_type']} ({' '.join(str(e).split())[:200]})"
        ) from None


def _without_nulls(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Fields in which a null that is not the default is what it stood for; those that logits depend on stay null."""
    nulls = [name for name, value in raw.items() if value is None and defaults.get(name) is not None]
    switches = {name: False for name in nulls if isinstance(defaults[name], bool)}
    return {k: v for k, v in (raw | switches).items() if k in switches or k not in nulls or k not in IGNORED}


def is_megatron(source: Path) -> bool:
    """Whether a folder holds weights of Megatron-Core.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    return _raw(source).get("model_type") == MEGATRON_NAME


def _raw(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: not a folder; download the model first (hf download NAME --local-dir {source})"
        )
    check_plain_files(source)
    return read_json(source / CONFIG, MAX_CONFIG_VALUES)


def _check_numbers(path: Path, fields: Mapping[str, Any]) -> None:
    """Check all numbers of a config.json, nested ones included.

    Raises:
        CheckpointError: one is larger than any model's.
    """
    waiting: list[tuple[str, Any]] = list(fields.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, one) for one in value)
        elif isinstance(value, int) and abs(value) > (most := _LARGEST.get(name, MAX_NUMBER)):
            shown = value if abs(value) < 1 << 64 else f"{'-' if value < 0 else ''}10^{len(str(abs(value))) - 1}"
            raise CheckpointError(f"{path}: {name}={shown} is above {most}, the most that are read")
