"""Tokenizers: bytes, Hugging Face's tokenizer.json, and SentencePiece with settings under which its Hugging Face form is equal."""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megaresnorm.errors import DataError

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
# Names that published tokenizers give to the token that ends a document, the usual first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to token ids and back. ``eod`` ends every document."""

    vocab_size: int
    eod: int
    model: bytes  # the file that it is made from; empty for bytes

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
    model = b""

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> dict:
        return {"kind": "bytes"}


class Piece(NamedTuple):
    """One piece of a SentencePiece model. kind: normal, unknown, control or byte."""

    text: str
    score: float
    kind: str


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

    def pieces(self) -> list["Piece"]:
        """All of the vocabulary, by token."""
        model = self._processor

        def kind(i: int) -> str:
            kinds = {"unknown": model.IsUnknown, "control": model.IsControl, "byte": model.IsByte}
            return next((name for name, has in kinds.items() if has(i)), "normal")

        return [Piece(model.IdToPiece(i), model.GetScore(i), kind(i)) for i in range(self.vocab_size)]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.EncodeAsIds(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.DecodeIds([int(i) for i in ids])

    def describe(self) -> dict:
        return {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE, "sha256": hashlib.sha256(self.model).hexdigest()}


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers. ``end``: the token that ends documents; None: the first of END_TOKENS it has.

    Raises: DataError for bytes that are not one, or one without such a token.
    """

    def __init__(self, model: bytes, where: str, end: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{where}: needs the package tokenizers; install it with: pip install tokenizers") from None
        self.model = model
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as e:  # noqa: BLE001 - tokenizers raises bare Exceptions
            raise DataError(f"{where}: not a tokenizer.json ({str(e).splitlines()[0]})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(ids.values(), default=0)
        known = [token for token in ([end] if end is not None else END_TOKENS) if token in ids]
        if not known:
            wanted = end if end is not None else "one of " + ", ".join(END_TOKENS)
            raise DataError(f"{where}: has no token {wanted} to end documents with; name one with --end-token")
        self.end, self.eod = known[0], ids[known[0]]

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def describe(self) -> dict:
        digest = hashlib.sha256(self.model).hexdigest()
        return {"kind": "huggingface", "file": HUGGINGFACE_FILE, "sha256": digest, "end_token": self.end}


def read_tokenizer(path: Path, end: str | None = None) -> Tokenizer:
    """A SentencePiece .model or a Hugging Face .json. Raises: DataError if it is neither, or cannot be read."""
    try:
        model = path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); wanted bytes, a .model or a tokenizer.json") from None
    if path.suffix == ".json":
        return HuggingFaceTokenizer(model, str(path), end)
    return SentencePieceTokenizer(model, str(path))


def restore_tokenizer(description: dict, model: bytes, where: str) -> Tokenizer:
    """The tokenizer with this description and file. Raises: DataError if there is none."""
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "sentencepiece"}:
            return SentencePieceTokenizer(model, where)
        case {"kind": "huggingface", "end_token": str(end)}:
            return HuggingFaceTokenizer(model, where, end)
    raise DataError(f"{where}: unknown tokenizer {description!r}")


def load_tokenizer(description: dict, folder: Path) -> Tokenizer:
    """The tokenizer that a dataset.json describes. Raises: DataError if its file is missing or another one."""
    file = {"sentencepiece": SENTENCEPIECE_FILE, "huggingface": HUGGINGFACE_FILE}.get(description.get("kind", ""))
    if file is None:
        return restore_tokenizer(description, b"", str(folder / "dataset.json"))
    try:
        model = (folder / file).read_bytes()
    except OSError as e:
        raise DataError(f"{folder / file}: cannot be read ({e.strerror})") from None
    if hashlib.sha256(model).hexdigest() != description.get("sha256"):
        raise DataError(f"{folder / file}: not the tokenizer this data was made with (SHA-256 differs)")
    return restore_tokenizer(description, model, str(folder / file))


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
