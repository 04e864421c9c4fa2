"""The config.json of a downloaded model, in the form of the installed Transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.family import MEGATRON_NAME, OURS
from megaresnorm.convert.files import CONFIG, check_plain_files, read_json
from megaresnorm.errors import CheckpointError
from megaresnorm.reading import first_line
from megaresnorm.recipe.section import MAX_BLOCKS, MAX_SEQ_LEN, MAX_VOCAB, MAX_WIDTH

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
    "quantization_config": "quantized weights are not read",
    "transformers_weights": "weights of another name are not read; call them model.safetensors",
}


def normalized(source: Path) -> dict[str, Any]:
    """The config.json of a folder with every field of its class; that of our or Megatron-Core's weights as it is.

    Raises:
        CheckpointError: it cannot be read, or describes an architecture or weights that are not supported.
    """
    path, raw = source / CONFIG, _raw(source)
    kind = raw.get("model_type")
    for name, why in _OTHER_WEIGHTS.items():
        if raw.get(name) is not None:
            raise CheckpointError(f"{path}: {name}: {why}")
    if (source / "adapter_config.json").exists():
        raise CheckpointError(f"{source}: has an adapter, which is not read; merge it into the model first")
    _check_numbers(path, raw)
    if kind in (OURS, MEGATRON_NAME):
        return raw
    known = list(dict.fromkeys([family.name for family in FAMILIES] + [OURS, MEGATRON_NAME]))
    if kind not in known:
        raise CheckpointError(f"{path}: model_type={kind!r} is not one of {', '.join(known)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw)).to_dict()
    except Exception as e:  # noqa: BLE001 - any error that a class of theirs makes of bad values
        raise CheckpointError(f"{path}: not a configuration of {kind} ({first_line(e)})") from None


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
