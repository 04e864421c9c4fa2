"""Reading small files whole from paths of any origin: a pipe, a device or a sparse terabyte is refused, not read."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from megaresnorm.files import open_plain


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
        return file.read(size)


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
