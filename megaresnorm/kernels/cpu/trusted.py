"""Files that are loaded as code: kept where nobody else can write, used only when complete, and read once.

The folder is opened from / downwards, each folder checked through the descriptor by which the next one is opened, and
its content is reached through its own descriptor: another folder that is put under the same path later is never seen.
The bytes that are loaded are the very ones whose digest was right (``in_memory``), not those of a second read.
"""

import contextlib
import errno
import fcntl
import grp
import hashlib
import os
import pwd
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

POLL_SECONDS = 0.05  # between two tries to get the lock: short beside the seconds that compiling takes
ADVICE = "set MEGARESNORM_CACHE to a folder of yours"
_TEMPORARY = ".tmp"
_Loaded = TypeVar("_Loaded")
_SEARCH = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC  # homes may be unreadable


class BuildError(Exception):
    """There is no library; the message says why."""


class Scratch(NamedTuple):
    """An empty folder of one process.

    Attributes:
        descriptor: open on the folder.
        path: absolute, never used before.
    """

    descriptor: int
    path: str


def open_folder(path: Path) -> int:
    """Open a folder that other users cannot change, nor any folder above it. It is made where it is missing.

    Symbolic links in ``path`` are resolved first.

    Returns:
        The folder's descriptor, which the caller closes.
    Raises:
        BuildError: another user owns the folder or one above, or may write to it.
        OSError: it cannot be made or opened.
    """
    at = "/"
    descriptor = os.open(at, _SEARCH)
    try:
        _check_above(descriptor, at)
        for part in Path(os.path.realpath(path)).parts[1:]:
            at = os.path.join(at, part)
            below = _open_or_make(part, descriptor)
            os.close(descriptor)
            descriptor = below
            _check_above(descriptor, at)
        if not _is_mine(os.fstat(descriptor)):
            raise BuildError(f"others can write to {at}; {ADVICE}")
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def read(folder: int, name: str) -> bytes | None:
    """Read a file that ``write`` has written.

    Returns:
        None if it is missing, incomplete, changed, or could be another user's.
    """
    content = _content(folder, name)
    return content if content is not None and _content(folder, _digest_name(name)) == _digest(content) else None


def write(folder: int, name: str, content: bytes) -> None:
    """Write a file and its digest, synced to the disk before they get their names. The caller holds the lock.

    Raises:
        OSError: the file system refuses.
    """
    with scratch(folder, "") as (temporary, _):
        files = {name: content, _digest_name(name): _digest(content)}
        for file, data in files.items():
            write_new(temporary, file, data)
        for file in files:
            os.rename(file, file, src_dir_fd=temporary, dst_dir_fd=folder)
    # Some file systems cannot sync folders. There the digest shows after a power cut whether the file is complete.
    with contextlib.suppress(OSError):
        os.fsync(folder)


def write_new(folder: int, name: str, content: bytes) -> None:
    """Write a new file and sync it to the disk.

    Raises:
        OSError: the file exists, or the file system refuses.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(name, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def take(folder: int, name: str) -> bytes:
    """Read what a program that we ran has just left in a scratch folder.

    Raises:
        BuildError: there is no such file, or another user could have written it.
    """
    content = _content(folder, name)
    if content is None:
        raise BuildError(f"{name} was not written")
    return content


@contextlib.contextmanager
def locked(
    folder: int, deadline: float, what: str = "the C kernels", waits: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the folder's lock, so that no other process works in it, and remove what killed processes left.

    Args:
        deadline: of time.monotonic(); ends the wait for the lock.
        what: is compiled under the lock.
        waits: called once, where another process holds the lock.
    Raises:
        BuildError: another process held the lock until the deadline.
        OSError: the lock cannot be opened, or leftovers cannot be removed.
    """
    lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        waited = False
        while not _try_lock(lock):
            if time.monotonic() > deadline:
                raise BuildError(f"another process is compiling {what} and does not end; end it and start again")
            if not waited:
                waits()
            waited = True
            time.sleep(POLL_SECONDS)
        for name in os.listdir(folder):  # left by processes that were killed: who works here holds the lock
            if name.endswith(_TEMPORARY):
                _remove(folder, name)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def scratch(folder: int, path: str | Path) -> Iterator[Scratch]:
    """Make an empty folder inside ``folder`` and remove it at the end. The caller holds the lock.

    Args:
        path: of ``folder`` itself.
    Raises:
        OSError: it cannot be made or removed.
    """
    name = secrets.token_hex(8) + _TEMPORARY
    os.mkdir(name, 0o700, dir_fd=folder)
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        yield Scratch(descriptor, os.path.join(os.path.realpath(path), name))
    finally:
        os.close(descriptor)
        _remove(folder, name)


def opened(
    content: bytes, name: str, opens: Callable[[str], _Loaded], folder: int, path: Path, deadline: float
) -> _Loaded:
    """Load code from the bytes that were verified.

    It is loaded from memory, or where that is impossible from a scratch folder that is then removed.

    Args:
        name: of the file in that folder.
        opens: loads the file with a path.
        folder: that the scratch folder is in.
        path: of that one.
        deadline: as of ``locked``.
    """
    memory = in_memory(content)
    if memory is not None:
        with contextlib.suppress(OSError, ImportError):  # a policy of the system may forbid code from memory
            return opens(memory)
    with locked(folder, deadline), scratch(folder, path) as (descriptor, there):
        write_new(descriptor, name, content)
        return opens(f"{there}/{name}")


def in_memory(content: bytes) -> str | None:
    """Put bytes into a file that exists in memory alone and can never be changed.

    Its descriptor stays open: the loader takes a path that it has seen before for the library that was there then, so
    no path may be used twice.

    Returns:
        The file's path; None where the system has no such files.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("megaresnorm-kernels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return None
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(
        descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    return path if os.path.exists(path) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _digest_name(name: str) -> str:
    return f"{name}.sha256"


def _open_or_make(name: str, folder: int) -> int:
    try:
        return os.open(name, _SEARCH, dir_fd=folder)
    except FileNotFoundError:
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(name, 0o700, dir_fd=folder)
        return os.open(name, _SEARCH, dir_fd=folder)


def _content(folder: int, name: str) -> bytes | None:
    """Content of a plain file of this user's that nobody else can write to; None for anything else.

    A fifo is not waited for.
    """
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not (stat.S_ISREG(status.st_mode) and _is_mine(status)):
            return None
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _is_mine(status: os.stat_result) -> bool:
    """Whether it belongs to this user, and nobody else can write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _check_above(descriptor: int, path: str) -> None:
    """Check that other users cannot replace what lies in a folder.

    Raises:
        BuildError: they can.
    """
    status = os.fstat(descriptor)
    if status.st_uid not in _owners():
        raise BuildError(f"{path} belongs to another user (number {status.st_uid}); {ADVICE}")
    # In a folder with the sticky bit (/tmp) others can make names, but remove only their own. Many systems give each
    # user a group without other members, and make folders that this group can write to (umask 002): it is nobody else.
    others = 0o002 if _is_own_group(status.st_gid) else 0o022
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        raise BuildError(
            f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):o}); chmod go-w it, or {ADVICE}"
        )


def _is_own_group(number: int) -> bool:
    """Whether a group is this user's main one, has the user's name, and no other member is listed."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(number)
    except KeyError:
        return False
    return user.pw_gid == number and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _owners() -> set[int]:
    """Users who may own folders above: this one and root, under the number that root has here.

    In a container of an ordinary user the host's root has no number, and its folders (/, /home) are shown as the
    overflow user's. So are another user's; the protection that remains there is that everything below the folder is
    reached through its descriptor, and that the folder's own owner is checked.
    """
    owners = {os.geteuid(), 0}
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        ranges = [[int(word) for word in line.split()] for line in lines]
        if all(outside > 0 for _, outside, _ in ranges):
            owners.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    except (OSError, ValueError):
        return owners  # not Linux: no such containers
    return owners


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove(folder: int, name: str) -> None:
    """Remove a file, or a folder with all that is in it.

    A compiler whose starter was killed may still write into the folder: what it makes meanwhile stays for the next.
    """
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink(name, dir_fd=folder)
            return
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            for each in os.listdir(descriptor):
                _remove(descriptor, each)
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=folder)
    except OSError as e:
        if e.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise
