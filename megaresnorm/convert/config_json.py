"""The config.json of a downloaded model, in the form of today's Transformers."""

from pathlib import Path
from typing import Any

from megaresnorm.convert.families import FAMILIES
from megaresnorm.convert.files import CONFIG, read_json
from megaresnorm.convert.native import MEGATRON_NAME, OURS
from megaresnorm.errors import CheckpointError

MAX_LAYERS = 10_000  # of which names and settings are listed before a tensor is looked at
_OTHER_WEIGHTS = {
    "quantization_config": "quantized weights are not read",
    "transformers_weights": "weights of another name are not read; call them model.safetensors",
}


def normalized(source: Path) -> dict[str, Any]:
    """The config.json with every field of its class, in the form of today's Transformers. Raises: CheckpointError."""
    path, raw = source / CONFIG, _raw(source)
    kind = raw.get("model_type")
    for name, why in _OTHER_WEIGHTS.items():
        if raw.get(name) is not None:
            raise CheckpointError(f"{path}: {name}: {why}")
    if (source / "adapter_config.json").exists():
        raise CheckpointError(f"{source}: has an adapter, which is not read; merge it into the model first")
    _check_depth(path, raw)
    if kind in (OURS, MEGATRON_NAME):
        return raw
    known = list(dict.fromkeys([family.name for family in FAMILIES] + [OURS, MEGATRON_NAME]))
    if kind not in known:
        raise CheckpointError(f"{path}: model_type={kind!r} is not one of {', '.join(known)}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[kind].from_dict(dict(raw)).to_dict()
    except Exception as e:  # noqa: BLE001 - whatever a class of theirs makes of bad values
        raise CheckpointError(f"{path}: not a configuration of {kind} ({' '.join(str(e).split())[:200]})") from None


def is_megatron(source: Path) -> bool:
    """Whether a folder holds weights of Megatron-Core. Raises: CheckpointError."""
    return _raw(source).get("model_type") == MEGATRON_NAME


def _raw(source: Path) -> dict[str, Any]:
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: not a folder; download the model first (hf download NAME --local-dir {source})"
        )
    return read_json(source / CONFIG)


def _check_depth(path: Path, raw: dict[str, Any]) -> None:
    """Raises: CheckpointError."""
    ours = raw.get(OURS)
    model = ours.get("model") if isinstance(ours, dict) else None
    settings = {**raw, **(model if isinstance(model, dict) else {})}
    for name in ("num_hidden_layers", "n_layer", "num_layers", "num_blocks"):
        if isinstance(settings.get(name), int) and settings[name] > MAX_LAYERS:
            raise CheckpointError(f"{path}: {name}={settings[name]} is above {MAX_LAYERS}, the most that are read")
