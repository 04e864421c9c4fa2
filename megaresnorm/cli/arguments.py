"""Types of arguments that several commands share."""

import argparse
import json
from pathlib import Path
from typing import Any

from megaresnorm.errors import ConfigError

Commands = Any  # argparse keeps the type of add_subparsers() private


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Such numbers with commas between them."""
    return [count(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Words with commas between them."""
    return [part.strip() for part in text.split(",")]


def write_json(path: Path, value: Any) -> None:
    """What --json asks for. Raises: ConfigError if it cannot be written."""
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--json {path}: cannot be written ({e.strerror})") from None
