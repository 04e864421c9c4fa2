"""Writing files where somebody else may have put something: no link is followed, and nothing is left half written."""

import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

BEING_WRITTEN = ".new-"  # prefix of the names of files that are being written


def open_plain(path: str | Path, flags: int, mode: int = 0o666, *, follow: bool = False) -> int:
    """Open a plain file as ``os.open`` does, without waiting for a pipe.

    Args:
        follow: whether a link in its place is followed.

    Returns:
        Its descriptor.

    Raises:
        OSError: it cannot be opened, or is not a plain file.
    """
    try:
        descriptor = os.open(path, flags | (0 if follow else os.O_NOFOLLOW) | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except ValueError:  # a NUL, or half of a surrogate pair
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link stands in its place, which is not followed", str(path)) from None
        raise
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        reason = "it is a folder" if stat.S_ISDIR(kind) else "it is not a plain file"
        raise OSError(errno.EINVAL, reason, str(path))
    return descriptor


def replace_file(path: Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write a file in the place of what stands at ``path``, whole or not at all. A link is replaced, not followed.

    Raises:
        OSError: it cannot be written; what stood there is then untouched.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    temporary = path.with_name(f"{BEING_WRITTEN}{secrets.token_hex(8)}")
    descriptor = open_plain(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes killed inside ``replace_file`` have left in a folder that nobody else is writing to.

    Raises:
        OSError: a file cannot be removed.
    """
    for path in folder.glob(f"{BEING_WRITTEN}*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()
