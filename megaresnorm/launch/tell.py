"""Sends a signal to the supervisors of a job on this node: ``python -m megaresnorm.launch.tell JOB NUMBER``.

For launchers that pass no signals on: those that reach a node by ssh.
"""

import os
import sys
from itertools import pairwise
from pathlib import Path

from megaresnorm.resilience.launcher import SIGNALS, kill
from megaresnorm.text import say

SUPERVISOR = ("-m", "megaresnorm", "launch")
ATTACHED = "--attached"  # of the command of a node: the one that a user types has it not


def supervisors(job: str, proc: Path = Path("/proc")) -> list[int]:
    """Process ids of this user's supervisors of a job on this node."""
    found = []
    for folder in proc.glob("[0-9]*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")[1:-1]
        except OSError:  # it has ended meanwhile
            continue
        while words and words[0] in ("-u", "-I"):
            words = words[1:]
        if tuple(words[:3]) != SUPERVISOR or ATTACHED not in words:
            continue
        if any(pair == ("--job", job) for pair in pairwise(words)):
            found.append(int(folder.name))
    return found


def main(arguments: list[str]) -> int:
    """Send the signal; the exit code is 1 where there is nobody to send it to."""
    numbers = {str(int(number)): number for number in SIGNALS}
    if len(arguments) != 2 or arguments[1] not in numbers:
        say(f"usage: python -m megaresnorm.launch.tell JOB {'|'.join(numbers)}", error=True)
        return 2
    pids = supervisors(arguments[0])
    for pid in pids:
        kill(pid, numbers[arguments[1]])
    return 0 if pids else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
