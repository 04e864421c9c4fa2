"""Processes of this system that belong to a job."""

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megaresnorm.resilience.launcher import LOOK, ancestors

PATIENCE = 60.0  # seconds to save a checkpoint once the launcher is gone


def launchers() -> tuple[int, ...]:
    """Process ids of those that have started this one, from its parent up to the parent of its session's leader.

    That is a process of sshd for what ssh has started. A login shell above it may end.
    """
    found, leader = ancestors(os.getpid()), os.getsid(0)
    if leader == os.getpid() or leader not in found:
        return found[:1]
    return found[: found.index(leader) + 2]


def end_without(started_by: tuple[int, ...], ask: Callable[[], None], end: Callable[[], None]) -> None:
    """Start a thread that ends this process's work once one of those that have started it is gone.

    Those are a shell of ssh and what lies between; nobody would hear of this process any more. Where they were gone
    before it looked, what it prints has no reader.

    Args:
        started_by: process ids from the parent upwards, at the start.
        ask: called first, to end in order.
        end: called after ``PATIENCE``.
    """

    def watch() -> None:
        while ancestors(os.getpid())[: len(started_by)] == started_by and not _has_hung_up(1):
            time.sleep(LOOK)
        ask()
        time.sleep(PATIENCE)
        end()

    threading.Thread(target=watch, name="ancestors", daemon=True).start()


def _has_hung_up(descriptor: int) -> bool:
    """Whether nobody reads any more what is written to a pipe, socket or terminal."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def processes_with(variable: str) -> list[int]:
    """Process ids of this user's other processes with this variable; empty if the system does not tell (Linux does)."""
    wanted, found = variable.encode() + b"\0", []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ESRCH):
                raise
    return found
