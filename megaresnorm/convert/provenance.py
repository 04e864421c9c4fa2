"""What a converted model said of itself, kept beside its weights so that an export of what was trained from it says so.

It lies as source.json in the checkpoint that from-hf writes and in those of every run that starts from its weights.
"""

import hashlib
import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from megaresnorm.convert.files import Weights, read_json
from megaresnorm.data.hub import read_card
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import TOKENIZER_CONFIG
from megaresnorm.errors import CheckpointError
from megaresnorm.reading import read_plain_file

CHAT_TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 19
# Fields of tokenizer_config.json that are taken over. Others name classes or code, or are in tokenizer.json already.
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
_KEPT = (*_TOKENS, "additional_special_tokens", "model_max_length", "padding_side", "chat_template")
_CARD = ("license", "license_name", "license_link", "language", "base_model")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Provenance(BaseModel):
    """What a model of Transformers said of itself.

    Attributes:
        name: on the hub; None where its files do not say.
        dtype: of most of its weights, as torch names it.
        card: fields of its README.md.
        ids: its begin, end and padding tokens according to config.json and generation_config.json.
        tokenizer_sha256: of the file of its tokenizer; empty without one. What follows is of this tokenizer alone.
        tokenizer_config: fields of tokenizer_config.json.
        chat_template: content of chat_template.jinja.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    name: str | None = None
    dtype: Dtype = "float32"
    card: dict[str, str | list[str]] = {}
    ids: dict[str, int | list[int] | None] = {}
    tokenizer_sha256: str = ""
    tokenizer_config: dict[str, Any] = {}
    chat_template: str | None = None

    def belongs_to(self, tokenizer: Tokenizer | None) -> bool:
        """Whether a tokenizer is that of the model."""
        return tokenizer is not None and hashlib.sha256(tokenizer.model).hexdigest() == self.tokenizer_sha256

    @property
    def base_model(self) -> str | list[str] | None:
        """What a card names as the model that this one was trained from: itself, or else what its own card names."""
        return self.name or self.card.get("base_model")


def provenance_of(source: Path, config: dict[str, Any], weights: Weights, tokenizer: Tokenizer | None) -> Provenance:
    """What the folder of a model of Transformers says.

    Args:
        config: its config.json.
        tokenizer: that of the folder; None where it is left out.

    Raises:
        CheckpointError, DataError: a file cannot be read; one line.
    """
    sizes: Counter[str] = Counter()
    for _, shape, dtype in weights.tensors.values():
        sizes[str(dtype).removeprefix("torch.")] += prod(shape)
    given, generation = _json(source / TOKENIZER_CONFIG), _json(source / "generation_config.json")
    kept = {key: _token(given[key]) if key in _TOKENS else given[key] for key in _KEPT if given.get(key) is not None}
    ids = {key: generation.get(key, config.get(key)) for key in _IDS}
    card = {k: v for k, v in read_card(source).items() if k in _CARD and _is_text(v)}
    template = source / CHAT_TEMPLATE
    try:
        text = read_plain_file(template, MAX_TEMPLATE_BYTES).decode("utf-8") if template.exists() else None
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f"{template}: cannot be read ({getattr(e, 'strerror', 'not UTF-8')})") from None
    if len(json.dumps(kept)) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{source / TOKENIZER_CONFIG}: over {MAX_TEMPLATE_BYTES:,} bytes of tokens and templates")
    return Provenance(
        name=_hub_name(source, config),
        dtype=cast(Dtype, sizes.most_common(1)[0][0]),
        card=card,
        ids={key: value for key, value in ids.items() if _is_id(value)},
        tokenizer_sha256="" if tokenizer is None else hashlib.sha256(tokenizer.model).hexdigest(),
        tokenizer_config=kept,
        chat_template=text,
    )


def read_provenance(content: bytes | None, where: Path) -> Provenance | None:
    """Read a source.json; None where there is none.

    Raises:
        CheckpointError: it is not one.
    """
    if content is None:
        return None
    try:
        return Provenance.model_validate_json(content)
    except ValidationError as e:
        first = e.errors()[0]
        raise CheckpointError(
            f"{where}: its source.json is not readable ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_id(value: Any) -> bool:
    """Whether a field of a config.json is a token, or several."""
    return type(value) is int or (isinstance(value, list) and value != [] and all(type(one) is int for one in value))


def _hub_name(source: Path, config: dict[str, Any]) -> str | None:
    """The name of a model on the hub: by its folder in the cache, or by what its config.json says."""
    for part in source.resolve().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None
