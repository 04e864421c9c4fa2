"""Tokenizers from the files in which they come, and the rule for the tokens that end and begin documents.

A document ends with ``--end-token``; or else with the token that the files beside the tokenizer name as its end: the
dataset.json of a data set that was prepared with it, or tokenizer_config.json and special_tokens_map.json; or else with
the first usual one of its vocabulary. It begins with a token only where that is asked for (``--bos``), or where the
data set beside it has one. ``prepare``, ``generate``, ``data.tokenizer`` and ``convert from-hf`` read tokenizers here.
"""

import hashlib
from pathlib import Path
from typing import Any

from megaresnorm.data.hf_tokenizer import BEGIN_TOKENS, HuggingFaceTokenizer, of_vocab_and_merges
from megaresnorm.data.tokenizer import (
    HUGGINGFACE_FILE,
    MAX_TOKENIZER_BYTES,
    SENTENCEPIECE_FILE,
    ByteTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.reading import read_json_object, read_plain_file

TOKENIZER_CONFIG, SPECIAL_TOKENS, DATASET = "tokenizer_config.json", "special_tokens_map.json", "dataset.json"
_BESIDE = (TOKENIZER_CONFIG, SPECIAL_TOKENS)  # the first that names a token counts
_MAX_BESIDE_BYTES, _MAX_BESIDE_VALUES = 1 << 26, 1 << 20
_FILES = f"{HUGGINGFACE_FILE}, {SENTENCEPIECE_FILE}, or vocab.json with merges.txt"


def read_tokenizer(path: Path, end: str | None = None, *, bos: bool = False, begin: str | None = None) -> Tokenizer:
    """Read a tokenizer.json, a SentencePiece .model, GPT-2's vocab.json and merges.txt, or the folder of one of them.

    Args:
        path: ``bytes`` for one token a byte.
        end: token of a tokenizer.json that ends documents; None for the one of the rule above.
        bos: begin documents with a token.
        begin: that token, of a tokenizer.json; None for the one that its files name. Has no effect without ``bos``.

    Raises:
        ConfigError: ``end``, ``bos`` or ``begin`` has no effect with this kind of tokenizer.
        DataError: it is none, cannot be read, or has no such token.
    """
    if str(path) == "bytes":
        _refuse("bytes", {"--end-token": end, "--begin-token": begin, "--bos": bos})
        return ByteTokenizer()
    file = _file_at(path)
    if file.suffix != ".json":
        _refuse(str(path), {"--end-token": end, "--begin-token": begin})
        model = read_file(file)
        of_data_set = _of_data_set(file, model).get("begin_token") is not None
        return SentencePieceTokenizer(model, str(file), begin=bos or of_data_set)
    merges = _merges_beside(file)
    model = read_file(file) if merges is None else of_vocab_and_merges(read_file(file), read_file(merges), str(file))
    before = _of_data_set(file, model)
    end = end or before.get("end_token") or _named_beside(file, "eos_token")
    if not bos:
        return HuggingFaceTokenizer(model, str(file), end, before.get("begin_token"))
    plain = HuggingFaceTokenizer(model, str(file), end)
    begin = begin or _named_beside(file, "bos_token") or "".join(plain.prefix[:1]) or _usual(plain)
    if begin == plain.end:
        raise DataError(f"{file}: {begin} ends every document, and so comes before the next one; leave out --bos")
    return HuggingFaceTokenizer(model, str(file), end, begin)


def _refuse(path: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value:
            raise ConfigError(f"{option} has no effect with --tokenizer {path}; remove it")


def _usual(tokenizer: HuggingFaceTokenizer) -> str:
    """The first usual begin token that a tokenizer has; refused by ``HuggingFaceTokenizer`` where it has none."""
    return next((token for token in BEGIN_TOKENS if token in tokenizer), "such as <s> or <|begin_of_text|>")


def _file_at(path: Path) -> Path:
    """The file that a tokenizer is made from; of GPT-2's two, vocab.json.

    Raises:
        DataError: there is none.
    """
    try:
        if path.is_dir():
            names = (HUGGINGFACE_FILE, SENTENCEPIECE_FILE, "vocab.json")
            found = next((path / name for name in names if (path / name).exists()), None)
            if found is None:
                raise DataError(f"{path}: cannot be read (the folder has no tokenizer; wanted {_FILES})")
            return found
        if path.suffix == ".txt" and "merges" in path.name:
            return path.with_name(path.name.replace("merges", "vocab")).with_suffix(".json")
        if not path.exists() and not path.is_symlink() and not path.suffix:
            raise DataError(
                f"{path}: cannot be read (no such file); wanted bytes, or a file or folder with {_FILES}; for a model "
                f"of the hub, fetch these first (hf download {path} --local-dir FOLDER)"
            )
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', e)})") from None
    return path


def _merges_beside(file: Path) -> Path | None:
    """The merges.txt that belongs to a vocab.json; None for a file of another kind.

    Raises:
        DataError: it is not there.
    """
    if "vocab" not in file.name or "model" in _json_beside(file):  # which may be a tokenizer.json of another name
        return None
    merges = file.with_name(file.name.replace("vocab", "merges")).with_suffix(".txt")
    if not merges.exists():
        raise DataError(f"{file}: belongs to {merges.name}, which is not beside it")
    return merges


def read_file(path: Path) -> bytes:
    """Content of the file of a tokenizer.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    try:
        return read_plain_file(path, MAX_TOKENIZER_BYTES)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); wanted bytes, a .model or a tokenizer.json") from None


def _json_beside(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_json_object(path, _MAX_BESIDE_BYTES, _MAX_BESIDE_VALUES)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
    except ValueError as e:
        raise DataError(f"{path}: {e}") from None


def _named_beside(file: Path, key: str) -> str | None:
    """The token that the files of Hugging Face beside a tokenizer have under ``key``: its text, or a description."""
    for name in _BESIDE:
        token = _json_beside(file.with_name(name)).get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise DataError(f"{file.with_name(name)}: {key} is {str(token)[:60]!r}, which is no token")
        if token:
            return token
    return None


def _of_data_set(file: Path, model: bytes) -> dict[str, Any]:
    """The description of the same tokenizer in the dataset.json beside it; empty where it is of no data set."""
    described = _json_beside(file.with_name(DATASET)).get("tokenizer")
    if isinstance(described, dict) and described.get("sha256") == hashlib.sha256(model).hexdigest():
        return described
    return {}


def restore_tokenizer(description: dict, model: bytes, where: str) -> Tokenizer:
    """Make a tokenizer from its description and its file's content; ``where`` is the file's path, for errors.

    Raises:
        DataError: there is no such tokenizer.
    """
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "sentencepiece"}:
            return SentencePieceTokenizer(model, where, begin="begin_token" in description)
        case {"kind": "huggingface", "end_token": str(end)}:
            return HuggingFaceTokenizer(model, where, end, description.get("begin_token"))
    raise DataError(f"{where}: unknown tokenizer {str(description)[:80]}")


def load_tokenizer(description: dict, folder: Path) -> Tokenizer:
    """Load the tokenizer that a dataset.json describes, from its folder.

    Raises:
        DataError: its file is missing or another one.
    """
    kind = description.get("kind")
    file = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}.get(
        kind if isinstance(kind, str) else ""
    )
    if file is None:
        return restore_tokenizer(description, b"", str(folder / DATASET))
    try:
        model = read_plain_file(folder / file, MAX_TOKENIZER_BYTES)
    except OSError as e:
        raise DataError(f"{folder / file}: cannot be read ({e.strerror})") from None
    if hashlib.sha256(model).hexdigest() != description.get("sha256"):
        raise DataError(f"{folder / file}: not the tokenizer this data was made with (SHA-256 differs)")
    return restore_tokenizer(description, model, str(folder / file))


def ends_of_documents(tokenizer: Tokenizer) -> str:
    """How documents begin and end, in words; and a hint where the tokenizer's own file begins texts and we do not."""
    begin = tokenizer.describe().get("begin_token")
    line = f"documents {f'begin with {begin} and ' if begin is not None else ''}end with {tokenizer.end}"
    adds = tokenizer.prefix if isinstance(tokenizer, HuggingFaceTokenizer) else []
    if not adds or adds == [begin]:
        return line
    what = "which --bos does here" if len(adds) == 1 else "of which --bos writes one"
    return f"{line}; its own file puts {' '.join(adds)} before every text, {what}"
