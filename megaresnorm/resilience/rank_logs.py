"""Each rank's own log: all that it prints, from C++ libraries too, in a file with its rank and host in the name.

The rank's descriptors are the file itself, so that nothing is lost where a process is killed. The supervisor follows
the files of its node and prints them, lines of ranks other than 0 with their rank and host before them.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.parallel.environment import Environment, host_name
from megaresnorm.text import shown

HEAD = b"--- rank "  # of the line with which each start of a rank begins
PART = 1 << 20  # bytes that are read at a time
LONGEST = 1 << 16  # bytes of a line that has not ended


def log_name(rank: int, host: str) -> str:
    """Name of a rank's log."""
    return f"rank-{rank:05d}.{re.sub(r'[^A-Za-z0-9._-]', '_', host)}.log"


def make_logs(folder: Path) -> None:
    """Make the folder of logs.

    Raises:
        ConfigError: it cannot be made, or not written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, os.strerror(13))
    except OSError as e:
        raise ConfigError(f"--log-dir {folder}: cannot be written ({e.strerror})") from None


def write_to_log(environment: Environment) -> None:
    """Let this process print into its log, if its supervisor has named a folder for it.

    Raises:
        ConfigError: the file cannot be written.
    """
    folder, host = environment.logs, host_name()
    if folder is None:
        return
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(folder / log_name(environment.rank, host), flags, 0o644)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        place = f"{environment.rank} of {environment.world_size} on {host}, pid {os.getpid()}"
        os.write(descriptor, f"{HEAD.decode()}{place}, start {environment.attempt + 1}, {when} ---\n".encode())
    except OSError as e:
        raise ConfigError(f"--log-dir {folder}: cannot be written ({e.strerror})") from None
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class Followed:
    """The logs of this node's ranks as they grow, printed on this process's standard output.

    Args:
        folder: of the logs. What is in it already is left out.
        ranks: gives the ranks of this node that have been started.
    """

    def __init__(self, folder: Path, ranks: Callable[[], Iterable[int]]) -> None:
        self._folder, self._ranks, self._host = folder, ranks, host_name()
        self._done = {path: path.stat().st_size for path in folder.glob("rank-*.log")}
        self._rest: dict[Path, bytes] = {}

    def print_new(self, *, last: bool = False) -> None:
        """Print whole lines that have been written since the last call, or with ``last`` also those not ended."""
        for rank in sorted(self._ranks()):
            path = self._folder / log_name(rank, self._host)
            try:
                with path.open("rb") as file:
                    file.seek(self._done.get(path, 0))
                    while part := file.read(PART):
                        self._done[path] = self._done.get(path, 0) + len(part)
                        self._print(rank, path, self._rest.pop(path, b"") + part)
            except OSError:  # a network file system that is away for a moment; what is left is read the next time
                continue
            if last and self._rest.get(path):
                self._print(rank, path, self._rest.pop(path) + b"\n")

    def _print(self, rank: int, path: Path, text: bytes) -> None:
        *lines, rest = text.split(b"\n")
        if len(rest) > LONGEST:
            lines, rest = [*lines, rest], b""
        if rest:
            self._rest[path] = rest
        before = f"[rank {rank} on {self._host}] " if rank else ""
        for line in lines:
            if not line.startswith(HEAD):
                sys.stdout.write(f"{before}{shown(line.decode(errors='backslashreplace'))}\n")
        sys.stdout.flush()
