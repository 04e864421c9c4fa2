"""Argument types that several commands share."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaresnorm.errors import ConfigError
from megaresnorm.reading import expanded
from megaresnorm.recipe.section import MAX_BLOCKS, MAX_STEPS

Commands = Any  # argparse keeps the type of add_subparsers() private
MAX_SHOWN = 60  # characters of an argument that an error shows
MAX_NAME, MAX_PATH = 255, 4095  # bytes, the limits of Linux
_UNITS = {"": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate(["", "K", "M", "G", "T"])}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate(["K", "M", "G", "T"], start=1)}


def path(text: str) -> Path:
    """A path of a file or folder, which need not exist. ``~`` and ``$NAME`` are expanded."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a NUL character, which no path has")
    text = path_text(text)
    encoded = os.fsencode(text)
    if max(map(len, encoded.split(b"/"))) > MAX_NAME or len(encoded) > MAX_PATH:
        raise argparse.ArgumentTypeError(f"{text[:MAX_SHOWN]!r}... is too long for a path")
    return Path(text)


def path_text(text: str) -> str:
    """The path of a file that is only read, as text. ``~`` and ``$NAME`` are expanded.

    Raises:
        ConfigError: they cannot be.
    """
    try:
        return expanded(text)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def source(text: str) -> str:
    """A ``path_text``, or hf:NAME, where NAME may be one."""
    return f"hf:{path_text(text[3:])}" if text.startswith("hf:") else path_text(text)


def count_up_to(most: int) -> Callable[[str], int]:
    """The type of whole numbers from 1 to ``most``."""

    def count(text: str) -> int:
        digits = text.lstrip("0")
        if (
            not (text.isascii() and text.isdecimal())
            or not digits
            or len(digits) > len(str(most))
            or int(digits) > most
        ):
            given = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
            raise argparse.ArgumentTypeError(f"{given!r} is not a whole number from 1 to {most}")
        return int(digits)

    return count


count = count_up_to(MAX_STEPS)
blocks = count_up_to(MAX_BLOCKS)


def depths(text: str) -> list[int]:
    """Numbers of blocks, separated by commas."""
    return [blocks(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """Words, separated by commas."""
    return [part.strip() for part in text.split(",")]


def size(text: str) -> int:
    """A number of bytes.

    >>> size("1GB"), size("1.5 GiB"), size("4096")
    (1000000000, 1610612736, 4096)
    """
    number = text.strip().rstrip("BbKkMmGgTtIi ").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        num_bytes = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        num_bytes = 0.0
    if not 1 <= num_bytes < 2**60:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB, 4GB or 2GiB")
    return int(num_bytes)


def memory(text: str) -> int:
    """A ``size`` that some tensors fit into."""
    num_bytes = size(text)
    if num_bytes < 64 * 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is too little; give at least 64MB")
    return num_bytes


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share from 0 to 1")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write the file that --json names.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--json {path}: cannot be written ({e.strerror})") from None
    except ValueError:
        raise ConfigError(f"--json {path}: cannot be written (no file can have this name)") from None
