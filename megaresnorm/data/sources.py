"""The files of a corpus: found, and accounted for. Nothing in a folder is passed over in silence."""

import gzip
import io
import json
import logging
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megaresnorm.data.dataset import content_digest
from megaresnorm.data.english import fetch_english
from megaresnorm.data.hub import HUB, hub_address, optional
from megaresnorm.errors import DataError

log = logging.getLogger(__name__)

_READERS = {".txt": "text", ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json", ".json": "json",
            ".parquet": "parquet"}  # fmt: skip
COMPRESSED = (".gz", ".zst")
SUFFIXES = ".txt, .jsonl, .ndjson, .json (a document a line; all of these also .gz and .zst), .parquet"
IDENTITY_BYTES = 1 << 28  # of a file, spread evenly, by which a changed one is recognised
NAMES_TOLD = 8  # of the files that are passed over for one reason
_FIRST_LINE_BYTES = 1 << 16
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


class Kind(NamedTuple):
    """How a file is read.

    Attributes:
        reader: text, json (a document a line) or parquet.
        compression: one of COMPRESSED, or empty.
    """

    reader: str
    compression: str = ""


@dataclass(frozen=True)
class Source:
    """One file of a corpus, or one data set of Hugging Face.

    Attributes:
        name: path of the file, or hf:NAME.
        num_bytes: size on disk; 0 where it is not known.
    """

    name: str
    num_bytes: int = 0

    @property
    def identity(self) -> list:
        """Path and digest of the content of its files, by which a changed source is recognised."""
        if self.name.startswith(HUB):
            folder = Path(hub_address(self.name)[0])
            files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else []
            return [self.name, *([str(p), *_identity(p)] for p in files)]
        path = Path(self.name)
        return [str(path.resolve()), *_identity(path)]


def _identity(path: Path) -> list:
    """Digest of the content of a file; of a large one, of which parts alone are read, also when it was changed."""
    status = path.stat()
    large = [status.st_mtime_ns] if status.st_size > IDENTITY_BYTES else []
    return [content_digest(path, max_bytes=IDENTITY_BYTES), *large]


def kind_of(name: str) -> Kind | None:
    """How a file of this name is read; None for one of no known kind.

    >>> kind_of("part-0.JSON.gz"), kind_of("a.csv")
    (Kind(reader='json', compression='.gz'), None)
    """
    compression = next((suffix for suffix in COMPRESSED if name.lower().endswith(suffix)), "")
    stem = name.lower().removesuffix(compression)
    reader = next((reader for suffix, reader in _READERS.items() if stem.endswith(suffix)), None)
    return None if reader is None or (compression and reader == "parquet") else Kind(reader, compression)


def find_sources(corpus: str | None, paths: Sequence[str], tell: Callable[[str], None] = log.warning) -> list[Source]:
    """The sources of a built-in corpus, or of ``paths``, in a fixed order.

    Args:
        corpus: name of a built-in corpus; None to read ``paths``.
        paths: files, folders (searched for files of the known kinds) and hf:NAME.
        tell: is called with a line for every reason why files of a folder are passed over; it names them.

    Raises:
        ConfigError: a name that begins with hf: has another form than hf:NAME[:CONFIG[:SPLIT]].
        DataError: a path does not exist, is of no known kind, or holds nothing.
    """
    if corpus == "stdlib":
        return _stdlib_files()
    if corpus == "english":
        return [_source(path) for path in fetch_english()]
    found: list[Source] = []
    seen: set[str] = set()
    for name in paths:
        if name.startswith(HUB):
            hub_address(name)
            found.append(Source(name))
            continue
        try:
            path = Path(name)
            there = _in_folder(path, tell) if path.is_dir() else [_file_at(path)]
            new = {os.path.realpath(file): file for file in reversed(there)}
            again = [
                file for file in there if new[os.path.realpath(file)] is not file or os.path.realpath(file) in seen
            ]
            if again:
                tell(
                    f"{name}: passed over {len(again):,} that were read already: {some([str(file) for file in again])}"
                )
            found += [_source(file) for file in there if file not in again]
            seen |= new.keys()
        except (OSError, ValueError) as e:
            raise DataError(f"{name}: cannot be read ({getattr(e, 'strerror', e)})") from None
    return found


def opened(path: Path) -> Any:  # a binary file, of whichever package
    """Open a file for reading, decompressed.

    Raises:
        DataError: what decompresses it is not installed.
        OSError: it cannot be opened.
    """
    compression = (kind_of(path.name) or Kind("")).compression
    if compression and path.stat().st_size == 0:
        raise OSError(0, "it is empty, which no compressed file is; was it cut off?")
    if compression == ".gz":
        return gzip.open(path, "rb")
    if compression == ".zst":
        pyarrow = optional("pyarrow", f"{path}: .zst")
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _source(path: Path) -> Source:
    return Source(str(path), path.stat().st_size)


def _file_at(path: Path) -> Path:
    if not os.path.lexists(path):
        raise DataError(
            f"{path}: no such file or folder; give {SUFFIXES}, folders of such files, or hf:NAME for a data set of "
            "Hugging Face"
        )
    if kind_of(path.name) is None:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; wanted {SUFFIXES}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path}: cannot be read (it is not a plain file)")
    return path


def _in_folder(folder: Path, tell: Callable[[str], None]) -> list[Path]:
    """The files of a folder that can be read, in the order of their paths; the others are told."""
    read: list[Path] = []
    left: dict[str, list[str]] = {}
    for path, why in sorted(_looked_at(folder)):
        if why:
            left.setdefault(why, []).append(str(path.relative_to(folder)) + "/" * (path.is_dir() and why != ""))
        else:
            read.append(path)
    told = [f"{len(names):,} {why}: {some(names)}" for why, names in sorted(left.items())]
    if not read:
        has = f"what is in it was passed over ({'; '.join(told)})" if told else "it is empty"
        raise DataError(f"{folder}: no text in the folder, {has}; wanted {SUFFIXES}")
    for line in told:
        tell(f"{folder}: passed over {line}")
    return read


def some(names: Sequence[str]) -> str:
    """The first NAMES_TOLD names, and how many more there are."""
    more = f" and {len(names) - NAMES_TOLD:,} more" if len(names) > NAMES_TOLD else ""
    return ", ".join(names[:NAMES_TOLD]) + more


def _looked_at(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below a folder, and every folder that is not entered, with the reason why it is passed over."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    for here, folders, files in os.walk(folder, onerror=fail):
        for name in list(folders):
            path = Path(here, name)
            if name.startswith(".") or path.is_symlink():
                yield path, "hidden" if name.startswith(".") else "linked (a folder; give it by itself)"
                folders.remove(name)
        for name in files:
            yield Path(here, name), _why_not(Path(here, name))


def _why_not(path: Path) -> str:
    """Why a file in a folder is passed over; empty where it is read."""
    if path.name.startswith("."):
        return "hidden"
    try:
        status = path.stat()
    except OSError:
        return "linked (to nothing)"
    if not stat.S_ISREG(status.st_mode):
        return "not plain files"
    kind = kind_of(path.name)
    if kind is None:
        return f"of kind {path.suffix.lower()}" if path.suffix else "without a suffix"
    if status.st_size == 0 and not kind.compression:
        return "empty"
    if kind.reader == "json" and ".json" in path.suffixes[-2:] and not _has_lines(path):
        return "of kind .json without a document a line"
    return ""


def _has_lines(path: Path) -> bool:
    """Whether the first line of a .json is a whole object. Where that cannot be told, reading it says why not."""
    try:
        with opened(path) as file:
            line = file.read(_FIRST_LINE_BYTES).lstrip().partition(b"\n")[0]
        return isinstance(json.loads(line), dict)
    except (OSError, EOFError, zlib.error, DataError):
        return True
    except (ValueError, RecursionError):
        return len(line) == _FIRST_LINE_BYTES and line.startswith(b"{")


def _stdlib_files() -> list[Source]:
    """Library sources of the running Python: those written by people, in UTF-8, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file():
            try:
                num_bytes = len(path.read_text(encoding="utf-8").encode())
            except (UnicodeDecodeError, OSError):
                continue
            if num_bytes:
                files.append(Source(str(path), num_bytes))
    if not files:
        raise DataError(f"{root}: this Python has no library sources; give text files instead of --corpus stdlib")
    return files
