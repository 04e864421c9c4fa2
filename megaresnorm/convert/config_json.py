"""The config.json of a downloaded model, in the form of today's Transformers."""

from pathlib import Path
from typing import Any

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.files import CONFIG, read_json
from megaresnorm.convert.native import MEGATRON_NAME, OURS
from megaresnorm.errors import CheckpointError


def normalized(source: Path) -> dict[str, Any]:
    """The config.json with every field of its class, in the form of today's Transformers. Raises: CheckpointError."""
    path = source / CONFIG
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: not a folder; download the model first (hf download NAME --local-dir {source})"
        )
    raw = read_json(path)
    kind = raw.get("model_type")
    if kind in (OURS, MEGATRON_NAME):
        return raw
    known = list(dict.fromkeys([family.name for family in FAMILIES] + [OURS, MEGATRON_NAME]))
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config: quantized weights are not read")
    if kind not in known:
        raise CheckpointError(f"{path}: model_type={kind!r} is not one of {', '.join(known)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw)).to_dict()
    except Exception as e:  # noqa: BLE001 - whatever a class of theirs makes of bad values
        raise CheckpointError(f"{path}: not a configuration of {kind} ({' '.join(str(e).split())[:200]})") from None
