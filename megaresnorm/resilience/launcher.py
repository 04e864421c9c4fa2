"""Files by which a supervisor and the ranks of its node communicate.

They lie in a private folder that lasts as long as the job, and that the supervisor locks as long as it lives:

  begun        a rank is in its training loop: from now on a signal saves a checkpoint
  stop         exit code of a signal that the supervisor was sent; ranks that are still starting find it here
  end          exit code of ranks that ended on purpose, and would end so again
  progress     attempt in which the newest checkpoint was written
  attempt      how often the ranks of this node have been started again
  rank-L       rank of the L-th process of this node
  beats        descriptor of the agent, whose process is agent, of the memory in which ranks tell what they are at
  run          folder of the run, and in which attempt ranks have met on which hosts
  failed-N     rank of this node that failed first in attempt N, and why
  ranks-N-P    torch's store of attempt N, if all ranks are on this node: nothing listens on a port

torchrun restarts what does not end with 0. So a rank that ends on purpose leaves its exit code here and ends with 0.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # these save a checkpoint and end the run
PREFIX = "megaresnorm-"  # of the name of the folder
MOST_ANCESTORS = 64
LOOK = 0.5  # seconds between two checks that parent and supervisor are alive


@dataclass(frozen=True)
class Failure:
    """Why a rank failed.

    Attributes:
        rank: of all.
        host: of its node.
        line: what happened.
        exit_code: of the job for that.
    """

    rank: int
    host: str
    line: str
    exit_code: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.line}"


class Launcher:
    """The files of one node.

    Args:
        folder: the supervisor's temporary folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, number: int) -> None:
        """Write a number into a file, atomically.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(str(number))
        temporary.replace(self.folder / name)

    def read(self, name: str) -> int | None:
        """The number in a file; None where there is none."""
        try:
            text = (self.folder / name).read_text()
        except OSError:
            return None
        return int(text) if text.isdecimal() else None

    def write_json(self, name: str, value: Any) -> None:
        """Write what JSON can hold into a file, atomically.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(value))
        temporary.replace(self.folder / name)

    def read_json(self, name: str) -> dict[str, Any]:
        """What is in such a file; empty where there is none."""
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def introduce(self, rank: int, local_rank: int, attempt: int) -> None:
        """Tell the supervisor which rank a process of this node is, in which start of the ranks."""
        with suppress(OSError):  # a full /tmp: then a killed rank is known by its number on this node
            self.write(f"rank-{local_rank}", rank)
            if local_rank == 0:
                self.write("attempt", attempt)

    def note_failure(self, failure: "Failure", attempt: int) -> None:
        """Note why a rank of this node failed; only the first one of an attempt counts.

        Raises:
            OSError: the folder cannot be written.
        """
        temporary = self.folder / f".failed.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(failure)))
        with suppress(FileExistsError):
            os.link(temporary, self.folder / f"failed-{attempt}")
        temporary.unlink()

    def failure(self) -> "Failure | None":
        """The first failure of this node in the newest attempt, or in the one before, which that one has ended for."""
        attempts = {int(path.name[7:]): path for path in self.folder.glob("failed-[0-9]*")}
        newest = max(attempts, default=-1)
        healed = newest < (self.read("attempt") or 0) - 1
        return Failure(**json.loads(attempts[newest].read_text())) if attempts and not healed else None

    @property
    def last_failed(self) -> int:
        """The newest attempt in which a failure was noted; -1 before one."""
        return max((int(path.name[7:]) for path in self.folder.glob("failed-[0-9]*")), default=-1)

    def ranks(self) -> dict[int, int]:
        """Ranks of this node's processes, as far as they have been started, by local rank."""
        found = {int(path.name[5:]): self.read(path.name) for path in self.folder.glob("rank-*[0-9]")}
        return {local: rank for local, rank in found.items() if rank is not None}

    def forget(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def asked_to_stop(self) -> int:
        """128 + the signal that the supervisor was sent, or that has ended ranks of this node before; 0 without one."""
        codes = (self.read("stop"), self.read("end"))
        return next((code for code in codes if code is not None and code - 128 in list(SIGNALS)), 0)

    def lock(self) -> int:
        """Lock the folder for the supervisor, until the descriptor is closed or the process ends, however it ends.

        The folder itself is locked, because programs that clean /tmp leave such a folder alone.

        Returns:
            The descriptor.
        """
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # a file system without flock: then processes watch their parent alone
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def is_supervised(self) -> bool:
        """Whether the supervisor is alive; True if that cannot be known now."""
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
        """Remove the folder that a killed supervisor has left."""
        if self.folder.name.startswith(PREFIX):
            shutil.rmtree(self.folder, ignore_errors=True)


def ancestors(pid: int) -> tuple[int, ...]:
    """Process ids of the parent of a process, its parent, and so on; empty if the system does not tell (Linux does)."""
    found: list[int] = []
    while pid > 1 and len(found) < MOST_ANCESTORS:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
        found.append(pid)
    return tuple(found)


def end_with(parent: int, launcher: Launcher | None, first: Callable[[], None] = lambda: None) -> None:
    """Start a thread that ends this process once its parent or the supervisor is gone.

    Nobody else would end it, and it would go on holding the run's folder.

    Args:
        parent: process id; the parent is gone as soon as this process has another one.
        launcher: tells whether the supervisor is alive; None without one.
        first: called before this process ends.
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
    """Send a process a signal, if it is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    """Process ids of a process's children; empty if the system does not tell (it does on Linux)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (OSError, ValueError):
        return []
