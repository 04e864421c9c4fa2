"""Tokenizers to and from the files of Hugging Face Transformers, compared on texts before they count as the same."""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megaresnorm.convert.family import OURS
from megaresnorm.convert.files import read_json
from megaresnorm.convert.provenance import Provenance, template_path
from megaresnorm.data.hf_tokenizer import HuggingFaceTokenizer
from megaresnorm.data.tokenizer import (
    HUGGINGFACE_FILE,
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
)
from megaresnorm.data.tokenizer_files import TOKENIZER_CONFIG, read_file, read_tokenizer, restore_tokenizer
from megaresnorm.errors import DataError
from megaresnorm.reading import first_line

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


def tokenizer_files(tokenizer: Tokenizer, provenance: Provenance | None = None) -> dict[str, bytes]:
    """Files, name -> content, from which AutoTokenizer makes an equal tokenizer; ``check_equal`` says whether it is.

    tokenizer.json alone is read, so neither sentencepiece nor protobuf is needed; a SentencePiece model comes along for
    other programs.

    Args:
        provenance: of the model that was trained on; what it says counts where the tokenizer is still its own.
    """
    files: dict[str, bytes] = {}
    described = tokenizer.describe()
    end, begin = tokenizer.end, described.get("begin_token")
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files[HUGGINGFACE_FILE] = tokenizer.model
    elif isinstance(tokenizer, SentencePieceTokenizer):
        files |= {HUGGINGFACE_FILE: _from_sentencepiece(tokenizer), SENTENCEPIECE_FILE: tokenizer.model}
    else:
        files[HUGGINGFACE_FILE], end = _of_bytes(), END_OF_BYTES
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin or end,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if provenance is not None and provenance.belongs_to(tokenizer):
        theirs = {"bos_token": None} | provenance.tokenizer_config
        settings |= theirs | {"eos_token": end} | ({"bos_token": begin} if begin else {})
        templates = {name: text.encode() for name, text in provenance.chat_templates.items() if template_path(name)}
        files |= templates
    files[TOKENIZER_CONFIG] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def write_tokenizer(folder: Path, tokenizer: Tokenizer, provenance: Provenance | None = None) -> None:
    """Write a tokenizer's files and check that Transformers makes the same tokens from them.

    Raises:
        DataError: it does not.
    """
    for name, content in tokenizer_files(tokenizer, provenance).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    check_equal(tokenizer, folder, list(sample_texts()))


def check_equal(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> None:
    """Compare a tokenizer with the one that Transformers makes from the files in ``folder``.

    A text that spells a special token is compared as letters, which is what Transformers makes of it with
    split_special_tokens.

    Raises:
        DataError: the files cannot be read, or the two make other tokens of a text or end a document otherwise.
    """
    from transformers import PreTrainedTokenizerFast

    try:  # the class itself: AutoTokenizer asks on the terminal whether to run code that the model brings along
        theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # noqa: BLE001 - theirs are of any class
        detail = first_line(e)
        raise DataError(
            f"Transformers cannot read the tokenizer ({detail}); export without it by --tokenizer none"
        ) from None

    def same(text: str) -> bool:
        ours = tokenizer.encode(text).tolist()
        return ours == theirs.encode(text, add_special_tokens=False) or ours == theirs.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )

    wrong = [text for text in texts if not same(text)]
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

    Files that we have written and nobody has changed are read back as the tokenizer that they were made from. Others
    are read by the rule of ``read_tokenizer``, with a token that begins documents where they begin texts with one.

    Args:
        config: of the folder.
        end_token: token that ends a document; None for the one that the files name.

    Raises:
        DataError, CheckpointError: the tokenizer cannot be used.
    """
    ours = config.get(OURS)
    description = ours.get("tokenizer") if isinstance(ours, dict) else None
    before = _as_exported(folder, description)
    if before is not None and not (end_token is not None and isinstance(before, HuggingFaceTokenizer)):
        return before
    if not any((folder / name).exists() for name in (HUGGINGFACE_FILE, SENTENCEPIECE_FILE, "vocab.json")):
        return None
    found = read_tokenizer(folder, end_token)
    if isinstance(found, HuggingFaceTokenizer):
        begins = len(found.prefix) == 1
    else:
        path = folder / TOKENIZER_CONFIG
        begins = path.exists() and read_json(path).get("add_bos_token") is True
    begin = found.prefix[0] if begins and isinstance(found, HuggingFaceTokenizer) else None
    return read_tokenizer(folder, end_token, bos=True, begin=begin) if begins else found


def _as_exported(folder: Path, description: Any) -> Tokenizer | None:
    """The tokenizer that the files of an export were made from, if they still are what was written.

    Args:
        description: the tokenizer's in config.json.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    files = {"bytes": HUGGINGFACE_FILE, "huggingface": HUGGINGFACE_FILE, "sentencepiece": SENTENCEPIECE_FILE}
    if kind not in files or not (folder / files[kind]).exists() or not (folder / HUGGINGFACE_FILE).exists():
        return None
    content = b"" if kind == "bytes" else read_file(folder / files[kind])
    if kind != "bytes" and hashlib.sha256(content).hexdigest() != description.get("sha256"):
        return None
    before = restore_tokenizer(description, content, str(folder / files[kind]))
    return before if tokenizer_files(before)[HUGGINGFACE_FILE] == read_file(folder / HUGGINGFACE_FILE) else None


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


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> bytes:
    """The tokenizer.json of a SentencePiece model that keeps every space, as ours do."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

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
    if tokenizer.bos is not None:
        begin = pieces[tokenizer.bos].text
        made.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokenizer.bos)])
    return made.to_str().encode()


def _merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make another piece, in the order in which SentencePiece prefers the results."""
    found = []
    for piece, rank in ids.items():
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        found += [(rank, ids[a], ids[b], a, b) for a, b in splits if a in ids and b in ids]
    return [(a, b) for *_, a, b in sorted(found)]
