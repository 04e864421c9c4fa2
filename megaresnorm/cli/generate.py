"""megaresnorm generate."""

from __future__ import annotations

import argparse
import sys

from megaresnorm.cli.arguments import Commands, count_up_to, path
from megaresnorm.errors import ConfigError
from megaresnorm.recipe.section import FP32_MAX, FP32_TINY, MAX_TOKENS, MAX_VOCAB
from megaresnorm.text import write

MAX_PROMPT_BYTES = 1 << 24  # read from standard input at most


def add_generate(commands: Commands) -> None:
    """Add the generate command."""
    generate = commands.add_parser(
        "generate",
        help="continue a text with a trained model",
        description="Continue a prompt with the model of a checkpoint.",
        epilog="example: megaresnorm generate runs/quickstart/deepnorm-50 --prompt 'import os' --top-p 0.95",
    )
    add = generate.add_argument
    add(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="output folder of a run (its newest checkpoint), or one checkpoint",
    )
    add("--prompt", default="", help="text to continue; - reads it from standard input [start of a document]")
    add("--tokens", type=count_up_to(MAX_TOKENS), default=200, help="how many at most [200]")
    add("--temperature", type=_temperature, default=0.8, help="divides the logits; 0 takes the likeliest token [0.8]")
    add("--top-k", type=count_up_to(MAX_VOCAB), metavar="K", help="choose among the K likeliest tokens")
    add("--top-p", type=_share, metavar="P", help="choose among the likeliest tokens that together have probability P")
    add("--samples", type=count_up_to(MAX_TOKENS), default=1, help="how many texts [1]")
    add("--seed", type=_seed, default=0, help="the texts are those of this seed and the following ones [0]")
    add("--no-cache", action="store_true", help="compute every token from all before it, to compare")
    add(
        "--tokenizer",
        type=path,
        metavar="FILE",
        help="tokenizer of a checkpoint that has none (trained on bare token files): bytes, a file or a folder",
    )
    add("--end-token", metavar="TOKEN", help="token of that tokenizer.json that ends documents [its end-of-text token]")
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from megaresnorm.data.tokenizer import start_tokens
    from megaresnorm.generate import generate_tokens, load_model

    prompt = _prompt(arguments.prompt)
    model, tokenizer = load_model(arguments.checkpoint, arguments.tokenizer, arguments.end_token)
    start = start_tokens(tokenizer, prompt)
    for number in range(arguments.samples):
        if arguments.samples > 1:
            write(f"{chr(10) if number else ''}--- seed {arguments.seed + number} ---\n")
        tokens = start[1:]
        shown = _show_more("", tokenizer.decode(tokens))
        for token in generate_tokens(
            model,
            start,
            arguments.tokens,
            vocab_size=tokenizer.vocab_size,
            end=tokenizer.eod,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed + number,
            cache=not arguments.no_cache,
        ):
            tokens = [*tokens, token]
            shown = _show_more(shown, tokenizer.decode(tokens))
        write(tokenizer.decode(tokens)[len(shown) :] + "\n")
    return 0


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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def _temperature(text: str) -> float:
    value = _number(text)
    if value and not FP32_TINY <= value <= FP32_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0, or a number from {FP32_TINY:.3g} to {FP32_MAX:.3g}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 19 or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _share(text: str) -> float:
    value = _number(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value
