"""How much memory and how many cores this machine, or the job's share of it, has."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


class HostMemory(NamedTuple):
    """Host memory in bytes.

    Attributes:
        total: what can be used at all, with swap.
        free: what can be used now, without swap. Cached pages of files count as free, since they are given back.
    """

    total: int
    free: int


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> HostMemory | None:
    """The least of what the machine has and each control group above this process allows; None if all are unknown."""
    found = []
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        machine = {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[-1] == "kB"}
        swap = machine.get("SwapTotal", 0)
        found.append(HostMemory(machine["MemTotal"] + swap, machine["MemAvailable"]))
    except (OSError, ValueError, KeyError):
        swap = 0
    for folder, names in _groups(proc, cgroups):
        limit = _limit(folder, *names)
        if limit is not None:
            found.append(HostMemory(limit.total + swap, limit.free))
    if not found:
        return None
    return HostMemory(min(one.total for one in found), min(one.free for one in found))


def available_memory() -> int | None:
    """Bytes that are free for this job now; None if unknown."""
    memory = host_memory()
    return None if memory is None else memory.free


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups of this process, of both versions, that can limit memory, up to the root.

    Inside a container the path may be one that only the host can see: then only the folders that exist count.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, names = cgroups / "memory", _V1
        else:
            continue
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            yield group, names
            if group == root:
                break


def _limit(folder: Path, limit: str, used: str, files: str) -> HostMemory | None:
    """Limit and free memory of a group; None where it has no limit, or is invisible."""
    try:
        total = int((folder / limit).read_text())  # "max" is no number: no limit
        pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return HostMemory(total, total - int((folder / used).read_text()) + int(pages.get(files, 0)))
    except (OSError, ValueError):
        return None


def available_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: of its affinity, and of what its control group allows a second."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroups / "cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # "max": no limit; version 1 of control groups
        return cores


def process_age(proc: Path = PROC) -> float:
    """Seconds since this process was started; 0 where the system does not tell (Linux does)."""
    try:
        ticks = int((proc / "self" / "stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
