"""A job that DeepSpeed's launcher starts: one process a node, the supervisor of its ranks."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.launch.front import Part
from megaresnorm.launch.request import Request
from megaresnorm.launch.tell import ATTACHED
from megaresnorm.launch.words import encoded
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.parallel.launchers import PORT

EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # what it writes into the command lines of other hosts, unquoted
HARMLESS = re.compile(r"[A-Za-z0-9_@%+=:,./~-]*")
OPTIONS = "PDSH_SSH_ARGS_APPEND"  # the variable in which pdsh finds options of ssh


def job_part(request: Request, hostfile: Path | None, node_rank: int | None) -> Part:
    """The deepspeed command.

    Its launcher joins words with spaces for the shells of other hosts: those of users are encoded (words.py), and
    where that is not possible they are refused.

    Args:
        hostfile: with lines ``HOST slots=N``; None for this host alone.
        node_rank: of this host, where the command is given on each; None where pdsh and ssh reach the others.

    Raises:
        ConfigError: a path or variable has characters that it cannot pass on.
    """
    words = ["deepspeed"]
    if hostfile is not None:
        words += ["--hostfile", str(hostfile), "--launcher", "pdsh", "--no_ssh_check"]
        words += ["--master_addr", request.master_host or ""]
    words += ["--master_port", str(request.master[1] or PORT), "--num_gpus", "1", "--no_local_rank"]
    if node_rank is not None:
        words += ["--no_ssh", "--node_rank", str(node_rank)]
    if hostfile is not None and node_rank is None and len(request.hosts) == 1:
        words += ["--force_multi"]  # else it would start the one host of the list here
    for what, text in (("the interpreter", request.python), ("this folder", str(request.folder))):
        if not HARMLESS.fullmatch(text):
            raise ConfigError(f"{what}, {text[:MAX_SHOWN]!r}, has characters that DeepSpeed's launcher cannot pass on")
    variables = _variables(request)
    given = [word for name, value in sorted(request.variables.items()) for word in ("--env", f"{name}={value}")]
    command = request.node_command(ATTACHED, *given, python=("--module", "megaresnorm"))
    start = command.index("launch") + 1
    labels = [f"{host.name}: " for host in request.hosts]  # pdsh's
    return Part([*words, *command[:start], *encoded(command[start:])], labels=labels, variables=variables)


def _variables(request: Request) -> Mapping[str, str]:
    """What the launcher itself needs: ssh's options for pdsh, and a check of what it would write into command lines."""
    for name, value in os.environ.items():
        if name.startswith(EXPORTED) and not HARMLESS.fullmatch(value):
            raise ConfigError(
                f"{name}={value[:MAX_SHOWN]!r}: DeepSpeed's launcher passes this variable on, but cannot pass on its "
                "characters; unset it"
            )
    if Path(request.ssh[0]).name != "ssh" or any(" " in word for word in request.ssh):
        raise ConfigError(
            f"--ssh {' '.join(request.ssh)[:MAX_SHOWN]!r}: pdsh takes options of ssh alone, in words without spaces; "
            "put the rest into ~/.ssh/config"
        )
    options = " ".join(request.ssh[1:])
    return {OPTIONS: options} if options else {}


def ssh_options() -> list[str]:
    """The options that pdsh gives to ssh here."""
    return os.environ.get(OPTIONS, "").split()
