"""Tokenizers: bytes, and SentencePiece trained or loaded with settings under which its Hugging Face form is equal."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from megaresnorm.errors import DataError

SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """Text to token ids and back. ``eod`` ends every document."""

    vocab_size: int
    eod: int

    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def describe(self) -> dict:
        """What dataset.json records: enough to load it again and to tell two apart."""
        ...


class ByteTokenizer:
    """One token for each byte of UTF-8, and one for the end of a document.

    >>> ByteTokenizer().encode("né").tolist()
    [110, 195, 169]
    """

    vocab_size = 257
    eod = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> dict:
        return {"kind": "bytes"}


class SentencePieceTokenizer:
    """A SentencePiece model. Raises: DataError for bytes that are not one, or one without an end-of-sentence piece."""

    def __init__(self, model: bytes, where: str) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded:
            raise DataError(f"{where}: not a SentencePiece model")
        self.vocab_size, self.eod = self._processor.vocab_size(), self._processor.eos_id()
        if self.eod < 0:
            raise DataError(f"{where}: has no end-of-sentence piece to end documents with; train it with one")

    @classmethod
    def load(cls, path: Path) -> "SentencePieceTokenizer":
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as e:
            raise DataError(f"{path}: cannot be read ({e.strerror})") from None

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Byte-pair encoding (arXiv:1508.07909) with byte fallback that keeps every space, tab and newline.

        Raises: DataError if the text cannot fill ``vocab_size``.
        """
        import sentencepiece

        model = io.BytesIO()
        bad_text: list[DataError] = []

        def sentences() -> Iterator[str]:
            """SentencePiece would replace an error of its source by a message of its own, so it is kept for later."""
            try:
                yield from _pieces_of_text(texts)
            except DataError as e:
                bad_text.append(e)

        try:
            sentencepiece.SentencePieceTrainer.Train(
                sentence_iterator=sentences(),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=0.9995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 16,
                minloglevel=2,
            )
        except RuntimeError as e:
            detail = str(e).splitlines()[-1].split("] ")[-1].strip() or "the corpus is too small"
            problem = bad_text or [DataError(f"cannot train a SentencePiece model of {vocab_size} pieces: {detail}")]
            raise problem[0] from None
        if bad_text:
            raise bad_text[0]
        return cls(model.getvalue(), "the trained model")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.EncodeAsIds(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])

    def describe(self) -> dict:
        return {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE, "sha256": hashlib.sha256(self.model).hexdigest()}


def load_tokenizer(description: dict, folder: Path) -> Tokenizer:
    """The tokenizer that a dataset.json describes. Raises: DataError if its file is missing or another one."""
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "sentencepiece", "sha256": digest}:
            tokenizer = SentencePieceTokenizer.load(folder / SENTENCEPIECE_FILE)
            if hashlib.sha256(tokenizer.model).hexdigest() != digest:
                raise DataError(
                    f"{folder / SENTENCEPIECE_FILE}: not the tokenizer this data was made with (SHA-256 differs)"
                )
            return tokenizer
    raise DataError(f"{folder / 'dataset.json'}: unknown tokenizer {description!r}")


def _pieces_of_text(texts: Iterable[str], size: int = 4096) -> Iterator[str]:
    """Training sentences: stretches of whole lines, newlines kept, of about ``size`` characters."""
    for text in texts:
        stretch: list[str] = []
        length = 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), size):
                stretch.append(line[start : start + size])
                length += len(stretch[-1])
                if length >= size:
                    yield "".join(stretch)
                    stretch, length = [], 0
        if stretch:
            yield "".join(stretch)
