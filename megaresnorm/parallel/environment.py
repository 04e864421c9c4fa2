"""The place of this process among the ranks of a job, and how the ranks of a node are to be started.

The variables that launchers set, and those that megaresnorm launch takes and sets, are read here and nowhere else. One
variable alone does not make this a rank. Without WORLD_SIZE, or a launcher's own variables, it is one process, whatever
RANK an old shell still holds.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_RANKS, MAX_SHOWN
from megaresnorm.parallel.addresses import address_by_slurm, interface_of, resolves
from megaresnorm.parallel.launchers import PORT, Started, address_in_batch, is_number, number, plan_of, started_by

LAUNCHER = "MEGARESNORM_LAUNCHER"  # a private folder of this node's ranks and their supervisor
ELASTIC = "MEGARESNORM_ELASTIC"  # nodes may come and go
MAX_RESTARTS = "MEGARESNORM_MAX_RESTARTS"  # how often ranks are started again without a new checkpoint
LOGS = "MEGARESNORM_LOGS"  # folder into which each rank of this node writes what it prints
STORE = "MEGARESNORM_STORE"  # descriptor of the socket on which torchrun's rendezvous listens on this node
NODE = "MEGARESNORM_NODE"  # which node this is, from 0, for torchrun; not set where nodes may come and go
MAX_PORT = 65535
MAX_NODES = 99_999
MAX_LOCAL = 1024  # ranks of one node
_SETTINGS = ("RANKS_PER_NODE", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_ID", "MAX_RESTARTS", "LOG_DIR")
UNLIMITED = 1_000_000  # torchrun's own limit of restarts; ranks count by progress (resilience/signals.py)


@dataclass(frozen=True)
class Environment:
    """The place of this process in its job. The defaults are one process that no launcher has started.

    Attributes:
        rank, local_rank, world_size: as torchrun has them.
        ranks_here: number of ranks on this node; None where no variable says.
        master_addr, master_port: where rank 0 can be reached; None in one process.
        agent_store: whether torchrun itself keeps the store there.
        attempt: how often torchrun has started the ranks again because one died.
        max_restarts: how often it may do so without a new checkpoint; None where no variable says.
        job: torchrun's name for the job; None where it has none of its own.
        launcher: private folder of megaresnorm launch; None without it.
        logs: folder into which this rank writes what it prints; None to print it.
        elastic: whether nodes may come and go.
        has_parent: whether a launcher is the parent of this process, which then ends with it.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    ranks_here: int | None = 1
    master_addr: str | None = None
    master_port: int | None = None
    agent_store: bool = False
    attempt: int = 0
    max_restarts: int | None = None
    job: str | None = None
    launcher: Path | None = None
    logs: Path | None = None
    elastic: bool = False
    has_parent: bool = False

    @property
    def one_node(self) -> bool:
        """Whether all ranks are known to be on this node."""
        return self.ranks_here == self.world_size


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """The environment of this process.

    Args:
        variables: to be read in place of the process's own.

    Raises:
        ConfigError: only some of a launcher's variables are set, or one is not a number in its range.
    """
    found = os.environ if variables is None else variables
    job = found.get("TORCHELASTIC_RUN_ID", "none")
    common = {
        "job": None if job in ("none", "") else job,
        "launcher": Path(found[LAUNCHER]) if found.get(LAUNCHER) else None,
        "logs": Path(found[LOGS]) if found.get(LOGS) else None,
        "elastic": ELASTIC in found,
    }
    if "WORLD_SIZE" not in found:
        # Under a supervisor only torchrun's count: what has started the supervisor has one process a node.
        started = None if found.get(LAUNCHER) else started_by(found)
        if started is not None and started.size > 1:
            return _environment_of(started, found)
        return Environment(**common)  # type: ignore[arg-type]
    world_size = number("torchrun", found, "WORLD_SIZE", 1, MAX_RANKS)
    one_each = is_in_pod(found) and "LOCAL_RANK" not in found  # Kubeflow: a pod is a rank
    if one_each and found.get("PET_NNODES", found["WORLD_SIZE"]) != found["WORLD_SIZE"]:
        raise ConfigError(
            f"WORLD_SIZE={found['WORLD_SIZE'][:MAX_SHOWN]}, on {found['PET_NNODES'][:MAX_SHOWN]} nodes (PET_NNODES), "
            "but no LOCAL_RANK; let the pods run megaresnorm launch RECIPE, which starts the ranks of each"
        )
    if world_size > 1:
        needed = ("RANK", *(() if one_each else ("LOCAL_RANK",)), "MASTER_ADDR", "MASTER_PORT")
        missing = [n for n in needed if not found.get(n)]
        if missing:
            raise ConfigError(
                f"the environment is not torchrun's: WORLD_SIZE={world_size}, but {', '.join(missing)} missing; "
                "start with megaresnorm launch, or unset WORLD_SIZE"
            )
    here = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if found.get(name)), None)  # the second: DeepSpeed
    agent_store = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Environment(
        rank=number("torchrun", found, "RANK", 0, world_size - 1, 0),
        local_rank=number("torchrun", found, "LOCAL_RANK", 0, world_size - 1, 0),
        world_size=world_size,
        ranks_here=1 if one_each else None if here is None else number("torchrun", found, here, 1, world_size),
        master_addr=found.get("MASTER_ADDR"),
        master_port=number("torchrun", found, "MASTER_PORT", 0, MAX_PORT, 0) if world_size > 1 else None,
        agent_store=agent_store,
        attempt=number("torchrun", found, "TORCHELASTIC_RESTART_COUNT", 0, MAX_RANKS, 0),
        max_restarts=number("torchrun", found, MAX_RESTARTS, 0, MAX_RANKS) if MAX_RESTARTS in found else None,
        has_parent=agent_store or LAUNCHER in found or "CROSS_RANK" in found,
        **common,  # type: ignore[arg-type]
    )


def _environment_of(started: Started, found: Mapping[str, str]) -> Environment:
    """The environment of a rank that srun or mpirun has started.

    Raises:
        ConfigError: nothing says where rank 0 can be reached.
    """
    address = found.get("MASTER_ADDR") or started.master_addr
    if started.one_node:
        address = "127.0.0.1"
    if not address:
        raise ConfigError(
            f"{started.by} has started {started.size} ranks on several nodes, and nothing says where rank 0 can be "
            "reached; set MASTER_ADDR to its host on all of them (mpirun -x MASTER_ADDR=...)"
        )
    return Environment(
        rank=started.rank,
        local_rank=started.local_rank,
        world_size=started.size,
        ranks_here=started.local_size,
        master_addr=address,
        master_port=number(started.by, found, "MASTER_PORT", 1, MAX_PORT, started.port),
        job=started.job,
        has_parent=True,
    )


def listening_socket(variables: Mapping[str, str] | None = None) -> tuple[int, str, int] | None:
    """Descriptor, address and port of the socket on which this node keeps the store of torchrun's rendezvous.

    None where another node keeps it.
    """
    variables = os.environ if variables is None else variables
    if not variables.get(STORE):
        return None
    descriptor = int(variables[STORE])
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        address, port = listener.getsockname()[:2]
    return descriptor, address, port


def node_number(variables: Mapping[str, str] | None = None) -> int | None:
    """Which node this is for torchrun; None where nodes may come and go, or there is one."""
    found = os.environ if variables is None else variables
    return int(found[NODE]) if found.get(NODE) else None


def is_in_allocation(variables: Mapping[str, str] | None = None) -> bool:
    """Whether this process is in an allocation of Slurm, in which srun starts tasks at once."""
    return bool((os.environ if variables is None else variables).get("SLURM_JOB_ID"))


def is_in_pod(variables: Mapping[str, str] | None = None) -> bool:
    """Whether this process is in a pod of Kubernetes."""
    return "KUBERNETES_SERVICE_HOST" in (os.environ if variables is None else variables)


def is_copied(variables: Mapping[str, str] | None = None) -> bool:
    """Whether the terminal of this process is one of Open MPI's, which copies all that is written there elsewhere."""
    return "OMPI_COMM_WORLD_SIZE" in (os.environ if variables is None else variables)


def host_name(variables: Mapping[str, str] | None = None) -> str:
    """Name of this node, for people: what a launcher calls it, else its own."""
    variables = os.environ if variables is None else variables
    return variables.get("SLURMD_NODENAME") or socket.gethostname() or "this host"


def master_here(host: str, variables: Mapping[str, str] | None = None) -> str:
    """The host of rank 0 as this node can resolve it.

    Slurm has names for nodes that nobody else may know; then it is the address that Slurm has.

    Args:
        host: as ``MASTER_ADDR``.
    """
    variables = os.environ if variables is None else variables
    if not is_in_allocation(variables) or resolves(host):
        return host
    return address_in_batch(variables, host) or address_by_slurm(host) or host


def use_interface(address: str | None, variables: MutableMapping[str, str] | None = None) -> None:
    """Let gloo and NCCL use the network interface with an address, unless variables name another.

    By itself gloo takes that of the node's own name, which may be loopback.
    """
    variables = os.environ if variables is None else variables
    interface = interface_of(address)
    if interface is not None:
        variables.setdefault("GLOO_SOCKET_IFNAME", interface)
        variables.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without = NCCL takes every name that begins so
    if ":" in (address or ""):
        variables.setdefault("NCCL_SOCKET_FAMILY", "AF_INET6")


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
        variables: to be read in place of the process's own: those of launch/torchrun.sh, else those of a launcher that
            has started one process a node.
        **settings: in place of the variables of the same names; None where one is not given.

    Raises:
        ConfigError: one is missing or cannot be used.
    """
    found = os.environ if variables is None else variables
    theirs = plan_of(found)
    own = {name: found[name] for name in _SETTINGS if found.get(name)}
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = theirs | own | given
    for name in ("NODES", "NODE_RANK"):
        if name in theirs and name in own | given and ":" not in chosen[name] and chosen[name] != theirs[name]:
            raise ConfigError(f"{name}={chosen[name]}, but the launcher that has started this says {theirs[name]}")
    named = chosen.get("RANKS_PER_NODE")
    common: dict[str, Any] = {
        "ranks_here": _setting(chosen, "RANKS_PER_NODE", 1, MAX_LOCAL, 1) if named else None,
        "saved": Path(chosen["SAVED"]) if chosen.get("SAVED") else None,
        "max_restarts": _setting(chosen, "MAX_RESTARTS", 0, UNLIMITED, 3),
        "logs": Path(chosen["LOG_DIR"]) if chosen.get("LOG_DIR") else None,
        # DeepSpeed's launcher is a shell of ssh, too; mpirun may be killed.
        "attached": bool(chosen.get("ATTACHED")) or "CROSS_RANK" in found or "OMPI_COMM_WORLD_SIZE" in found,
    }
    text = chosen.get("NODES") or "1"
    match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    nodes = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= nodes[0] <= nodes[1]:
        raise ConfigError(f"NODES={text!r}: wanted a number, or MIN:MAX for nodes that come and go")
    if nodes == (1, 1):
        common["job"] = _job(chosen) or f"megaresnorm-{uuid4().hex}"
        return _plan(common, default_ranks)
    address = chosen.get("MASTER_ADDR")
    elastic = nodes[0] != nodes[1]
    if not address or (not elastic and not chosen.get("NODE_RANK")):
        wanted = "MASTER_ADDR" if elastic else "NODE_RANK and MASTER_ADDR"
        raise ConfigError(f"NODES={text} needs {wanted} on every node")
    check_host("MASTER_ADDR", address)
    port = _setting(chosen, "MASTER_PORT", 1, MAX_PORT, PORT)
    node_rank = None if elastic else _setting(chosen, "NODE_RANK", 0, nodes[1] - 1, 0)
    job = _job(chosen) or f"megaresnorm-{address}-{port}"
    return _plan(
        common | {"nodes": nodes, "node_rank": node_rank, "master": (address, port), "job": job}, default_ranks
    )


def _plan(found: dict[str, Any], default_ranks: Callable[[], int]) -> Plan:
    """The plan; to ask for the number of GPUs takes a second or two, and comes last."""
    return Plan(**found | {"ranks_here": found["ranks_here"] or default_ranks()})


def _job(chosen: Mapping[str, str]) -> str | None:
    job = chosen.get("JOB_ID")
    if job and not re.fullmatch(r"[\w.:@+-]{1,200}", job, re.ASCII):
        raise ConfigError(f"JOB_ID={job[:MAX_SHOWN]!r}: wanted letters, digits and . : @ + - _")
    return job


def check_host(name: str, host: str) -> str:
    """Check that a text can be the name or the address of a host.

    Args:
        name: of the setting.

    Returns:
        The host.

    Raises:
        ConfigError: it has other characters than names and addresses have, or looks like an option.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_.])?", host) and not _is_ipv6(host):
        raise ConfigError(f"{name}={host[:MAX_SHOWN]!r}: wanted the name or the address of a host")
    return host


def _is_ipv6(host: str) -> bool:
    address, _, zone = host.partition("%")
    try:
        socket.inet_pton(socket.AF_INET6, address)
    except (OSError, ValueError):
        return False
    return re.fullmatch(r"[A-Za-z0-9_.-]{0,15}", zone) is not None


def _setting(variables: Mapping[str, str], name: str, least: int, most: int, default: int) -> int:
    text = variables.get(name) or str(default)
    if not is_number(text, least, most):
        raise ConfigError(f"{name}={text[:MAX_SHOWN]!r}: wanted a whole number from {least} to {most}")
    return int(text)
