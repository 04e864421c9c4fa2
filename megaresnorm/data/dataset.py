"""A prepared data set: its files, its tokenizer, and the check that they are what was prepared."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megaresnorm.data.indexed import TokenFiles, spread_chunks
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import DATASET, load_tokenizer
from megaresnorm.errors import DataError
from megaresnorm.limits import MAX_VOCAB
from megaresnorm.reading import open_plain_file, read_json_object

DESCRIPTION = DATASET
PREFIX = "tokens"
DIGEST_CHUNK = 1 << 24  # bytes under one digest
LARGEST_VOCAB = MAX_VOCAB  # where the vocabulary is not known, a larger token is taken for damage
# One digest stands for 16 MB of tokens, so these limits admit a data set of 16 TB.
MAX_DESCRIPTION_BYTES, MAX_DESCRIPTION_VALUES = 1 << 26, 1 << 20
VERIFY_BYTES = 1 << 32  # at most so much is read before step 0


@dataclass(frozen=True)
class DataSet:
    """An open data set.

    Attributes:
        path: the folder or PREFIX that was asked for.
        tokenizer, vocab_size: None for bare Megatron files.
        digest: SHA-256 that stands for the content of the token files.
    """

    path: str
    files: TokenFiles
    tokenizer: Tokenizer | None
    vocab_size: int | None
    digest: str


def open_dataset(path: str, *, whole: bool = False) -> DataSet:
    """Open and check a data set.

    Args:
        path: a folder made by prepare, or the PREFIX of bare Megatron files.
        whole: compare all of a folder with its digests; otherwise at most VERIFY_BYTES of a file, evenly spread.

    Raises:
        DataError: something is missing, damaged or mismatched; names file and offset.
    """
    folder = Path(path)
    try:
        is_folder, is_prefix = folder.is_dir(), folder.with_name(folder.name + ".idx").exists()
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', e)})") from None
    if not is_folder:
        if not is_prefix:
            raise DataError(f"{path}: no such data set; {_what_was_meant(folder)}")
        files = TokenFiles(folder)
        return DataSet(path, files, None, None, content_digest(files.idx_path, files.bin_path))
    description = read_description(folder)
    tokenizer = load_tokenizer(description["tokenizer"], folder)
    if tokenizer.vocab_size != description["vocab_size"]:
        raise DataError(
            f"{folder / DESCRIPTION}: vocab_size {description['vocab_size']} is not the tokenizer's "
            f"{tokenizer.vocab_size}"
        )
    for name in (f"{PREFIX}.idx", f"{PREFIX}.bin"):
        _verify_digests(folder / name, description["files"][name], 1 << 62 if whole else VERIFY_BYTES)
    files = TokenFiles(folder / PREFIX)
    return DataSet(path, files, tokenizer, tokenizer.vocab_size, json_digest(description["files"]))


def _what_was_meant(path: Path) -> str:
    """What to do where there is no data set."""
    prefix = path.with_suffix("")
    if path.suffix in (".bin", ".idx") and Path(f"{prefix}.idx").exists():
        return f"give the prefix of the two files, {prefix}"
    return f"make it with: megaresnorm prepare --out {path} ..."


def verify_dataset(path: str) -> DataSet:
    """Open a data set and check all of it: every digest, and every token against the vocabulary.

    Bare Megatron files have no digests, and are checked against LARGEST_VOCAB.

    Raises:
        DataError: the first damage; names file and offset.
    """
    data = open_dataset(path, whole=True)
    data.files.check_token_range(data.vocab_size or LARGEST_VOCAB, max_bytes=1 << 62)
    return data


def digests_of(path: Path) -> dict:
    """Size and SHA-256 of every chunk of a file, for dataset.json."""
    with path.open("rb") as file:
        chunks = [hashlib.sha256(chunk).hexdigest() for chunk in iter(lambda: file.read(DIGEST_CHUNK), b"")]
    return {"size": path.stat().st_size, "sha256": chunks}


def json_digest(value: dict) -> str:
    """SHA-256 of plain values, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def content_digest(*paths: Path, max_bytes: int = VERIFY_BYTES) -> str:
    """Digest of files: of their suffixes, sizes and chunks, beyond ``max_bytes`` of a file of evenly spread ones."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.suffix} {size}\n".encode())
        with path.open("rb") as file:
            for start, stop in spread_chunks(size, max_bytes, DIGEST_CHUNK):
                file.seek(start)
                digest.update(file.read(stop - start))
    return digest.hexdigest()


def read_description(folder: Path) -> dict[str, Any]:
    """Read the dataset.json of a folder: format, tokenizer, vocab_size, documents, tokens, files and request.

    Raises:
        DataError: it cannot be read, or prepare cannot have written it.
    """
    path = folder / DESCRIPTION
    try:
        found = read_json_object(path, MAX_DESCRIPTION_BYTES, MAX_DESCRIPTION_VALUES)
    except OSError as e:
        inside = next((p for p in (folder / "data", *sorted(folder.glob("*"))) if (p / DESCRIPTION).is_file()), None)
        meant = f"did you mean {inside}?" if inside else "make the data set with megaresnorm prepare"
        raise DataError(f"{path}: cannot be read ({e.strerror}); {meant}") from None
    except ValueError as e:
        raise DataError(f"{path}: not the description of a data set: {e}") from None
    try:
        _Description.model_validate(found)
    except ValidationError as e:
        wrong = ".".join(str(part) for part in e.errors()[0]["loc"])[:80]
        raise DataError(
            f"{path}: not the description of a data set of format 1 (see its {wrong}); make it again with megaresnorm "
            "prepare"
        ) from None
    return found


class _Typed(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _File(_Typed):
    size: int = Field(ge=0, lt=1 << 62)
    sha256: list[str]


class _Files(_Typed):
    bin: _File = Field(alias="tokens.bin")
    idx: _File = Field(alias="tokens.idx")


class _Description(_Typed):
    format: int = Field(ge=1, le=1)
    tokenizer: dict[str, str]
    vocab_size: int = Field(ge=1, le=MAX_VOCAB)
    documents: int = Field(0, ge=0, lt=1 << 62)
    tokens: int = Field(0, ge=0, lt=1 << 62)
    files: _Files
    request: str = ""


def _verify_digests(path: Path, recorded: dict, max_bytes: int) -> None:
    """Compare the chunks of a file with their digests; beyond ``max_bytes``, evenly spread ones."""
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            raise DataError(
                f"{path}: has {size} bytes, but {DESCRIPTION} says {recorded['size']}; it was cut or replaced"
            )
        if len(recorded["sha256"]) != -(-size // DIGEST_CHUNK):
            raise DataError(
                f"{path.parent / DESCRIPTION}: has {len(recorded['sha256'])} digests for the {size} bytes of "
                f"{path.name}"
            )
        with os.fdopen(open_plain_file(path), "rb") as file:
            for start, stop in spread_chunks(size, max_bytes, DIGEST_CHUNK):
                file.seek(start)
                if hashlib.sha256(file.read(stop - start)).hexdigest() != recorded["sha256"][start // DIGEST_CHUNK]:
                    raise DataError(
                        f"{path}: damaged between byte {start} and {stop} (SHA-256 differs); make the data set again"
                    )
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None
