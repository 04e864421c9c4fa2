"""What the variables of launchers say: DeepSpeed's, Slurm's, Open MPI's, those of MPICH and Intel MPI, Kubernetes'.

Pure functions of the variables; environment.py and plan.py read those of the process. torchrun's are the common
language: what is found here is put into its words.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from zlib import crc32

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_RANKS, MAX_SHOWN
from megaresnorm.parallel.addresses import is_loopback

PORT = 29500  # where a job has no number of its own
_LOWEST, _PORTS = 15000, 15000  # ports of jobs with a number: below those that systems give away by themselves
_DIGITS = 9  # more than any count or rank has


@dataclass(frozen=True)
class Started:
    """A process that a launcher has started as one of several.

    Attributes:
        by: name of the launcher.
        rank, size: of this process, among how many.
        local_rank, local_size: the same on this node; local_size is None where no variable says.
        master_addr: host of rank 0; None where no variable says.
        job: the launcher's name for the job; None where it has none.
    """

    by: str
    rank: int
    size: int
    local_rank: int
    local_size: int | None
    master_addr: str | None = None
    job: str | None = None

    @property
    def one_node(self) -> bool:
        """Whether all processes are known to be on this node."""
        return self.local_size == self.size

    @property
    def port(self) -> int:
        """A port that the job's other processes come to as well, and those of most other jobs do not."""
        return PORT if self.job is None else _LOWEST + crc32(self.job.encode()) % _PORTS


def started_by(variables: Mapping[str, str]) -> Started | None:
    """How a launcher other than torchrun has started this process; None where none has.

    Raises:
        ConfigError: a launcher's variables contradict each other.
    """
    return _slurm(variables) or _open_mpi(variables) or _hydra(variables)


def _slurm(variables: Mapping[str, str]) -> Started | None:
    """A task of ``srun``. The shell of a batch script or of ``salloc`` is none, although it has most variables."""
    if "SLURM_STEP_NUM_TASKS" not in variables or "SLURM_PROCID" not in variables:
        return None
    size = number("Slurm", variables, "SLURM_STEP_NUM_TASKS", 1, MAX_RANKS)
    nodes = number("Slurm", variables, "SLURM_STEP_NUM_NODES", 1, size, 1)
    node = number("Slurm", variables, "SLURM_NODEID", 0, nodes - 1, 0)
    job = variables.get("SLURM_JOB_ID", "")
    return Started(
        by="Slurm",
        rank=number("Slurm", variables, "SLURM_PROCID", 0, size - 1),
        size=size,
        local_rank=number("Slurm", variables, "SLURM_LOCALID", 0, size - 1, 0),
        local_size=_tasks_of(variables.get("SLURM_STEP_TASKS_PER_NODE", ""), node),
        master_addr=first_host(variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""),
        job=f"slurm-{job}-{variables.get('SLURM_STEP_ID', '0')}" if job else None,
    )


def _open_mpi(variables: Mapping[str, str]) -> Started | None:
    if "OMPI_COMM_WORLD_SIZE" not in variables:
        return None
    size = number("Open MPI", variables, "OMPI_COMM_WORLD_SIZE", 1, MAX_RANKS)
    job = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid")
    return Started(
        by="Open MPI",
        rank=number("Open MPI", variables, "OMPI_COMM_WORLD_RANK", 0, size - 1),
        size=size,
        local_rank=number("Open MPI", variables, "OMPI_COMM_WORLD_LOCAL_RANK", 0, size - 1, 0),
        local_size=number("Open MPI", variables, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, size, 1),
        job=f"mpi-{job}" if job else None,
    )


def _hydra(variables: Mapping[str, str]) -> Started | None:
    """A process of MPICH's or Intel's mpiexec."""
    if "PMI_SIZE" not in variables or "PMI_RANK" not in variables:
        return None
    size = number("MPI", variables, "PMI_SIZE", 1, MAX_RANKS)
    return Started(
        by="MPI",
        rank=number("MPI", variables, "PMI_RANK", 0, size - 1),
        size=size,
        local_rank=number("MPI", variables, "MPI_LOCALRANKID", 0, size - 1, 0),
        local_size=(number("MPI", variables, "MPI_LOCALNRANKS", 1, size) if variables.get("MPI_LOCALNRANKS") else None),
    )


def plan_of(variables: Mapping[str, str]) -> dict[str, str]:
    """What a launcher that has started one process a node says of the job, as the variables that ``read_plan`` reads.

    Raises:
        ConfigError: it has started several processes on this node, or its variables contradict each other.
    """
    started = started_by(variables)
    if started is not None and started.size > 1:
        if started.local_size not in (1, None):
            error = ConfigError(
                f"{started.by} has started {started.local_size} processes on this node, but launch starts all ranks of "
                "a node itself; let it start one a node, or ranks directly: python -m megaresnorm.job RECIPE"
            )
            error.agreed = True  # all of them raise it, and the first one says so
            raise error
        found = {"NODES": str(started.size), "NODE_RANK": str(started.rank), "MASTER_PORT": str(started.port)}
        found |= {"MASTER_ADDR": started.master_addr} if started.master_addr else {}
        return found | ({"JOB_ID": started.job} if started.job else {})
    if "CROSS_SIZE" in variables and "CROSS_RANK" in variables:  # DeepSpeed's, which sets MASTER_ADDR as torchrun does
        if variables.get("LOCAL_SIZE", "1") != "1":
            raise ConfigError(
                f"DeepSpeed has started {variables['LOCAL_SIZE']} processes on this node, but launch starts all ranks "
                "of a node itself; give deepspeed --num_gpus 1, or start ranks directly: --module megaresnorm.job"
            )
        return {"NODES": variables["CROSS_SIZE"], "NODE_RANK": variables["CROSS_RANK"]}
    return _kubernetes(variables)


def _kubernetes(variables: Mapping[str, str]) -> dict[str, str]:
    """Of a pod of an indexed Job, or of Kubeflow, which says it in torchrun's own variables (PET_...)."""
    found = {"NODE_RANK": variables["JOB_COMPLETION_INDEX"]} if "JOB_COMPLETION_INDEX" in variables else {}
    ours = {"PET_NNODES": "NODES", "PET_NODE_RANK": "NODE_RANK", "PET_MASTER_ADDR": "MASTER_ADDR",
            "PET_MASTER_PORT": "MASTER_PORT", "PET_RDZV_ID": "JOB_ID"}  # fmt: skip
    found |= {name: variables[theirs] for theirs, name in ours.items() if variables.get(theirs)}
    if variables.get("PET_NPROC_PER_NODE", "").isdecimal():  # else "auto", "gpu" or "cpu"
        found["RANKS_PER_NODE"] = variables["PET_NPROC_PER_NODE"]
    host, colon, port = variables.get("PET_RDZV_ENDPOINT", "").rpartition(":")
    if colon and port.isdecimal():
        found = {"MASTER_ADDR": host.strip("[]"), "MASTER_PORT": port} | found
    is_job = "KUBERNETES_SERVICE_HOST" in variables and "LOCAL_RANK" not in variables and "WORLD_SIZE" in variables
    if is_job and "NODES" not in found:  # PyTorchJob before PET_NNODES: its ranks are pods
        found["NODES"] = variables["WORLD_SIZE"]
    if "NODES" in found and "NODE_RANK" not in found and (is_job or "PET_NNODES" in variables):
        # An elastic PyTorchJob of a fixed size numbers its pods in their names alone.
        last = re.fullmatch(r".*-worker-(\d{1,5})", variables.get("HOSTNAME", ""))
        rank = variables.get("RANK") or (last and last[1])
        found |= {"NODE_RANK": rank} if rank and ":" not in found["NODES"] else {}
    return found


def first_host(nodes: str) -> str | None:
    """The first host of a list of Slurm's.

    >>> first_host("n[01-03,7],m1"), first_host("gpu-a,gpu-b"), first_host("r[2-3]n[10-11]"), first_host("")
    ('n01', 'gpu-a', 'r2n10', None)
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else None


def address_in_batch(variables: Mapping[str, str], host: str) -> str | None:
    """The address of a job's first node, as Slurm tells it to the tasks of a batch script, which runs there.

    Args:
        host: Slurm's name of that node.

    Returns:
        None for another node, and where srun was given elsewhere: by hand in an allocation, on a login node.
    """
    address = variables.get("SLURM_LAUNCH_NODE_IPADDR", "")
    in_batch = variables.get("ENVIRONMENT") == "BATCH" and host == first_host(variables.get("SLURM_JOB_NODELIST", ""))
    return address if address and in_batch and not is_loopback(address) else None


def _tasks_of(text: str, node: int) -> int | None:
    """How many tasks a node has, by Slurm's ``2(x3),1``: three nodes with two tasks, then one with one."""
    for part in text.split(","):
        found = re.fullmatch(r"(\d{1,7})(?:\(x(\d{1,7})\))?", part)
        if found is None:
            return None
        node -= int(found[2] or 1)
        if node < 0:
            return int(found[1])
    return None


def number(
    whose: str, variables: Mapping[str, str], name: str, least: int, most: int, default: int | None = None
) -> int:
    """The number in a variable.

    Args:
        whose: the launcher that sets it.
        default: where it is not set; None where it must be.

    Raises:
        ConfigError: it is not a whole number in its range.
    """
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not is_number(text, least, most):
        found = "is not set" if text is None else f"is {text[:MAX_SHOWN]!r}"
        start = "start with megaresnorm launch, or unset WORLD_SIZE"
        raise ConfigError(
            f"the environment is not {whose}'s: {name} {found}, wanted a whole number from {least} to {most}; "
            f"{start if whose == 'torchrun' else 'unset it to start one process'}"
        )
    return int(text)


def is_number(text: str, least: int, most: int) -> bool:
    """Whether a text is a whole number in a range, in ASCII digits."""
    return text.isascii() and text.isdecimal() and len(text) <= _DIGITS and least <= int(text) <= most
