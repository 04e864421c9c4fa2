"""One job at a time in an output folder."""

import errno
import fcntl
import getpass
import json
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from megaresnorm.errors import TrainingError
from megaresnorm.files import open_plain

log = logging.getLogger(__name__)

LOCK = ".lock"
HEARTBEAT = 10.0  # seconds
STALE = 60.0  # seconds without a heartbeat after which an owner on another host is taken for dead


class FolderLock:
    """Holds ``folder/.lock`` until ``release``, or the end of the process.

    The file is locked by flock, which the operating system undoes when a process dies, however it dies. Some network
    file systems keep flock to one host. So the file names its owner and is touched every HEARTBEAT seconds, and an
    owner on another host counts as dead after STALE seconds of the file server's clock without a heartbeat. If that
    clock has gone back, so that the last heartbeat lies in the future, the owner counts as dead once the time stamp has
    not moved for STALE seconds. A job that torchrun has restarted on another host takes over its own lock. An owner
    that was taken for dead and is not, or whose file was removed or replaced, finds that out at its next heartbeat, or
    when ``lost`` is read.

    Args:
        what: what errors call the folder.
        job: torchrun's name for this job, the same after a restart of its ranks; None where it has none.

    Raises:
        TrainingError: the folder is in use, by the owner that is named, or cannot be used for the reason given.
    """

    def __init__(self, folder: Path, what: str, job: str | None = None) -> None:
        self._path, self._what, self._job = folder / LOCK, what, job
        self._lost, self._released = False, threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = open_plain(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise TrainingError(f"{what}: cannot be written ({e.strerror})") from None
        try:
            self._take()
        except OSError as e:
            os.close(self._descriptor)
            raise TrainingError(f"{what}: cannot be locked ({e.strerror}, {self._path})") from None
        except BaseException:
            os.close(self._descriptor)
            raise
        self._beating = os.dup(self._descriptor)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether the folder is no longer this job's: another job has taken it over, or the lock file is gone."""
        if not self._released.is_set():
            self._look(self._descriptor)
        return self._lost

    def release(self) -> None:
        """Leave the folder to others."""
        if self._released.is_set():
            return
        self._look(self._descriptor)
        self._released.set()
        try:
            if not self._lost:
                os.ftruncate(self._descriptor, 0)
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough: the heartbeat has it open as well
        except OSError as e:
            log.warning("warning: %s: cannot be released (%s)", self._path, e.strerror)
        finally:
            os.close(self._descriptor)

    def _take(self) -> None:
        locked = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held(self._owner(), time.time() - os.fstat(self._descriptor).st_mtime) from None
        except OSError as e:
            if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            locked = False
            log.warning(
                "warning: %s: this file system has no flock; its owner is known by its heartbeat alone", self._what
            )
        if self._replaced(self._descriptor):  # between our opening and locking it
            raise self._held({}, 0.0)
        owner, silent = self._owner(), self._seconds_silent()
        # An owner that our flock does not exclude.
        out_of_reach = bool(owner) and (not locked or owner.get("host") != socket.gethostname())
        if out_of_reach and (self._job is None or owner.get("job") != self._job) and self._alive(silent):
            raise self._held(owner, silent)
        if owner:
            log.info("%s: taken over from pid %s on %s, which is dead", self._what, owner.get("pid"), owner.get("host"))
        self._mine: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "user": _user(),
            "job": self._job,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(self._descriptor, 0)
        try:
            os.pwrite(self._descriptor, json.dumps(self._mine).encode(), 0)
        except OSError as e:
            if not locked or e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            log.warning("warning: %s: no room to name the owner of its lock (%s)", self._what, e.strerror)
            self._mine = {}

    def _owner(self, descriptor: int | None = None) -> dict[str, Any]:
        try:
            owner = json.loads(os.pread(self._descriptor if descriptor is None else descriptor, 4096, 0))
        except (ValueError, RecursionError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _held(self, owner: dict[str, Any], silent: float) -> TrainingError:
        who = "another job"
        if owner:
            pid, user, host, since = (owner.get(key) for key in ("pid", "user", "host", "since"))
            who = f"pid {pid} of {user} on {host} since {since}, alive {max(0.0, silent):.0f} s ago"
        return TrainingError(f"{self._what} is in use by {who}; wait for it, end it, or use another folder")

    def _seconds_silent(self) -> float:
        """Seconds since the last heartbeat, by the clock of the file server."""
        last = os.fstat(self._descriptor).st_mtime
        with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".lock-") as probe:
            return os.fstat(probe.fileno()).st_mtime - last

    def _alive(self, silent: float) -> bool:
        """Whether an owner lives, ``silent`` seconds after its last heartbeat. If negative, wait for the next one."""
        if silent >= -HEARTBEAT:
            return silent < STALE
        log.info(
            "%s: its lock is stamped %.0f s in the future; waiting %.0f s for its owner", self._what, -silent, STALE
        )
        stamp, end = os.fstat(self._descriptor).st_mtime_ns, time.monotonic() + STALE
        while time.monotonic() < end:
            time.sleep(min(1.0, HEARTBEAT))
            if os.fstat(self._descriptor).st_mtime_ns != stamp:
                return True
        return False

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT) and not self._lost:
            try:
                self._look(self._beating)
                if not self._lost:
                    os.utime(self._beating)
            except OSError as e:  # a full or lost disk; the next beat may reach it
                log.debug("%s: %s", self._path, e.strerror)
        os.close(self._beating)

    def _look(self, descriptor: int) -> None:
        """Note whether the lock is another job's by now."""
        try:
            self._lost = self._lost or self._replaced(descriptor) or self._owner(descriptor) != self._mine
        except OSError as e:  # a lost disk says nothing of who has the folder
            log.debug("%s: %s", self._path, e.strerror)

    def _replaced(self, descriptor: int) -> bool:
        """Whether another file, or none, is in the place of the locked one."""
        try:
            there = os.lstat(self._path)
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(descriptor))


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def is_held(folder: Path, now: float) -> bool | None:
    """Whether a job is at work in a folder, as a reader sees it: its lock names an owner whose heart has beaten lately.

    Args:
        now: seconds of the epoch.

    Returns:
        None where there is no lock file.
    """
    try:
        found = os.stat(folder / LOCK, follow_symlinks=False)
    except OSError:
        return None
    return found.st_size > 0 and now - found.st_mtime < STALE
