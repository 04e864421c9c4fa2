"""Reading small files whole from paths of any origin: a pipe, a device or a sparse terabyte is refused, not read."""

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

from megaresnorm.files import open_plain
from megaresnorm.limits import MAX_SHOWN

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_UNITS = {"": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate(["", "K", "M", "G", "T"])}
_UNITS |= {prefix: 1000**n for n, prefix in enumerate(["K", "M", "G", "T"], start=1)}
_UNITS |= {f"{prefix}IB": 1024**n for n, prefix in enumerate(["K", "M", "G", "T"], start=1)}
_VARIABLE = re.compile(r"\$\{?(\w+)", re.ASCII)


def read_plain_file(path: str | Path, max_bytes: int, *, follow: bool = True) -> bytes:
    """Read a plain file of at most ``max_bytes``.

    Args:
        follow: whether the path may be a link to such a file, as in the cache of Hugging Face.

    Raises:
        OSError: it cannot be read; ``strerror`` says why in a few words.
    """
    descriptor = open_plain_file(path, follow=follow)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {max_bytes:,} are read")
        content = file.read(size)
    refuse_pointer(content)
    return content


def refuse_pointer(start: bytes) -> None:
    """Refuse a pointer of Git LFS: a clone without LFS has one in the place of every large file.

    Args:
        start: of a file's content, at least LFS_POINTER's length of it.

    Raises:
        OSError: it is one.
    """
    if start.startswith(LFS_POINTER):
        raise OSError(errno.EINVAL, "it is a pointer of Git LFS; fetch the file itself with git lfs pull")


def expanded(path: str) -> str:
    """A path as a shell would expand it: ``~`` is a home folder, ``$NAME`` and ``${NAME}`` are variables.

    Raises:
        ValueError: it or a variable is empty or not set, a $ is left, or there is no such home folder; says which.
    """
    if not path:
        raise ValueError("'': cannot be read or written (the path is empty)")
    found = os.path.expanduser(path)
    if found.startswith("~") and not os.path.lexists(found.split("/")[0]):
        raise ValueError(f"{path}: there is no home folder {path.split('/')[0]}; write the path out")
    for name in _VARIABLE.findall(found):
        if not os.environ.get(name):
            raise ValueError(f"{path}: the variable ${name} is not set; set it, or write the path out")
    found = os.path.expandvars(found)
    if "$" in found:
        raise ValueError(f"{path}: a $ is of no variable's name; write the path out without it")
    return found


def is_beside(path: str) -> bool:
    """Whether a path begins with . or .. as a folder: in a recipe's file it is then relative to that file."""
    return path.split("/")[0] in (".", "..")


def open_plain_file(path: str | Path, *, follow: bool = True) -> int:
    """Open a plain file for reading, and return its descriptor.

    Raises:
        OSError: it is not there, or not a plain file.
    """
    return open_plain(path, os.O_RDONLY, follow=follow)


def read_json_object(path: str | Path, max_bytes: int, max_values: int, *, follow: bool = True) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        max_values: limit on values, counted by brackets and commas: in memory one takes up to twenty times its bytes.
        follow: as in ``read_plain_file``.

    Raises:
        OSError: as in ``read_plain_file``.
        ValueError: it is no such object; says why in one line.
    """
    raw = read_plain_file(path, max_bytes, follow=follow)
    if sum(map(raw.count, (b"{", b"[", b","))) > max_values:
        raise ValueError(f"it has over {max_values:,} values; not such a file")
    try:
        value = json.loads(raw)
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
    except ValueError as e:
        raise ValueError(f"not JSON ({first_line(e)})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but a {type(value).__name__}")
    return value


def first_line(error: BaseException, length: int = 200) -> str:
    """First line of a library's error, cut to ``length`` characters; its class where it has no text."""
    text = str(error).strip()
    return text.splitlines()[0][:length] if text else type(error).__name__


def bytes_of_size(text: str) -> int:
    """The number of bytes that a text means.

    Raises:
        ValueError: it means none.

    >>> bytes_of_size("1GB"), bytes_of_size("1.5 GiB"), bytes_of_size("4096"), bytes_of_size("80G")
    (1000000000, 1610612736, 4096, 80000000000)
    """
    number = text.strip().rstrip("BbKkMmGgTtIi ").strip()
    unit = text.strip()[len(number) :].strip().upper()
    try:
        num_bytes = float(number) * _UNITS[unit]
    except (ValueError, KeyError):
        num_bytes = 0.0
    if not 1 <= num_bytes < 2**60:
        raise ValueError(f"{text[:MAX_SHOWN]!r} is not a size such as 500MB, 4GB or 2GiB")
    return int(num_bytes)
