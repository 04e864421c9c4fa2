"""A job on hosts that ssh reaches: one ssh for each node, whose supervisor ends with it."""

import shlex
import subprocess
import time
from collections.abc import Sequence
from signal import Signals

from megaresnorm.launch.front import Part, Tell
from megaresnorm.launch.request import Request
from megaresnorm.launch.tell import ATTACHED
from megaresnorm.resilience.launcher import kill

# Never ask for a password, since nobody would see the question; notice a host that has lost its power.
QUIET = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
LONGEST = 30.0  # seconds that a host may take to be told a signal
CONNECT = "ConnectTimeout=10"  # seconds that a host may be silent which is to be told a signal
AGAIN = 0.5  # seconds until a host is asked again


def node_parts(request: Request) -> list[Part]:
    """The ssh command of each host. The node's variables stand in it, since sshd takes over none."""
    found = []
    for rank, host in enumerate(request.hosts):
        words = request.node_command("--node-rank", str(rank), ATTACHED)
        label = f"{host.name}: " if rank else ""
        found.append(Part(remote(request, host.name, words), label))
    return found


def remote(request: Request, host: str, words: Sequence[str], *options: str) -> list[str]:
    """The command that runs ``words`` on a host, in the request's folder and with its variables.

    The shell there gets every word quoted; ``--`` keeps a host from being taken for an option.

    Args:
        options: of ssh.
    """
    variables = [f"{name}={value}" for name, value in sorted(request.variables.items())]
    line = f"cd {shlex.quote(str(request.folder))} && exec {shlex.join(['env', *variables, *words])}"
    return [*request.ssh, *QUIET, *options, "--", host, line]


def teller(request: Request, *, here: bool = False) -> Tell:
    """A function that tells a signal to every host, by an ssh of its own.

    A host whose supervisor has not started yet is asked again. Where none has anywhere, nothing is to be saved, and
    what starts them is ended.

    Args:
        here: tell it to this host alone, as where no hosts are named.
    """

    def tell(running: Sequence["subprocess.Popen[bytes]"], number: Signals) -> None:
        words = [request.python, "-m", "megaresnorm.launch.tell", request.job, str(int(number))]
        hosts = [] if here else request.hosts
        commands = [remote(request, host.name, words, "-o", CONNECT) for host in hosts] or [words]
        missed = _run_all(commands)
        if len(missed) == len(commands):
            for process in running:
                kill(process.pid, Signals.SIGTERM)
        while missed and any(process.poll() is None for process in running):
            time.sleep(AGAIN)
            missed = _run_all(missed)

    return tell


def _run_all(commands: Sequence[list[str]]) -> list[list[str]]:
    """Run commands beside each other; those that have failed."""
    quiet = subprocess.DEVNULL
    started = [subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) for command in commands]
    end, missed = time.monotonic() + LONGEST, []
    for command, process in zip(commands, started, strict=True):
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        missed += [command] if code else []
    return missed
