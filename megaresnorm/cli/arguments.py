"""Types of arguments and options that several commands share. Each is written once, with its help."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_BLOCKS, MAX_SHOWN, MAX_STEPS
from megaresnorm.reading import bytes_of_size, expanded

MAX_NAME, MAX_PATH = 255, 4095  # bytes, the limits of Linux


def new_app(**settings: Any) -> typer.Typer:
    """A group of commands. Help is plain text, which takes a tenth of a second, and is what is shown without arguments.

    Args:
        **settings: as of Typer.
    """
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
        **settings,
    )


def examples(*lines: str) -> str:
    """Examples as the end of a command's help, each in its own line."""
    head = "example: " if len(lines) == 1 else "examples: "
    return "\b\n" + "\n".join(f"{head if i == 0 else ' ' * len(head)}{line}" for i, line in enumerate(lines))


def path(text: str | Path) -> Path:
    """A path of a file or folder, which need not exist. ``~`` and ``$NAME`` are expanded."""
    if "\0" in str(text):
        raise typer.BadParameter(f"{text!r} has a NUL character, which no path has")
    text = path_text(str(text))
    encoded = os.fsencode(text)
    if max(map(len, encoded.split(b"/"))) > MAX_NAME or len(encoded) > MAX_PATH:
        raise typer.BadParameter(f"{text[:MAX_SHOWN]!r}... is too long for a path")
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


def count_up_to(most: int) -> Callable[[str | int], int]:
    """The parser of whole numbers from 1 to ``most``."""

    def count(text: str | int) -> int:
        text = str(text)
        digits = text.lstrip("0")
        if (
            not (text.isascii() and text.isdecimal())
            or not digits
            or len(digits) > len(str(most))
            or int(digits) > most
        ):
            given = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
            raise typer.BadParameter(f"{given!r} is not a whole number from 1 to {most}")
        return int(digits)

    return count


count = count_up_to(MAX_STEPS)


class Words(tuple[str, ...]):
    """Words that were separated by commas."""


class Depths(tuple[int, ...]):
    """Numbers of blocks that were separated by commas."""


def words(text: str | Words) -> Words:
    """Words, separated by commas."""
    return text if isinstance(text, Words) else Words(part.strip() for part in text.split(","))


def depths(text: str | Depths) -> Depths:
    """Numbers of blocks, separated by commas."""
    return text if isinstance(text, Depths) else Depths(map(count_up_to(MAX_BLOCKS), text.split(",")))


def size(text: str | int) -> int:
    """A number of bytes.

    >>> size("1GB"), size("1.5 GiB"), size("4096"), size("80G")
    (1000000000, 1610612736, 4096, 80000000000)
    """
    try:
        return bytes_of_size(str(text))
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def memory(text: str | int) -> int:
    """A ``size`` that some tensors fit into."""
    num_bytes = size(text)
    if num_bytes < 64 * 10**6:
        raise typer.BadParameter(f"{text!r} is too little; give at least 64MB")
    return num_bytes


def number(text: str | float) -> float:
    """A number; -1 where it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0


def share(text: str | float) -> float:
    """A number from 0 to 1."""
    if not 0.0 <= number(text) <= 1.0:
        raise typer.BadParameter(f"{text!r} is not a share from 0 to 1")
    return number(text)


def _keys(incomplete: str) -> list[str]:
    """Settings that an override may begin with, for completion in a shell."""
    from megaresnorm.recipe.explain import recipe_keys

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...",
        help="settings that replace those of the file, anywhere on the line",
        autocompletion=_keys,
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", parser=path, metavar="FILE", help="write every figure here (- prints it)")
]
CHECKPOINT_OR_RUN = "a checkpoint, or the output folder of a run: its newest one"
CheckpointFolder = Annotated[Path, typer.Argument(parser=path, metavar="CHECKPOINT", help=CHECKPOINT_OR_RUN)]
RunFolder = Annotated[Path, typer.Argument(parser=path, metavar="RUN", help="output folder of a run")]
NewFolder = Annotated[Path, typer.Argument(parser=path, metavar="OUT", help="folder to make")]
EndToken = Annotated[
    str | None,
    typer.Option(metavar="TOKEN", help="token of a tokenizer.json that ends documents; unset: the one its files name"),
]


def write_json(file: Path, value: Any) -> None:
    """Write what --json names; - is standard output.

    Raises:
        ConfigError: it cannot be written.
    """
    from megaresnorm.text import write

    text = json.dumps(value, indent=1) + "\n"
    if str(file) == "-":
        write(text)
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--json {file}: cannot be written ({e.strerror})") from None
    except ValueError:
        raise ConfigError(f"--json {file}: cannot be written (no file can have this name)") from None


def check_json(file: Path | None) -> None:
    """Check that what --json names can be written: said now rather than after the work. A file that is there stays.

    Raises:
        ConfigError: it cannot.
    """
    if file is None or str(file) == "-":
        return
    try:
        there = file.exists()
        if file.is_dir() or file.is_file() or not there:  # opening a pipe would end its reader
            file.open("a").close()
        if not there:
            file.unlink()
    except OSError as e:
        raise ConfigError(f"--json {file}: cannot be written ({e.strerror})") from None


def report(json_file: Path | None, value: Any, *tables: Any) -> None:
    """Print tables, and write what --json names; JSON that goes to standard output stands there alone.

    Args:
        value: lists, dictionaries and figures.
        tables: whatever rich prints.

    Raises:
        ConfigError: the file cannot be written.
    """
    from megaresnorm.telemetry.log import console

    if json_file is None or str(json_file) != "-":
        for table in tables:
            console.print(table)
    if json_file is not None:
        write_json(json_file, value)
