"""Tokenizers to and from the files of Hugging Face Transformers, compared on texts before they count as the same."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaresnorm.convert.family import OURS
from megaresnorm.convert.files import read_json
from megaresnorm.data.tokenizer import (
    HUGGINGFACE_FILE,
    MAX_TOKENIZER_BYTES,
    SENTENCEPIECE_FILE,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megaresnorm.errors import CheckpointError, DataError
from megaresnorm.reading import first_line, read_plain_file

TOKENIZER_CONFIG = "tokenizer_config.json"
END_OF_BYTES = "<|endoftext|>"
_TEXT = """the of and to in Über naïve Ελληνικά Привет мир 你好 世界 日本語 こんにちは 한국어 العربية שלום
😀 👩\u200d👩\u200d👧 🇫🇷 é e\u0301 ﬁ def return self.x __init__ == != -> {} [] () # // /* */ <div> &amp;
3.14 1,000 0x7f a_b camelCase don't U.S.A. ▁ _ \\n"""
_WORDS = _TEXT.split()
_SPACES = (" ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", " \t ", "\u00a0", "\u3000", "")


def sample_texts(count: int = 2000, seed: int = 0) -> Iterator[str]:
    """Texts on which tokenizers tend to differ: runs of spaces, tabs, line ends, emoji, CJK, accents, code, digits."""
    draw = random.Random(seed)
    yield from ("", " ", "  ", "\n", "\t\tx", " leading", "trailing ", "a", "0", "x" * 300)
    for _ in range(count - 10):
        words = draw.choices(_WORDS, k=draw.randint(1, 12))
        yield "".join(draw.choice(_SPACES) + word for word in words) + draw.choice(_SPACES)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Files, name -> content, from which AutoTokenizer makes an equal tokenizer; ``check_equal`` says whether it is.

    tokenizer.json alone is read, so neither sentencepiece nor protobuf is needed; a SentencePiece model comes along for
    other programs.
    """
    files: dict[str, bytes] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files[HUGGINGFACE_FILE], end = tokenizer.model, tokenizer.end
    elif isinstance(tokenizer, SentencePieceTokenizer):
        content, end = _from_sentencepiece(tokenizer)
        files |= {HUGGINGFACE_FILE: content, SENTENCEPIECE_FILE: tokenizer.model}
    else:
        content, end = _of_bytes(), END_OF_BYTES
        files[HUGGINGFACE_FILE] = content
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a tokenizer's files and check that Transformers makes the same tokens from them.

    Raises:
        DataError: it does not.
    """
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_bytes(content)
    check_equal(tokenizer, folder, list(sample_texts()))


def check_equal(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> None:
    """Compare a tokenizer with the one that AutoTokenizer makes from the files in ``folder``.

    Raises:
        DataError: the files cannot be read, or the two make other tokens of a text or end a document otherwise.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # noqa: BLE001 - theirs are of any class
        detail = first_line(e)
        raise DataError(
            f"Transformers cannot read the tokenizer ({detail}); export without it by --tokenizer none"
        ) from None
    wrong = [t for t in texts if theirs.encode(t, add_special_tokens=False) != tokenizer.encode(t).tolist()]
    if wrong:
        raise DataError(
            f"the tokenizer cannot be exported exactly: Transformers makes other tokens of {len(wrong)} of "
            f"{len(texts)} texts, such as {wrong[0][:60]!r}; export without it by --tokenizer none"
        )
    if theirs.eos_token_id != tokenizer.eod:
        raise DataError(
            f"the tokenizer cannot be exported exactly: its end is {theirs.eos_token_id} instead of {tokenizer.eod}"
        )


def read_tokenizer_of(folder: Path, config: dict[str, Any], end_token: str | None = None) -> Tokenizer | None:
    """The tokenizer of a Hugging Face folder; None if it has none.

    Files that we have written and nobody has changed are read back as the tokenizer that they were made from.

    Args:
        config: of the folder.
        end_token: token that ends a document; None for the one that the files name.

    Raises:
        DataError, CheckpointError: the tokenizer cannot be used.
    """
    ours = config.get(OURS)
    description = ours.get("tokenizer") if isinstance(ours, dict) else None
    kind = description.get("kind") if isinstance(description, dict) else None
    spm, hf = folder / SENTENCEPIECE_FILE, folder / HUGGINGFACE_FILE
    before: Tokenizer | None = None
    if kind == "bytes":
        before = ByteTokenizer()
    elif kind == "sentencepiece" and spm.exists():
        before = SentencePieceTokenizer(_content(spm), str(spm))
    if before is not None and hf.exists() and tokenizer_files(before)[HUGGINGFACE_FILE] == _content(hf):
        return before
    if hf.exists():
        return HuggingFaceTokenizer(_content(hf), str(hf), end_token or _end_token(folder))
    return SentencePieceTokenizer(_content(spm), str(spm)) if spm.exists() else None


def _content(path: Path) -> bytes:
    try:
        return read_plain_file(path, MAX_TOKENIZER_BYTES)
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from None


def _end_token(folder: Path) -> str | None:
    """The token that ends a document according to the files."""
    if not (folder / TOKENIZER_CONFIG).exists():
        return None
    end = read_json(folder / TOKENIZER_CONFIG).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    if end is not None and not isinstance(end, str):
        raise CheckpointError(f"{folder / TOKENIZER_CONFIG}: eos_token is {str(end)[:60]!r}")
    return end


def _of_bytes() -> bytes:
    """Byte-level BPE without merges. The letters that stand for bytes are those of GPT-2."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = byte_letters()
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_BYTES, special=True, normalized=False)])
    return made.to_str().encode()


def byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: printable ones stay, the others are from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[bytes, str]:
    """The tokenizer.json of a SentencePiece model that keeps every space, as ours do, and its end token."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = tokenizer.pieces()
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    plain = {piece.text: i for i, piece in enumerate(pieces) if piece.kind == "normal"}
    unknown = next((piece.text for piece in pieces if piece.kind == "unknown"), None)
    # BPE numbers its pieces from 0 down; a unigram model has logarithms of probabilities.
    if all(pieces[i].score == -rank for rank, i in enumerate(sorted(plain.values()))):
        model: models.Model = models.BPE(
            vocab=ids, merges=_merges(plain), fuse_unk=True, byte_fallback=True, unk_token=unknown
        )
    else:
        scores = [(piece.text, piece.score) for piece in pieces]
        model = models.Unigram(scores, unk_id=ids.get(unknown or "", 0), byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [piece.text for piece in pieces if piece.kind in ("unknown", "control")]
    made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    return made.to_str().encode(), pieces[tokenizer.eod].text


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make another piece, in the order in which SentencePiece prefers the results."""
    found = []
    for piece, rank in ids.items():
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(rank, ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]
