"""Tokenizers of Hugging Face's package tokenizers, from a tokenizer.json or from GPT-2's vocab.json and merges.txt."""

import hashlib
import json
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np

from megaresnorm.data.tokenizer import HUGGINGFACE_FILE, PROBE, guarded, without_stderr
from megaresnorm.errors import DataError
from megaresnorm.limits import MAX_VOCAB

# Names that published tokenizers give to the token that ends a document, and to the one that begins it, usual first.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "<|bos|>", "[BOS]", "[CLS]")


class HuggingFaceTokenizer:
    """A tokenizer.json. Its special tokens are never made of a text that spells them.

    Args:
        model: content of the file.
        where: its path, for errors.
        end: the token that ends documents; None for the first of END_TOKENS that it has.
        begin: the token that begins documents; None for none.

    Attributes:
        end, begin: names of these tokens.

    Raises:
        DataError: it is no such file, is too large, or has no such token; or the package tokenizers is missing.
    """

    def __init__(self, model: bytes, where: str, end: str | None = None, begin: str | None = None) -> None:
        self.model, self._where = model, where
        with without_stderr():
            self._decoder = _loaded(model, where)
            ids = self._decoder.get_vocab(with_added_tokens=True)
            self._special = {i for i, token in self._decoder.get_added_tokens_decoder().items() if token.special}
            self.vocab_size = 1 + max(ids.values(), default=0)
            if self.vocab_size > MAX_VOCAB:
                raise DataError(
                    f"{where}: its largest token is {self.vocab_size - 1}; at most {MAX_VOCAB} tokens are read"
                )
            known = [token for token in ([end] if end is not None else END_TOKENS) if token in ids]
            known.sort(key=lambda token: ids[token] not in self._special)  # an ordinary word may be called so, too
            if not known:
                wanted = end if end is not None else "one of " + ", ".join(END_TOKENS)
                raise DataError(
                    f"{where}: has no token {wanted} to end documents with; name one with --end-token, or as eos_token "
                    "in a tokenizer_config.json beside it"
                )
            if begin is not None and begin not in ids:
                raise DataError(f"{where}: has no token {begin} to begin documents with; name one with --begin-token")
            self.end, self.eod = known[0], ids[known[0]]
            self.begin, self.bos = begin, None if begin is None else ids[begin]
            self._encoder = guarded(lambda: self._spelled_out(model), f"{where}: not a tokenizer.json")
            self.decode(self.encode(PROBE))
        for token, i in ((self.end, self.eod), (self.begin, self.bos)):
            if token is not None and i in self.encode(token):
                raise DataError(
                    f"{where}: a text that has {token} could not be told from a document's end or begin; name another "
                    "token with --end-token, or --begin-token"
                )

    def _spelled_out(self, model: bytes) -> Any:
        """The same tokenizer for texts alone, in which special tokens have names that no text spells.

        That they are not looked for as added tokens is not enough: pieces of a Unigram model, words of WordPiece and
        what merges make of letters may be spelled like one. A token of one character may be a letter of the alphabet.
        """
        made = json.loads(model)
        special = {token["content"] for token in made.get("added_tokens") or () if token.get("special")}
        special |= {self.end, *([self.begin] if self.begin is not None else [])}
        secret = secrets.token_hex(16)
        names = {token: f"{secret}-{i}" for i, token in enumerate(sorted(special)) if len(token) > 1}
        made["post_processor"] = None
        for token in made.get("added_tokens") or ():
            token["content"] = names.get(token["content"], token["content"])
        _rename(made["model"], names)
        encoder = _loaded(json.dumps(made).encode(), self._where)
        encoder.encode_special_tokens = True
        return encoder

    def __contains__(self, token: str) -> bool:
        return self._decoder.token_to_id(token) is not None

    @property
    def prefix(self) -> list[str]:
        """The tokens that the file itself puts before every text."""

        def tokens(*, special: bool) -> list[str]:
            return self._decoder.encode("a", add_special_tokens=special).tokens

        what = f"{self._where}: cannot encode a text"
        plain, whole = guarded(lambda: tokens(special=False), what), guarded(lambda: tokens(special=True), what)
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        return whole[: starts[0]] if plain and starts else []

    def encode(self, text: str) -> np.ndarray:
        """As in ``Tokenizer``."""
        return guarded(
            lambda: np.asarray(self._encoder.encode(text, add_special_tokens=False).ids, dtype=np.int32),
            f"{self._where}: cannot encode a text",
        )

    def decode(self, ids: Iterable[int]) -> str:
        """As in ``Tokenizer``; special tokens are written out."""
        tokens = [int(i) for i in ids]
        return guarded(
            lambda: self._decoder.decode(tokens, skip_special_tokens=False), f"{self._where}: cannot decode tokens"
        )

    def describe(self) -> dict:
        """As in ``Tokenizer``."""
        digest = hashlib.sha256(self.model).hexdigest()
        begin = {} if self.begin is None else {"begin_token": self.begin}
        return {"kind": "huggingface", "file": HUGGINGFACE_FILE, "sha256": digest, "end_token": self.end, **begin}


def _loaded(model: bytes, where: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(f"{where}: needs the package tokenizers; install it with: pip install tokenizers") from None
    made = guarded(lambda: tokenizers.Tokenizer.from_str(model.decode("utf-8")), f"{where}: not a tokenizer.json")
    made.no_truncation()
    made.no_padding()
    return made


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Rename pieces of the model of a tokenizer.json, in place. Merges that have to do with one are left out."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    prefix = model.get("continuing_subword_prefix") or ""
    if "merges" in model:
        pairs = [(merge, merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        model["merges"] = [
            merge for merge, (a, b) in pairs if names.keys().isdisjoint((a, b, a + b.removeprefix(prefix)))
        ]


def of_vocab_and_merges(vocab: bytes, merges: bytes, where: str) -> bytes:
    """The tokenizer.json of byte-level BPE as GPT-2 has it in two files.

    Args:
        vocab: content of vocab.json, letters of bytes -> token.
        merges: content of merges.txt, a pair in every line, with or without a first line for the version.

    Raises:
        DataError: they are no such files, or do not belong together.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    wanted = "wanted GPT-2's vocab.json and merges.txt"

    def make() -> bytes:
        ids = json.loads(vocab)
        lines = merges.decode("utf-8-sig").splitlines()
        pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
        if not isinstance(ids, dict) or not ids or not all(type(i) is int for i in ids.values()):
            raise ValueError("vocab.json is no table of tokens")
        if not all(len(pair) == 2 for pair in pairs):
            raise ValueError("a line of merges.txt is no pair")
        made = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[(a, b) for a, b in pairs]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = [token for token in END_TOKENS if token in ids]
        made.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
        return made.to_str().encode()

    with without_stderr():
        return guarded(make, f"{where}: {wanted}")
