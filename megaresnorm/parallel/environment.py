"""The place of this process among the ranks of a job.

The variables that launchers and supervisors set are read here, and in plan.py where it is about starting ranks. One
variable alone does not make this a rank. Without WORLD_SIZE, or a launcher's own variables, it is one process, whatever
RANK an old shell still holds.
"""

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_RANKS, MAX_SHOWN
from megaresnorm.parallel.addresses import address_by_slurm, address_of, interface_of, resolved
from megaresnorm.parallel.launchers import Started, address_in_batch, number, started_by

LAUNCHER = "MEGARESNORM_LAUNCHER"  # a private folder of this node's ranks and their supervisor
ELASTIC = "MEGARESNORM_ELASTIC"  # nodes may come and go
MAX_RESTARTS = "MEGARESNORM_MAX_RESTARTS"  # how often ranks are started again without a new checkpoint
LOGS = "MEGARESNORM_LOGS"  # folder into which each rank of this node writes what it prints
STORE = "MEGARESNORM_STORE"  # descriptor of the socket on which torchrun's rendezvous listens on this node
DRILL = "MEGARESNORM_DRILL"  # faults are injected on purpose, as the recipe says too
NODE = "MEGARESNORM_NODE"  # which node this is, from 0, for torchrun; not set where nodes may come and go
MAX_PORT = 65535


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
        drill: whether faults are to be injected, as the recipe must say too.
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
    drill: bool = False

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
        "drill": found.get(DRILL) == "1",
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
        drill=found.get(DRILL) == "1",
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


def share_cores(available: int, ranks_here: int | None, variables: MutableMapping[str, str] | None = None) -> None:
    """Let a rank have its share of the node's cores as threads, unless a variable says how many. Before torch is there.

    Args:
        available: cores that this process may use; a launcher may have bound it to fewer than its share.
        ranks_here: number of ranks on this node; None where no variable says.
    """
    variables = os.environ if variables is None else variables
    share = (os.cpu_count() or 1) // (ranks_here or 1)
    variables.setdefault("OMP_NUM_THREADS", str(max(1, min(available, share))))


def is_in_allocation(variables: Mapping[str, str] | None = None) -> bool:
    """Whether this process is in an allocation of Slurm, in which srun starts tasks at once."""
    return bool((os.environ if variables is None else variables).get("SLURM_JOB_ID"))


def is_in_pod(variables: Mapping[str, str] | None = None) -> bool:
    """Whether this process is in a pod of Kubernetes."""
    return "KUBERNETES_SERVICE_HOST" in (os.environ if variables is None else variables)


def is_copied(variables: Mapping[str, str] | None = None) -> bool:
    """Whether the terminal of this process is one of Open MPI's, which copies all that is written there elsewhere."""
    return "OMPI_COMM_WORLD_SIZE" in (os.environ if variables is None else variables)


def under_nsight() -> bool:
    """Whether NVIDIA Nsight Systems is recording this process, which it says by a variable."""
    return "NSYS_PROFILING_SESSION_ID" in os.environ


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
    if not is_in_allocation(variables) or resolved(host):
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


def chosen_interface(variables: Mapping[str, str] | None = None) -> tuple[str, str | None] | None:
    """Name and address of the network interface that gloo is to use; None where no variable says."""
    name = (os.environ if variables is None else variables).get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    return (name, address_of(name)) if name else None
