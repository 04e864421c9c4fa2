"""How the ranks of a node are to be started: by settings, by variables, or by what a launcher says."""

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_SHOWN
from megaresnorm.parallel.environment import MAX_PORT
from megaresnorm.parallel.launchers import PORT, is_number, plan_of

MAX_NODES = 99_999
MAX_LOCAL = 1024  # ranks of one node
UNLIMITED = 1_000_000  # torchrun's own limit of restarts; ranks count by progress (opening.py)
_OPTIONS = {  # variable -> the option of megaresnorm launch that stands before it
    "RANKS_PER_NODE": "--ranks-per-node",
    "NODES": "--nodes",
    "NODE_RANK": "--node-rank",
    "MASTER_ADDR": "--master-addr",
    "MASTER_PORT": "--master-port",
    "JOB_ID": "--job",
    "MAX_RESTARTS": "--max-restarts",
    "LOG_DIR": "--log-dir",
}


@dataclass(frozen=True)
class Plan:
    """How the ranks of this node are started.

    Attributes:
        ranks_here: how many they are.
        nodes: least and most number of nodes.
        node_rank: None in an elastic job.
        master: address and port where the torchrun processes of all nodes meet; None with one node.
        job: name of the job, the same on all nodes.
        max_restarts: how often ranks are restarted without a new checkpoint.
        logs: folder into which each rank writes what it prints; None to print it alone.
        attached: whether this process ends with those that have started it, such as a shell of ssh.
        saved: a file that node 0 makes where SIGUSR1 has ended the run, and a checkpoint was written since its start.
        command: of ``megaresnorm``, which every rank runs.
    """

    ranks_here: int
    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = None
    master: tuple[str, int] | None = None
    job: str = ""
    max_restarts: int = 3
    logs: Path | None = None
    attached: bool = False
    saved: Path | None = None
    command: str = "train"

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go."""
        return self.nodes[0] != self.nodes[1]


def read_plan(
    default_ranks: Callable[[], int], variables: Mapping[str, str] | None = None, **settings: str | None
) -> Plan:
    """The plan that settings describe; ``megaresnorm launch --help`` and that of launch/torchrun.sh list them.

    Args:
        default_ranks: gives the number of ranks of this node where nothing says.
        variables: to be read in place of the process's own: those of ``settings_of``, else those of a launcher that has
            started one process a node.
        **settings: in place of the variables of the same names; None where one is not given.

    Raises:
        ConfigError: one is missing or cannot be used.
    """
    found = os.environ if variables is None else variables
    theirs = plan_of(found)
    own, given = settings_of(found), {name: value for name, value in settings.items() if value is not None}
    chosen = theirs | own | given

    def whole(name: str, least: int, most: int, default: int) -> int:
        return _whole(chosen.get(name) or str(default), _named(name, given), least, most)

    for name in ("NODES", "NODE_RANK"):
        if name in theirs and name in own | given and ":" not in chosen[name] and chosen[name] != theirs[name]:
            raise ConfigError(f"{name}={chosen[name]}, but the launcher that has started this says {theirs[name]}")
    common: dict[str, Any] = {
        "ranks_here": whole("RANKS_PER_NODE", 1, MAX_LOCAL, 1) if chosen.get("RANKS_PER_NODE") else None,
        "command": chosen.get("COMMAND", "train"),
        "saved": Path(chosen["SAVED"]) if chosen.get("SAVED") else None,
        "max_restarts": whole("MAX_RESTARTS", 0, UNLIMITED, 3),
        "logs": Path(chosen["LOG_DIR"]) if chosen.get("LOG_DIR") else None,
        # DeepSpeed's launcher is a shell of ssh, too; mpirun may be killed.
        "attached": bool(chosen.get("ATTACHED")) or "CROSS_RANK" in found or "OMPI_COMM_WORLD_SIZE" in found,
    }
    text = chosen.get("NODES") or "1"
    match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    nodes = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= nodes[0] <= nodes[1]:
        raise ConfigError(
            f"{_named('NODES', given)}{text[:MAX_SHOWN]!r}: wanted a number up to {MAX_NODES}, or MIN:MAX"
        )
    if nodes == (1, 1):
        alone = [name for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if name in given]
        if alone and "NODES" not in chosen:
            raise ConfigError(f"{_OPTIONS[alone[0]]} has no effect on one node; give --nodes, the number of all nodes")
        common["job"] = _job(chosen, given) or f"megaresnorm-{uuid4().hex}"
        return _plan(common, default_ranks)
    address = chosen.get("MASTER_ADDR")
    elastic = nodes[0] != nodes[1]
    if not address or (not elastic and not chosen.get("NODE_RANK")):
        if "NODES" in theirs and "NODES" not in own | given:
            raise ConfigError(
                f"a launcher has started {text} nodes, and nothing says where node 0 can be reached; give "
                "--master-addr, or unset the launcher's variables if none has"
            )
        wanted = "MASTER_ADDR" if elastic else "NODE_RANK and MASTER_ADDR"
        raise ConfigError(
            f"NODES={text} needs {wanted} on every node; or let --hostfile, or --with a launcher, start all of them"
        )
    check_host(_named("MASTER_ADDR", given), address)
    port = whole("MASTER_PORT", 1, MAX_PORT, PORT)
    node_rank = None if elastic else whole("NODE_RANK", 0, nodes[1] - 1, 0)
    job = _job(chosen, given) or f"megaresnorm-{address}-{port}"
    return _plan(
        common | {"nodes": nodes, "node_rank": node_rank, "master": (address, port), "job": job}, default_ranks
    )


def _plan(found: dict[str, Any], default_ranks: Callable[[], int]) -> Plan:
    """The plan; to ask for the number of GPUs takes a second or two, and comes last."""
    return Plan(**found | {"ranks_here": found["ranks_here"] or default_ranks()})


def settings_of(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """The settings that variables name: those of launch/torchrun.sh."""
    variables = os.environ if variables is None else variables
    return {name: variables[name] for name in _OPTIONS if variables.get(name)}


def _named(name: str, given: Mapping[str, str]) -> str:
    """What stands before a value in an error: the option where it was given as one, else the variable."""
    return f"{_OPTIONS[name]} " if name in given else f"{name}="


def _job(chosen: Mapping[str, str], given: Mapping[str, str]) -> str | None:
    job = chosen.get("JOB_ID")
    if job and not re.fullmatch(r"[\w.:@+-]{1,200}", job, re.ASCII):
        raise ConfigError(f"{_named('JOB_ID', given)}{job[:MAX_SHOWN]!r}: wanted letters, digits and . : @ + - _")
    return job


def check_host(name: str, host: str) -> str:
    """Check that a text can be the name or the address of a host.

    Args:
        name: what stands before it in the error.

    Returns:
        The host.

    Raises:
        ConfigError: it has other characters than names and addresses have, or looks like an option.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?", host) and not _is_ipv6(host):
        raise ConfigError(f"{name}{host[:MAX_SHOWN]!r}: wanted the name or the address of a host")
    return host


def _is_ipv6(host: str) -> bool:
    address, _, zone = host.partition("%")
    try:
        socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):
        return False
    return re.fullmatch(r"[A-Za-z0-9_.-]{0,15}", zone) is not None


def _whole(text: str, name: str, least: int, most: int) -> int:
    if not is_number(text, least, most):
        raise ConfigError(f"{name}{text[:MAX_SHOWN]!r}: wanted a whole number from {least} to {most}")
    return int(text)
