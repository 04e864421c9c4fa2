"""Tokenizers: bytes, Hugging Face's, and SentencePiece with settings under which its Hugging Face form is equal."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from megaresnorm.errors import DataError
from megaresnorm.reading import first_line, read_plain_file
from megaresnorm.recipe.section import MAX_VOCAB

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 27  # four times the largest that is published
_PROBE = "The quick  brown fox\n\t3.14 «né» 你好 😀 \x00 <|x|> [UNK]"  # on which a tokenizer is tried when it is loaded
# Names that published tokenizers give to the token that ends a document, the usual first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        eod: the token that ends every document.
        model: content of the file that the tokenizer is made from; empty for bytes.
    """

    vocab_size: int
    eod: int
    model: bytes

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, [n] int32, without an end-of-document token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        ...

    def describe(self) -> dict:
        """The entry of dataset.json: enough to load the tokenizer again and to tell two apart."""
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
        """Bytes of UTF-8, [n] int32; what UTF-8 cannot express becomes a question mark."""
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of bytes, without end-of-document tokens; what is not UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def describe(self) -> dict:
        """As in ``Tokenizer``."""
        return {"kind": "bytes"}


_Result = TypeVar("_Result")


def guarded(call: Callable[[], _Result], what: str) -> _Result:
    """Call a library that may raise anything, panics of Rust included.

    Returns:
        The result of ``call``.

    Raises:
        DataError: it raised; the line is "what (reason)".
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as e:  # noqa: BLE001 - a panic of Rust is no Exception
        raise DataError(f"{what} ({first_line(e)})") from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Discard stderr, where Rust and C++ print errors that we report ourselves."""
    try:
        before = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


class Piece(NamedTuple):
    """One piece of a SentencePiece model.

    Attributes:
        kind: normal, unknown, control or byte.
    """

    text: str
    score: float
    kind: str


class SentencePieceTokenizer:
    """A SentencePiece model. Its end-of-sentence piece ends documents.

    Args:
        model: content of a .model file.
        where: its path, for errors.

    Raises:
        DataError: it is no such model, or has no end-of-sentence piece.
    """

    def __init__(self, model: bytes, where: str) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._where = where
        what = f"{where}: not a SentencePiece model"
        with _without_stderr():
            if not model or not guarded(lambda: self._processor.LoadFromSerializedProto(model), what):
                raise DataError(what)
            self.vocab_size, self.eod = self._processor.vocab_size(), self._processor.eos_id()
            if self.eod < 0:
                raise DataError(f"{where}: has no end-of-sentence piece to end documents with; train it with one")
            self.decode(self.encode(_PROBE))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Train byte-pair encoding with byte fallback that keeps every space, tab and newline.

        Raises:
            DataError: the text cannot fill ``vocab_size``.

        Source:
            Byte-pair encoding, arXiv:1508.07909.
        """
        import sentencepiece

        model = io.BytesIO()
        bad_text: list[DataError] = []

        def sentences() -> Iterator[str]:
            """Sentences; an error of ``texts`` is kept for later, since SentencePiece would replace its message."""
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
        """The whole vocabulary, by token id."""
        model = self._processor

        def kind(i: int) -> str:
            kinds = {"unknown": model.IsUnknown, "control": model.IsControl, "byte": model.IsByte}
            return next((name for name, has in kinds.items() if has(i)), "normal")

        return [Piece(model.IdToPiece(i), model.GetScore(i), kind(i)) for i in range(self.vocab_size)]

    def encode(self, text: str) -> np.ndarray:
        """As in ``Tokenizer``."""
        return guarded(
            lambda: np.asarray(self._processor.EncodeAsIds(text), dtype=np.int32),
            f"{self._where}: cannot encode a text",
        )

    def decode(self, ids: Iterable[int]) -> str:
        """As in ``Tokenizer``."""
        tokens = [int(i) for i in ids]
        return guarded(lambda: self._processor.DecodeIds(tokens), f"{self._where}: cannot decode tokens")

    def describe(self) -> dict:
        """As in ``Tokenizer``."""
        return {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE, "sha256": hashlib.sha256(self.model).hexdigest()}


class HuggingFaceTokenizer:
    """A tokenizer.json of Hugging Face's tokenizers.

    Args:
        model: content of the file.
        where: its path, for errors.
        end: the token that ends documents; None for the first of END_TOKENS that it has.

    Raises:
        DataError: it is no such file, is too large, or has no such token; or the package tokenizers is missing.
    """

    def __init__(self, model: bytes, where: str, end: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{where}: needs the package tokenizers; install it with: pip install tokenizers") from None
        self.model, self._where = model, where
        with _without_stderr():
            self._tokenizer = guarded(
                lambda: tokenizers.Tokenizer.from_str(model.decode("utf-8")), f"{where}: not a tokenizer.json"
            )
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
            self.vocab_size = 1 + max(ids.values(), default=0)
            if self.vocab_size > MAX_VOCAB:
                raise DataError(
                    f"{where}: its largest token is {self.vocab_size - 1}; at most {MAX_VOCAB} tokens are read"
                )
            known = [token for token in ([end] if end is not None else END_TOKENS) if token in ids]
            if not known:
                wanted = end if end is not None else "one of " + ", ".join(END_TOKENS)
                raise DataError(f"{where}: has no token {wanted} to end documents with; name one with --end-token")
            self.end, self.eod = known[0], ids[known[0]]
            self.decode(self.encode(_PROBE))

    def encode(self, text: str) -> np.ndarray:
        """As in ``Tokenizer``; no special token is added."""
        return guarded(
            lambda: np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32),
            f"{self._where}: cannot encode a text",
        )

    def decode(self, ids: Iterable[int]) -> str:
        """As in ``Tokenizer``; special tokens are written out."""
        tokens = [int(i) for i in ids]
        return guarded(
            lambda: self._tokenizer.decode(tokens, skip_special_tokens=False), f"{self._where}: cannot decode tokens"
        )

    def describe(self) -> dict:
        """As in ``Tokenizer``."""
        digest = hashlib.sha256(self.model).hexdigest()
        return {"kind": "huggingface", "file": HUGGINGFACE_FILE, "sha256": digest, "end_token": self.end}


def read_tokenizer(path: Path, end: str | None = None) -> Tokenizer:
    """Read a SentencePiece .model, or a Hugging Face .json with ``end`` as in ``HuggingFaceTokenizer``.

    Raises:
        DataError: it is neither, or cannot be read.
    """
    try:
        model = read_plain_file(path, MAX_TOKENIZER_BYTES)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror}); wanted bytes, a .model or a tokenizer.json") from None
    if path.suffix == ".json":
        return HuggingFaceTokenizer(model, str(path), end)
    return SentencePieceTokenizer(model, str(path))


def restore_tokenizer(description: dict, model: bytes, where: str) -> Tokenizer:
    """Make a tokenizer from its description and its file's content; ``where`` is the file's path, for errors.

    Raises:
        DataError: there is no such tokenizer.
    """
    match description:
        case {"kind": "bytes"}:
            return ByteTokenizer()
        case {"kind": "sentencepiece"}:
            return SentencePieceTokenizer(model, where)
        case {"kind": "huggingface", "end_token": str(end)}:
            return HuggingFaceTokenizer(model, where, end)
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
        return restore_tokenizer(description, b"", str(folder / "dataset.json"))
    try:
        model = read_plain_file(folder / file, MAX_TOKENIZER_BYTES)
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
