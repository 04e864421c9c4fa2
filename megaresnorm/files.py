"""Writing files where somebody else may have put something: no link is followed, and nothing is left half written."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BEING_WRITTEN = ".new-"  # prefix of the names of files that are being written
UNFINISHED = ".tmp-"  # of folders that are being written
REPLACED = ".old-"  # of folders whose successors are being put in their places
_UNIQUE = re.compile("[0-9a-f]{16}")


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


def occupied(out: Path) -> bool:
    """Whether something stands at ``out``, or where it leads as a link, that a new folder would replace.

    An empty folder does not count.
    """
    target = Path(os.path.realpath(out))
    return os.path.lexists(target) and not (target.is_dir() and next(target.iterdir(), None) is None)


@contextmanager
def new_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when all has gone well, and vanishes when it has not.

    Args:
        out: nothing, an empty folder, or a link to one of these: the link then stays, and what it leads to is made.
        replace: it may be a folder that is not empty, which stays until the new one is complete.

    Raises:
        FileExistsError: something is there that may not be replaced.
        OSError: it cannot be written, or is a folder that cannot be replaced: a mount point, the working directory.
    """
    out = Path(os.path.realpath(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep_beside(out)
    _refuse_occupied(out, replace)
    unique = secrets.token_hex(8)
    temporary, before = (out.with_name(f"{kind}{out.name}-{unique}") for kind in (UNFINISHED, REPLACED))
    temporary.mkdir()
    with _held(temporary):
        try:
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                sync(path)
            _refuse_occupied(out, replace)
            _put_in_place(temporary, out, before)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _put_in_place(temporary: Path, out: Path, before: Path) -> None:
    if not occupied(out):
        os.rename(temporary, out)
        return sync(out.parent)
    with _held(out):
        try:
            os.rename(out, before)
            os.rename(temporary, out)
        except BaseException:  # a signal, too
            if before.exists() and not out.exists():
                os.rename(before, out)
            raise
        sync(out.parent)
        shutil.rmtree(before, ignore_errors=True)
    return None


def _refuse_occupied(out: Path, replace: bool) -> None:
    if not os.path.lexists(out):
        return
    if occupied(out) and not (replace and out.is_dir()):
        raise FileExistsError(errno.EEXIST, "it exists already", str(out))
    if os.path.ismount(out) or out.stat().st_dev != out.parent.stat().st_dev:
        raise OSError(errno.EBUSY, "it is a mount point, which cannot be replaced; give a folder in it", str(out))
    if out.samefile("."):
        raise OSError(errno.EBUSY, "it is the working directory, which cannot be replaced; give another", str(out))


def sweep_beside(out: Path) -> None:
    """Remove what killed processes have left of ``new_folder``; put back what they were about to replace.

    A folder that a process is at work in is locked. Where folders cannot be locked, what is left stays.

    Raises:
        OSError: the folder of ``out`` cannot be read.
    """
    out = Path(os.path.realpath(out))
    for left in sorted(out.parent.iterdir()) if out.parent.is_dir() else []:
        for kind in (UNFINISHED, REPLACED):
            unique = left.name.removeprefix(f"{kind}{out.name}-")
            if unique == left.name or not _UNIQUE.fullmatch(unique) or left.is_symlink() or not left.is_dir():
                continue
            with suppress(FileNotFoundError), _held(left) as ours:  # another one may sweep as well
                if ours and kind == REPLACED and not os.path.lexists(out):
                    os.rename(left, out)
                elif ours:
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Lock a folder, by which others see that its process is alive, whatever it is called in their containers.

    Yields:
        False where another process holds it, or where folders cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to disk.

    Raises:
        OSError: it cannot be.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
