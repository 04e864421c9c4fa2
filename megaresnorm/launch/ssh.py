"""A job on hosts that ssh reaches: one ssh for each node, whose supervisor ends with it."""

import shlex
import subprocess
from collections.abc import Sequence
from signal import Signals

from megaresnorm.launch.front import Part, Tell
from megaresnorm.launch.request import Request

QUIET = ("-o", "BatchMode=yes")  # never ask for a password: nobody would see the question


def node_parts(request: Request) -> list[Part]:
    """The ssh command of each host. The node's variables stand in it, since sshd takes over none."""
    found = []
    for rank, host in enumerate(request.hosts):
        words = request.node_command("--node-rank", str(rank), "--attached")
        label = f"{host.name}: " if rank else ""
        found.append(Part(remote(request, host.name, words), label))
    return found


def remote(request: Request, host: str, words: Sequence[str]) -> list[str]:
    """The command that runs ``words`` on a host, in the request's folder and with its variables.

    The shell there gets every word quoted; ``--`` keeps a host from being taken for an option.
    """
    variables = [f"{name}={value}" for name, value in sorted(request.variables.items())]
    line = f"cd {shlex.quote(str(request.folder))} && exec {shlex.join(['env', *variables, *words])}"
    return [*request.ssh, *QUIET, "--", host, line]


def teller(request: Request, *, here: bool = False) -> Tell:
    """A function that tells a signal to every host, by an ssh of its own.

    Args:
        here: tell it to this host alone, as where no hosts are named.
    """

    def tell(running: Sequence["subprocess.Popen[bytes]"], number: Signals) -> None:
        words = [request.python, "-m", "megaresnorm.launch.tell", request.job, str(int(number))]
        commands = [remote(request, host.name, words) for host in request.hosts if not here] or [words]
        for command in commands:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return tell
