"""Tokenizers: bytes, and SentencePiece with settings under which its Hugging Face form is equal.

What is spelled like a special token in a text is letters for every tokenizer: only ``eod`` and ``bos`` end and begin a
document, and only the code that lays documents down writes them. (User-defined pieces of a SentencePiece model are part
of its text, as whoever trained it wanted.)
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from megaresnorm.errors import DataError
from megaresnorm.reading import first_line

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 1 << 27  # four times the largest that is published
PROBE = "The quick  brown fox\n\t3.14 «né» 你好 😀 \x00 <|x|> [UNK]"  # on which a tokenizer is tried when it is loaded


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        eod, end: the token that ends every document, and its name.
        bos: the token that begins every document; None where none does.
        model: content of the file that the tokenizer is made from; empty for bytes.
    """

    vocab_size: int
    eod: int
    end: str
    bos: int | None
    model: bytes

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, [n] int32, without ``bos`` and ``eod``. What is spelled like one of them is letters."""
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
    end = "token 256"
    bos: int | None = None
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
def without_stderr() -> Iterator[None]:
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
        begin: whether its beginning-of-sentence piece begins documents.

    Raises:
        DataError: it is no such model, or has no such piece.
    """

    def __init__(self, model: bytes, where: str, *, begin: bool = False) -> None:
        import sentencepiece

        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._where = where
        what = f"{where}: not a SentencePiece model"
        with without_stderr():
            if not model or not guarded(lambda: self._processor.LoadFromSerializedProto(model), what):
                raise DataError(what)
            self.vocab_size, self.eod = self._processor.vocab_size(), self._processor.eos_id()
            if self.eod < 0:
                raise DataError(f"{where}: has no end-of-sentence piece to end documents with; train it with one")
            self.end = self._processor.IdToPiece(self.eod)
            if begin and self._processor.bos_id() < 0:
                raise DataError(f"{where}: has no beginning-of-sentence piece to begin documents with; leave out --bos")
            self.bos = self._processor.bos_id() if begin else None
            self.decode(self.encode(PROBE))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, begin: bool = False) -> "SentencePieceTokenizer":
        """Train byte-pair encoding with byte fallback that keeps every space, tab and newline.

        Args:
            begin: as of the class.

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
        return cls(model.getvalue(), "the trained model", begin=begin)

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
        digest = hashlib.sha256(self.model).hexdigest()
        begin = {} if self.bos is None else {"begin_token": self._processor.IdToPiece(self.bos)}
        return {"kind": "sentencepiece", "file": SENTENCEPIECE_FILE, "sha256": digest, **begin}


def start_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of the start of a document: what comes before every document of the training data, then the text."""
    return [tokenizer.eod if tokenizer.bos is None else tokenizer.bos, *tokenizer.encode(text).tolist()]


def text_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> int:
    """Bytes of UTF-8 that tokens stand for; ``eod`` and ``bos`` stand for none.

    A character that is cut by the first or last token counts as one byte there.
    """
    text = tokenizer.decode(i for i in ids if i not in (tokenizer.eod, tokenizer.bos))
    whole = text.strip("\ufffd")
    return len(whole.encode("utf-8", errors="replace")) + len(text) - len(whole)


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
