"""Documents out of text files, JSON lines and the built-in corpus."""

import json
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.errors import DataError

BUILT_IN = ("stdlib",)
SUFFIXES = (".txt", ".jsonl")
_SURROGATE = re.compile("[\ud800-\udfff]")
# Installed packages, tests, and sources that are generated tables: code pages (encodings) and help topics (pydoc_data).
_SKIPPED_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus. A .jsonl file has a document a line, any other file is one document."""

    path: Path
    num_bytes: int


def find_files(corpus: str | None, paths: Sequence[str]) -> list[SourceFile]:
    """The files of a built-in corpus, or of files and folders (searched for .txt and .jsonl), in a fixed order.

    Raises: DataError for a path that does not exist, is not text, or holds nothing.
    """
    if corpus is not None:
        return _stdlib_files()
    found: list[SourceFile] = []
    for name in paths:
        try:
            found += [SourceFile(p, p.stat().st_size) for p in _text_files(Path(name))]
        except (OSError, ValueError) as e:
            raise DataError(f"{name}: cannot be read ({getattr(e, 'strerror', e)})") from None
    return found


def _text_files(path: Path) -> list[Path]:
    """The file itself, or the text files of a folder."""
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not inside:
            raise DataError(f"{path}: the folder has no {' or '.join(SUFFIXES)} file")
        return inside
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give text files, .jsonl files or folders of them")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; wanted {' or '.join(SUFFIXES)}")
    return [path]


def read_documents(file: SourceFile, text_key: str) -> Iterator[str]:
    """The documents of one file, empty ones left out.

    Raises: DataError naming file and line or byte, for text that is not UTF-8, a line that is not a JSON object, or one
    without a string under ``text_key``.
    """
    try:
        if file.path.suffix == ".jsonl":
            with file.path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield from filter(None, [_text_of(line, text_key, f"{file.path}:{number}")])
        else:
            yield from filter(None, [file.path.read_bytes().decode("utf-8")])
    except UnicodeDecodeError as e:
        raise DataError(f"{file.path}: not UTF-8 text (byte {e.start}); convert it first") from None
    except OSError as e:
        raise DataError(f"{file.path}: cannot be read ({e.strerror})") from None


def _text_of(line: bytes, text_key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text (byte {e.start} of the line); convert it first") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted a JSON object, got a {type(value).__name__}")
    text = value.get(text_key)
    if not isinstance(text, str):
        raise DataError(
            f"{where}: no text under {text_key!r}; its keys are {', '.join(sorted(value)) or 'none'} (see --text-key)"
        )
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{where}: its text has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return text


def _stdlib_files() -> list[SourceFile]:
    """The running Python's own library sources that people wrote, without tests; those that are not UTF-8 are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file():
            try:
                num_bytes = len(path.read_text(encoding="utf-8").encode())
            except (UnicodeDecodeError, OSError):
                continue
            if num_bytes:
                files.append(SourceFile(path, num_bytes))
    if not files:
        raise DataError(f"{root}: this Python has no library sources; give text files instead of --corpus stdlib")
    return files
