"""Runs started by launch/torchrun.sh as users start them, watched and disturbed from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe

ROOT = Path(__file__).parents[1]
LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "tp2 dp2": (4, {"tp": 2}),
}
STEPS, INTERVAL = 100, 10


def be_rank(rank: int, num_ranks: int) -> None:
    """Let a process of ``run_ranks``, which has a process group already, find torchrun's variables."""
    variables = {"WORLD_SIZE": num_ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "-", "MASTER_PORT": 1}
    os.environ |= {name: str(value) for name, value in variables.items()}


def train_on_rank(rank: int, num_ranks: int, recipe) -> str:
    from megaresnorm.trainer import train

    be_rank(rank, num_ranks)
    return train(recipe).weights_digest


def environment(folder: Path, num_ranks: int) -> dict[str, str]:
    """For the scripts in launch/: the Python that runs the tests as the environment that they would make."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    return {**os.environ, "VENV": str(folder / "venv"), "RANKS_PER_NODE": str(num_ranks), "OMP_NUM_THREADS": "1"}


def losses(output: Path) -> dict[int, str]:
    """Step -> loss as the bits that it has; what is being written is left out."""
    found = {}
    for line in (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[record["step"]] = float(record["loss"]).hex()
    return found


STARTED: list["Launched"] = []  # a fixture ends those that a failed test has left


class Launched:
    """A recipe on several ranks.

    Args:
        ignored: signals that it is started with ignored, as scripts do that start jobs in the background.
        prefix: the command that starts it.
        arguments: of the script behind the recipe.

    Attributes:
        lines: what it printed, each with the time.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        num_ranks: int,
        ignored: tuple[signal.Signals, ...] = (),
        prefix: Sequence[str] = (),
        arguments: Sequence[str] = (),
        **variables: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        self.num_ranks = num_ranks
        command = [*prefix, "bash", str(ROOT / "launch" / "torchrun.sh"), "recipe.yaml", *arguments]
        self.start(command, folder, Path(recipe.train.output), environment(folder, num_ranks) | variables, ignored)

    def start(
        self,
        command: Sequence[str],
        folder: Path,
        output: Path,
        variables: dict[str, str],
        ignored: tuple[signal.Signals, ...] = (),
    ) -> None:
        """Start a command in a folder, and read its lines."""
        self.output = output
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: _set_signals(ignored),
        )
        STARTED.append(self)
        self.lines: list[tuple[float, str]] = []
        self._steps: list[tuple[float, int]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))
            if match := re.match(r"step +(\d+)/", line):
                self._steps.append((self.lines[-1][0], int(match[1])))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def steps(self) -> list[tuple[float, int]]:
        """(time, number) of every step that was reported."""
        return list(self._steps)

    @property
    def torchrun(self) -> int:
        (pid,) = _children(self.process.pid)
        return pid

    def ranks(self) -> list[int]:
        """Process ids, by local rank."""
        return _children(self.torchrun)

    def wait_for_step(self, number: int, timeout: float = 120) -> None:
        self.wait_for(lambda: any(step >= number for _, step in self.steps), f"step {number}", timeout)

    def wait_for(self, condition, what: str, timeout: float = 120, poll: float = 0.01) -> None:
        """Wait, looking every ``poll`` seconds: more often takes the processor from the ranks."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.text}"
            assert time.monotonic() < end, f"no {what} in {timeout} s:\n{self.text}"
            time.sleep(poll)

    def finish(self, timeout: float = 180) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join()
        return code

    @property
    def digest(self) -> str:
        """Of the weights at the end."""
        return re.findall(r"weights +([0-9a-f]{64})", self.text)[-1]

    def everybody(self) -> list[int]:
        """Process ids of the script's process, of torchrun and of the ranks, as far as they have been started."""
        found = [self.process.pid]
        for pid in found:
            found += _children(pid) if Path(f"/proc/{pid}").exists() else []
        return found

    def end(self) -> None:
        if self.process.poll() is not None:  # its number may be another's by now; ranks end with it
            return
        for pid in self.everybody():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def listening(pids: list[int]) -> list[tuple[int, str, int]]:
    """(process, address, port) of every TCP socket that processes of one host listen on."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes[target[8:-1]] = pid
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                raw, _, port = fields[1].partition(":")
                words = [bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, len(raw), 8)]
                address = socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")
                found.append((inodes[fields[9]], address, int(port, 16)))
    return found


def _set_signals(ignored: tuple[signal.Signals, ...]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
