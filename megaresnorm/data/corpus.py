"""Documents of text files, JSON lines (also compressed), Parquet, Hugging Face data sets and the built-in corpora."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaresnorm.data.english import BOOKS, english_chapters
from megaresnorm.data.hub import HUB, HubData, optional
from megaresnorm.data.sources import Kind, Source, kind_of, opened
from megaresnorm.errors import DataError
from megaresnorm.reading import LFS_POINTER, open_plain_file, refuse_pointer

PIECE_CHARACTERS = 1 << 20  # a longer document is handed on in pieces that end with a line, so that memory is bounded
# Bytes of a line of JSON, whose values take up to twenty times that in memory; or characters of a document.
MAX_DOCUMENT = 1 << 26
# A file may expand to EXPANSION times its size, and to EXPANSION_FREE bytes in any case. What compresses to a
# thousandth is no text, and a few bytes of it could fill memory or disk.
EXPANSION, EXPANSION_FREE = 1000, 1 << 28
BATCH_ROWS = 256  # rows of a Parquet file that are read at a time, fewer where they could exceed BATCH_BYTES together
BATCH_BYTES = 1 << 31  # for a small file the limit is lower, a multiple of its size: see _batch_rows
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_pieces(source: Source, text_key: str) -> Iterator[tuple[str, bool]]:
    """Read the documents of a source in pieces. Empty documents are left out.

    Args:
        source: file or data set to read.
        text_key: key or column that holds the text, where the source has rows.

    Yields:
        (text, whether the document ends with it).

    Raises:
        DataError: damage, text that is not UTF-8, or a missing ``text_key``; names the file and the line, row or byte.
    """
    path = Path(source.name)
    reader = (kind_of(path.name) or Kind("text")).reader
    try:
        if source.name.startswith(HUB):
            documents = _hub_rows(source.name, text_key)
        elif path.name in BOOKS:
            documents = english_chapters(path)
        else:
            _refuse_pointer(path)
            if reader == "text":
                yield from _text_pieces(path, max(EXPANSION_FREE, EXPANSION * source.num_bytes))
                return
            documents = _parquet_rows(path, text_key) if reader == "parquet" else _json_lines(path, text_key)
        produced, allowed = 0, max(EXPANSION_FREE, EXPANSION * source.num_bytes)
        for text in documents:
            produced += len(text) + 1
            if source.num_bytes and produced > allowed:
                raise _expands(source.name)
            if text:
                yield from _cut(text)
    except UnicodeDecodeError as e:
        raise DataError(f"{source.name}: not UTF-8 text (byte {e.start}); convert it first") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"{source.name}: not a whole gzip file ({e}); was it cut off?") from None
    except OSError as e:
        raise DataError(f"{source.name}: cannot be read ({e.strerror or e})") from None


def read_documents(source: Source, text_key: str) -> Iterator[str]:
    """Read the documents of a source, each as a whole.

    Raises:
        DataError: as in ``read_pieces``.
    """
    parts: list[str] = []
    for text, ends in read_pieces(source, text_key):
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most about PIECE_CHARACTERS that end with a line where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _refuse_pointer(path: Path) -> None:
    with open(open_plain_file(path), "rb") as file:
        refuse_pointer(file.read(len(LFS_POINTER)))


def _expands(name: str) -> DataError:
    return DataError(
        f"{name}: its text is over {EXPANSION:,} times as large as the file, which no text is; leave it out"
    )


def _text_pieces(path: Path, allowed: int) -> Iterator[tuple[str, bool]]:
    """Read a text file, which is one document, however long. It is never in memory as a whole.

    A byte order mark at its start is not part of the text.

    Args:
        allowed: bytes that a compressed file may expand to.
    """
    at, waiting = 0, ""
    compressed = bool((kind_of(path.name) or Kind("")).compression)
    try:
        with opened(path) as file:
            held = b""  # bytes of a character that the next read completes
            while block := file.read(PIECE_CHARACTERS):
                data = held + block
                cut = _end_of_characters(data)
                waiting += data[:cut].decode("utf-8").removeprefix("\ufeff" if at == 0 else "")
                if compressed and at + cut > allowed:
                    raise _expands(str(path))
                at, held = at + cut, data[cut:]
                *whole, (waiting, _) = _cut(waiting)
                yield from whole
            waiting += held.decode("utf-8")
    except UnicodeDecodeError as e:
        how = "iconv -f UTF-16 -t UTF-8" if e.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "iconv -t UTF-8"
        raise DataError(f"{path}: not UTF-8 text (byte {at + e.start}); convert it first ({how})") from None
    if waiting:
        yield waiting, True


def _end_of_characters(data: bytes) -> int:
    """Where the last whole UTF-8 character of ``data`` ends: before a first byte that wants more than follow it."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            wanted = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if wanted <= back else len(data) - back
    return len(data)


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), b""), start=1):
            if len(line) > MAX_DOCUMENT:
                raise DataError(
                    f"{path}:{number}: a line of over {MAX_DOCUMENT >> 20} MiB, which must be in memory as a whole; "
                    "divide it, or put the text into a .txt file"
                )
            if line.strip():
                yield _text_of(line, text_key, f"{path}:{number}")


def _text_of(line: bytes, text_key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text (byte {e.start} of the line); convert it first") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: wanted a JSON object, got a {type(value).__name__}")
    return _checked(value.get(text_key), list(value), text_key, where)


def _checked(text: Any, keys: list[str], text_key: str, where: str) -> str:
    if text is None and text_key in keys:
        raise DataError(f"{where}: its {text_key!r} is null")
    if text is not None and not isinstance(text, str):
        what = {dict: "an object", list: "a list", bool: "true or false"}.get(type(text), "a number")
        raise DataError(f"{where}: its {text_key!r} is {what}, not a text (see --text-key)")
    if text is None:
        raise DataError(
            f"{where}: no text under {text_key!r}; its keys are {', '.join(sorted(keys)) or 'none'} (see --text-key)"
        )
    if len(text) > MAX_DOCUMENT:
        raise DataError(f"{where}: a document of over {MAX_DOCUMENT >> 20} Mi characters; divide it")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{where}: its text has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return text


def _parquet_rows(path: Path, text_key: str) -> Iterator[str]:
    parquet = optional("pyarrow.parquet", f"{path}: .parquet")
    pyarrow = optional("pyarrow", f"{path}: .parquet")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_key not in columns:
                raise DataError(
                    f"{path}: no column {text_key!r}; its columns are {', '.join(columns) or 'none'} (see --text-key)"
                )
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                count = _batch_rows(about, text_key, path.stat().st_size, f"{path}: row group {group + 1}")
                for batch in file.iter_batches(batch_size=count, row_groups=[group], columns=[text_key]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        yield _checked(text, columns, text_key, f"{path}: row {row}")
    except pyarrow.ArrowException as e:
        raise DataError(f"{path}: not a whole Parquet file ({str(e).splitlines()[0]})") from None


def _batch_rows(group: Any, text_key: str, file_bytes: int, where: str) -> int:
    """Number of rows of a row group to read at a time.

    Each row may be as large as all pages together: one value of a dictionary, repeated.

    Raises:
        DataError: the pages themselves are much larger than they are on disk.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [c for c in chunks if c.path_in_schema == text_key or c.path_in_schema.startswith(f"{text_key}.")]
    size = sum(c.total_uncompressed_size for c in chunks)
    stored = min(file_bytes, sum(c.total_compressed_size for c in chunks))
    if size > max(EXPANSION_FREE, EXPANSION * stored):
        raise DataError(f"{where} expands to over {EXPANSION:,} times its size ({size:,} bytes), which no text does")
    allowed = min(BATCH_BYTES, max(EXPANSION_FREE // 4, EXPANSION * stored))
    return min(BATCH_ROWS, max(1, allowed // max(1, size)))


def _hub_rows(name: str, text_key: str) -> Iterator[str]:
    """Stream the documents of a Hugging Face data set. Local files that need no ``datasets`` are read without it."""
    data = HubData(name)
    files = data.files() if data.is_local else []
    kinds = [kind_of(file.name) for file in files]
    if files and all(kind is not None and kind.reader != "text" for kind in kinds):
        for file in files:
            parquet = file.name.lower().endswith(".parquet")
            yield from _parquet_rows(file, text_key) if parquet else _json_lines(file, text_key)
        return
    for number, row in enumerate(data.rows()):
        yield _checked(row.get(text_key), list(row), text_key, f"{name}: row {number}")
