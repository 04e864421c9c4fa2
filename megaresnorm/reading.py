"""Reading small files whole from paths that anybody may have given: a pipe, a device or a sparse terabyte is refused, not read."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from megaresnorm.files import open_plain


def read_plain_file(path: str | Path, max_bytes: int, *, follow: bool = True) -> bytes:
    """The content of a plain file of at most ``max_bytes``.

    follow: whether the path may be a link to such a file, as in the cache of Hugging Face.
    Raises: OSError, whose ``strerror`` says in a few words why it cannot be read.
    """
    descriptor = open_plain_file(path, follow=follow)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {max_bytes:,} are read")
        return file.read(size)


def open_plain_file(path: str | Path, *, follow: bool = True) -> int:
    """A descriptor for reading. Raises: OSError for what is not there or not a plain file."""
    return open_plain(path, os.O_RDONLY, follow=follow)


def read_json_object(path: str | Path, max_bytes: int, max_values: int, *, follow: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds.

    max_values: by its brackets and commas; in memory a value takes up to twenty times its bytes.
    Raises: OSError as ``read_plain_file``, ValueError with the reason in one line for what is no such object.
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
    """What a library says, as far as it goes into a line of ours; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:length] if text else type(error).__name__
