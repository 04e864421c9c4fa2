"""The tokens on which two models are compared, and whether there is memory for it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.convert.native import NativeModel
from megaresnorm.data.tokenizer import Tokenizer, start_tokens
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.reading import read_plain_file
from megaresnorm.resilience.host import available_memory

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def main(argv):\n    for i, name in enumerate(argv):\n        print(f\"{i}: {name}\")\n",
    "In the beginning God created the heaven and the earth.\n\nAnd the earth was without form, and void;",
    "你好，世界。 Привет, мир! 😀 3.14159 = π",
)  # fmt: skip
SHORT = 128  # tokens of most sequences of a comparison
LONG = 512  # tokens of its one long sequence, and of a batch of short ones
MAX_PROMPTS_BYTES = 1 << 24
PROMPTS = 3072  # tokens that a conversion is verified on, at most: all logits of one model are kept


def random_prompts(vocab_size: int, seq_len: int, tokens: int = 2000, seed: int = 0) -> list[Tensor]:
    """Batches [B, S]: at least ``tokens`` uniform random tokens in sequences of up to SHORT, and one of up to LONG."""
    generator = torch.Generator().manual_seed(seed)
    length = min(seq_len, SHORT)
    rows = torch.randint(vocab_size, (-(-tokens // length), length), generator=generator)
    long = [torch.randint(vocab_size, (1, min(seq_len, LONG)), generator=generator)] if seq_len > length else []
    return [*rows.split(LONG // length), *long]


def text_prompts(texts: Sequence[str], tokenizer: Tokenizer, vocab_size: int, seq_len: int) -> list[Tensor]:
    """Batches [1, S] of one text each, a document of its own, cut to the longest sequence.

    Raises:
        CheckpointError: the tokenizer makes a token that the vocabulary lacks.
    """
    rows = [start_tokens(tokenizer, text)[:seq_len] for text in texts]
    if max(map(max, rows)) >= vocab_size:
        raise CheckpointError(f"the tokenizer makes token {max(map(max, rows))}, the vocabulary has {vocab_size}")
    return [torch.tensor([row]) for row in rows]


def prompts_of(native: NativeModel, tokenizer: Tokenizer | None) -> list[Tensor]:
    """The batches that a conversion is verified on: random tokens, and texts where there is a tokenizer."""
    vocab_size, seq_len = native.recipe.vocab_size, native.recipe.seq_len
    assert vocab_size is not None
    texts = [] if tokenizer is None else text_prompts(TEXTS, tokenizer, vocab_size, min(seq_len, SHORT))
    prompts = random_prompts(vocab_size, seq_len) + texts
    assert sum(prompt_BS.numel() for prompt_BS in prompts) <= PROMPTS
    return prompts


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank.

    Raises:
        ConfigError: the file has none, or is not readable UTF-8 text.
    """
    try:
        text = read_plain_file(path, MAX_PROMPTS_BYTES).decode("utf-8")
    except OSError as e:
        raise ConfigError(f"--prompts {path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"--prompts {path}: not UTF-8 text (byte {e.start})") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ConfigError(f"--prompts {path}: has no line of text")
    return lines


def check_memory(num_bytes: int, vocab_size: int) -> None:
    """Check that a model of ``num_bytes`` fits in memory, with the logits of the other one beside it.

    Raises:
        ConfigError: it does not.
    """
    have, need = available_memory(), num_bytes + 4 * (PROMPTS + 2 * LONG) * vocab_size
    if have is not None and need > have:
        raise ConfigError(
            f"verifying needs {human_bytes(need)} of memory, {human_bytes(have)} are free; "
            "switch it off by --verify off"
        )
