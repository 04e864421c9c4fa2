"""megaresnorm generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaresnorm.cli.arguments import CheckpointFolder, EndToken, count_up_to, examples, number, path
from megaresnorm.errors import ConfigError
from megaresnorm.limits import FP32_MAX, FP32_TINY, MAX_TOKENS, MAX_VOCAB
from megaresnorm.text import write

MAX_PROMPT_BYTES = 1 << 24  # read from standard input at most


def _temperature(text: str | float) -> float:
    value = number(text)
    if value and not FP32_TINY <= value <= FP32_MAX:
        raise typer.BadParameter(f"{text!r} is not 0, or a number from {FP32_TINY:.3g} to {FP32_MAX:.3g}")
    return value


def _seed(text: str | int) -> int:
    text = str(text)
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise typer.BadParameter(f"{text[:60]!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _probability(text: str | float) -> float:
    if not 0.0 < number(text) <= 1.0:
        raise typer.BadParameter(f"{text!r} is not above 0 and at most 1")
    return number(text)


_Prompt = Annotated[
    str, typer.Option(help="text to continue; - reads it from standard input; unset: the start of a document")
]
_Tokens = Annotated[int, typer.Option(parser=count_up_to(MAX_TOKENS), metavar="N", help="how many at most")]
_Temperature = Annotated[
    float, typer.Option(parser=_temperature, metavar="T", help="divides the logits; 0 takes the likeliest token")
]
_TopK = Annotated[
    int | None, typer.Option(parser=count_up_to(MAX_VOCAB), metavar="K", help="choose among the K likeliest tokens")
]
_WHAT_P = "choose among the likeliest tokens that together have probability P"
_TopP = Annotated[float | None, typer.Option(parser=_probability, metavar="P", help=_WHAT_P)]
_Samples = Annotated[int, typer.Option(parser=count_up_to(MAX_TOKENS), metavar="N", help="how many texts")]
_Seed = Annotated[
    int, typer.Option(parser=_seed, metavar="N", help="the texts are those of this seed and the following ones")
]
_NoCache = Annotated[bool, typer.Option("--no-cache", help="compute every token from all before it, to compare")]
_WHICH = "tokenizer of a checkpoint that has none (trained on bare token files): bytes, a file or a folder"
_Tokenizer = Annotated[Path | None, typer.Option(parser=path, metavar="FILE", help=_WHICH)]


def add_to(app: typer.Typer) -> None:
    """Add the generate command."""
    example = "megaresnorm generate runs/quickstart/deepnorm-50 --prompt 'import os' --top-p 0.95"
    app.command(epilog=examples(example))(generate)


def generate(
    checkpoint: CheckpointFolder,
    *,
    prompt: _Prompt = "",
    tokens: _Tokens = 200,
    temperature: _Temperature = 0.8,
    top_k: _TopK = None,
    top_p: _TopP = None,
    samples: _Samples = 1,
    seed: _Seed = 0,
    no_cache: _NoCache = False,
    tokenizer: _Tokenizer = None,
    end_token: EndToken = None,
) -> None:
    """Continue a text with the model of a checkpoint."""
    from megaresnorm.data.tokenizer import start_tokens
    from megaresnorm.generate import generate_tokens, load_model

    text = _prompt(prompt)
    model, found = load_model(checkpoint, tokenizer, end_token)
    start = start_tokens(found, text)
    for i in range(samples):
        if samples > 1:
            write(f"{chr(10) if i else ''}--- seed {seed + i} ---\n")
        written = start[1:]
        shown = _show_more("", found.decode(written))
        for token in generate_tokens(
            model,
            start,
            tokens,
            vocab_size=found.vocab_size,
            end=found.eod,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + i,
            cache=not no_cache,
        ):
            written = [*written, token]
            shown = _show_more(shown, found.decode(written))
        write(found.decode(written)[len(shown) :] + "\n")


def _show_more(shown: str, text: str) -> str:
    """Print what ``text`` adds to ``shown``, but no character whose last bytes are still to come."""
    whole = text.rstrip("\ufffd")
    if whole.startswith(shown):
        write(whole[len(shown) :])
        return whole
    return shown


def _prompt(text: str) -> str:
    """The argument, or standard input where it is ``-``.

    Raises:
        ConfigError: it is not UTF-8 text, or too long.
    """
    stream = getattr(sys.stdin, "buffer", sys.stdin)  # bytes, whatever the locale
    if text == "-" and stream is None:
        raise ConfigError("--prompt -: standard input is closed")
    given = stream.read(MAX_PROMPT_BYTES + 1) if text == "-" else text
    raw = given.encode(errors="surrogateescape") if isinstance(given, str) else given
    if len(raw) > MAX_PROMPT_BYTES:
        raise ConfigError(f"--prompt: over {MAX_PROMPT_BYTES:,} bytes; no model reads so much")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ConfigError(f"--prompt: not UTF-8 text (byte {e.start})") from None
