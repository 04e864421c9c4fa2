"""What a converted model said of itself, kept beside its weights so that an export of what was trained from it says so.

It lies as source.json in the checkpoint that from-hf writes and in those of every run that starts from its weights.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from megaresnorm.convert.files import Weights, read_json
from megaresnorm.data.hub import read_card
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import TOKENIZER_CONFIG
from megaresnorm.errors import CheckpointError, DataError
from megaresnorm.limits import MAX_VOCAB
from megaresnorm.reading import read_plain_file

T = TypeVar("T")
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
MAX_TEMPLATE_BYTES, MOST_TEMPLATES = 1 << 19, 16
# Fields of tokenizer_config.json that are taken over. Others name classes or code, or are in tokenizer.json already.
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token",
           "additional_special_tokens", "extra_special_tokens")  # fmt: skip
_KEPT = (*_TOKENS, "model_max_length", "padding_side", "chat_template")
_CARD = ("license", "license_name", "license_link", "language", "base_model")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
Dtype = Literal["float64", "float32", "bfloat16", "float16"]
Ids = dict[str, int | list[int] | None]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Provenance(BaseModel):
    """What a model of Transformers said of itself.

    Attributes:
        name: on the hub; None where its files do not say.
        dtype: of most of its weights, as torch names it.
        uniform: whether it is the type of all of them.
        card: fields of its README.md.
        ids, generation_ids: its begin, end and padding tokens according to config.json, and to generation_config.json.
        tokenizer_sha256: of the file of its tokenizer; empty without one. What follows is of this tokenizer alone.
        tokenizer_config: fields of tokenizer_config.json.
        chat_templates: content of chat_template.jinja and of the other templates, by their paths in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    name: str | None = None
    dtype: Dtype = "float32"
    uniform: bool = True
    card: dict[str, str | list[str]] = {}
    ids: Ids = {}
    generation_ids: Ids = {}
    tokenizer_sha256: str = ""
    tokenizer_config: dict[str, Any] = {}
    chat_templates: dict[str, str] = {}

    def belongs_to(self, tokenizer: Tokenizer | None) -> bool:
        """Whether a tokenizer is that of the model."""
        return tokenizer is not None and hashlib.sha256(tokenizer.model).hexdigest() == self.tokenizer_sha256

    @property
    def base_models(self) -> list[str]:
        """What a card names as the models that this one was trained from: itself, or else those that its card names."""
        given = self.card.get("base_model") or []
        names = [self.name] if self.name is not None else [given] if isinstance(given, str) else given
        return [name for name in names if _HUB_NAME.fullmatch(name)]


def provenance_of(
    source: Path, config: dict[str, Any], weights: Weights, tokenizer: Tokenizer | None
) -> tuple[Provenance, tuple[str, ...]]:
    """What the folder of a model of Transformers says, and a note on each file of it that cannot be read.

    Args:
        config: its config.json.
        tokenizer: that of the folder; None where it is left out.
    """
    notes: list[str] = []

    def readable(read: Callable[[], T], empty: T) -> T:
        try:
            return read()
        except (CheckpointError, DataError) as e:
            notes.append(f"left out what cannot be read: {e}")
            return empty

    sizes: Counter[str] = Counter()
    for _, shape, dtype in weights.tensors.values():
        sizes[str(dtype).removeprefix("torch.")] += prod(shape)
    nothing: dict[str, Any] = {}
    kept, templates = nothing, dict[str, str]()
    if tokenizer is not None:
        kept = readable(lambda: _tokenizer_config(source / TOKENIZER_CONFIG), nothing)
        templates = readable(lambda: _chat_templates(source), templates)
    generation = readable(lambda: _json(source / "generation_config.json"), nothing)
    card = readable(lambda: read_card(source), nothing)
    return Provenance(
        name=_hub_name(source, config),
        dtype=cast(Dtype, sizes.most_common(1)[0][0]),
        uniform=len(sizes) == 1,
        card={key: value for key, value in _texts(card).items() if key in _CARD and _is_text(value)},
        ids=_ids(config, config.get("vocab_size")),
        generation_ids=_ids(generation, config.get("vocab_size")),
        tokenizer_sha256="" if tokenizer is None else hashlib.sha256(tokenizer.model).hexdigest(),
        tokenizer_config=kept,
        chat_templates=templates,
    ), tuple(notes)


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


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """Its fields that are taken over; tokens by their text alone."""
    given = _json(path)
    kept = {key: _token(given[key]) if key in _TOKENS else given[key] for key in _KEPT if key in given}
    kept = {key: value for key, value in kept.items() if key not in _TOKENS or value is None or _is_text(value)}
    if len(json.dumps(kept)) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{path}: over {MAX_TEMPLATE_BYTES:,} bytes of tokens and templates")
    return kept


def _chat_templates(folder: Path) -> dict[str, str]:
    names = [f"{MORE_TEMPLATES}/{path.name}" for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]
    found = {}
    for name in [CHAT_TEMPLATE, *names[:MOST_TEMPLATES]]:
        try:
            if (folder / name).exists():
                found[name] = read_plain_file(folder / name, MAX_TEMPLATE_BYTES).decode("utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise CheckpointError(f"{folder / name}: cannot be read ({getattr(e, 'strerror', 'not UTF-8')})") from None
    return found


def template_path(name: str) -> bool:
    """Whether a path is one at which an export may have a chat template."""
    return re.fullmatch(rf"{re.escape(CHAT_TEMPLATE)}|{MORE_TEMPLATES}/[\w-]+\.jinja", name) is not None


def _token(value: Any) -> Any:
    if isinstance(value, list):
        return [_token(one) for one in value]
    return value.get("content") if isinstance(value, dict) else value


def _texts(card: dict[str, Any]) -> dict[str, Any]:
    """A card in which the language Norwegian is not the answer no."""
    words = {key: [value] if value is False else value for key, value in card.items()}
    lists = {key: ["no" if one is False else one for one in value] for key, value in words.items()
             if isinstance(value, list)}  # fmt: skip
    return words | lists


def _ids(config: dict[str, Any], vocab_size: Any) -> Ids:
    """Its begin, end and padding tokens, of those that it names; None where it says that there is none."""
    most = vocab_size if isinstance(vocab_size, int) else MAX_VOCAB
    found = {key: config[key] for key in _IDS if key in config}
    return {key: value for key, value in found.items() if value is None or _is_id(value, most)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _is_id(value: Any, vocab_size: int) -> bool:
    """Whether a field of a config.json is a token, or several."""
    several = value if isinstance(value, list) else [value]
    return bool(several) and all(type(one) is int and 0 <= one < vocab_size for one in several)


def _hub_name(source: Path, config: dict[str, Any]) -> str | None:
    """The name of a model on the hub: by its folder in the cache, or by what its config.json says."""
    for part in source.resolve().parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    name = config.get("_name_or_path")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None
