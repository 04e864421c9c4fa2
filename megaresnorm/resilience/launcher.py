"""The word that a supervisor and the ranks of its node leave each other, in a private folder that lasts as long as the job, and is
locked by the supervisor as long as it lives.

  begun        a rank is in its loop: from now on a signal saves a checkpoint
  stop         exit code of a signal that the supervisor was sent; ranks that are only starting find it here
  end          exit code of ranks that ended on purpose, and would end so again
  progress     attempt in which the newest checkpoint was written
  ranks-N-P    torch's store of attempt N, where all ranks are on this node: nothing listens on a port

torchrun starts again whatever does not end with 0. So a rank that ends on purpose leaves its exit code here and ends with 0.
"""

import errno
import fcntl
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # that save a checkpoint and end the run
PREFIX = "megaresnorm-"  # of the folder's name
LOOK = 0.5  # seconds between two looks at whether parent and supervisor are alive


class Launcher:
    """Of a node; ``folder`` is the supervisor's temporary one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, number: int) -> None:
        """Raises: OSError."""
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(str(number))
        temporary.replace(self.folder / name)

    def read(self, name: str) -> int | None:
        try:
            text = (self.folder / name).read_text()
        except OSError:
            return None
        return int(text) if text.isdecimal() else None

    def forget(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    def asked_to_stop(self) -> int:
        """128 and the signal that the supervisor was sent, or that ended ranks of this node before; or 0."""
        codes = (self.read("stop"), self.read("end"))
        return next((code for code in codes if code is not None and code - 128 in list(SIGNALS)), 0)

    def lock(self) -> int:
        """Held by the supervisor until the descriptor is closed, or its process ends however it ends. The folder itself is locked:
        what cleans /tmp leaves such a folder alone.
        """
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without flock: then processes look at their parent alone
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def is_supervised(self) -> bool:
        """Whether the supervisor lives; also where that cannot be known now."""
        try:
            descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            return e.errno not in (errno.ENOENT, errno.ENOTDIR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def remove(self) -> None:
        """What a supervisor that was killed has left."""
        if self.folder.name.startswith(PREFIX):
            shutil.rmtree(self.folder, ignore_errors=True)


def end_with(parent: int, launcher: Launcher | None, first: Callable[[], None] = lambda: None) -> None:
    """Start a thread that ends this process, after calling ``first``, as soon as ``parent`` is not its parent any more or the
    supervisor is gone: nobody else would end it, and it would go on holding the run's folder.
    """

    def watch() -> None:
        while os.getppid() == parent and (launcher is None or launcher.is_supervised()):
            time.sleep(LOOK)
        first()
        if launcher is not None and not launcher.is_supervised():
            launcher.remove()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    """Process ids of a process's children, where the system tells (Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []
