"""The place of this process among the ranks of a job, and how the ranks of a node are to be started.

The variables that torchrun sets, and those that launch/torchrun.sh takes and sets, are read here and nowhere else. One
variable alone does not make this a rank. Without WORLD_SIZE it is one process, whatever RANK an old shell still holds.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from megaresnorm.errors import ConfigError
from megaresnorm.limits import MAX_RANKS

LAUNCHER = "MEGARESNORM_LAUNCHER"  # a private folder of this node's ranks and their supervisor
ELASTIC = "MEGARESNORM_ELASTIC"  # nodes may come and go
MAX_RESTARTS = "MEGARESNORM_MAX_RESTARTS"  # how often ranks are started again without a new checkpoint
MAX_PORT = 65535
UNLIMITED = 1_000_000  # torchrun's own limit of restarts; ranks count by progress (resilience/signals.py)


@dataclass(frozen=True)
class Environment:
    """The place of this process in its job. The defaults are one process that torchrun has not started.

    Attributes:
        rank, local_rank, world_size: as torchrun has them.
        ranks_here: number of ranks on this node; None where no variable says.
        master_addr, master_port: where rank 0 can be reached; None in one process.
        agent_store: whether torchrun itself keeps the store there.
        attempt: how often torchrun has started the ranks again because one died.
        max_restarts: how often it may do so without a new checkpoint; None where no variable says.
        job: torchrun's name for the job; None where it has none of its own.
        launcher: private folder of launch/torchrun.sh; None without it.
        elastic: whether nodes may come and go.
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
    elastic: bool = False

    @property
    def one_node(self) -> bool:
        """Whether all ranks are known to be on this node."""
        return self.ranks_here == self.world_size


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """The environment of this process.

    Args:
        variables: to be read in place of the process's own.

    Raises:
        ConfigError: only some of torchrun's variables are set, or one is not a number in its range.
    """
    found = os.environ if variables is None else variables
    job = found.get("TORCHELASTIC_RUN_ID", "none")
    common = {
        "job": None if job in ("none", "") else job,
        "launcher": Path(found[LAUNCHER]) if found.get(LAUNCHER) else None,
        "elastic": ELASTIC in found,
    }
    if "WORLD_SIZE" not in found:
        return Environment(**common)  # type: ignore[arg-type]
    world_size = _number(found, "WORLD_SIZE", 1, MAX_RANKS)
    if world_size > 1:
        missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not found.get(n)]
        if missing:
            raise ConfigError(
                f"the environment is not torchrun's: WORLD_SIZE={world_size}, but {', '.join(missing)} missing; "
                "start with bash launch/torchrun.sh, or unset WORLD_SIZE"
            )
    return Environment(
        rank=_number(found, "RANK", 0, world_size - 1, 0),
        local_rank=_number(found, "LOCAL_RANK", 0, world_size - 1, 0),
        world_size=world_size,
        ranks_here=_number(found, "LOCAL_WORLD_SIZE", 1, world_size) if found.get("LOCAL_WORLD_SIZE") else None,
        master_addr=found.get("MASTER_ADDR"),
        master_port=_number(found, "MASTER_PORT", 0, MAX_PORT, 0) if world_size > 1 else None,
        agent_store=found.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(found, "TORCHELASTIC_RESTART_COUNT", 0, MAX_RANKS, 0),
        max_restarts=_number(found, MAX_RESTARTS, 0, MAX_RANKS) if MAX_RESTARTS in found else None,
        **common,  # type: ignore[arg-type]
    )


def _number(found: Mapping[str, str], name: str, least: int, most: int, default: int | None = None) -> int:
    text = found.get(name)
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal()) or len(text) > 9 or not least <= int(text) <= most:
        raise ConfigError(
            f"the environment is not torchrun's: {name}={text!r}, wanted a whole number from {least} to {most}; "
            "start with bash launch/torchrun.sh, or unset WORLD_SIZE"
        )
    return int(text)


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
    """

    ranks_here: int
    nodes: tuple[int, int] = (1, 1)
    node_rank: int | None = None
    master: tuple[str, int] | None = None
    job: str = ""
    max_restarts: int = 3

    @property
    def elastic(self) -> bool:
        """Whether nodes may come and go."""
        return self.nodes[0] != self.nodes[1]


def read_plan(default_ranks: Callable[[], int], variables: Mapping[str, str] | None = None) -> Plan:
    """The plan that the variables of launch/torchrun.sh describe; its --help lists them.

    Args:
        default_ranks: gives the number of ranks of this node where no variable says.
        variables: to be read in place of the process's own.

    Raises:
        ConfigError: one is missing or cannot be used.
    """
    variables = os.environ if variables is None else variables
    named = variables.get("RANKS_PER_NODE")
    ranks_here = _setting(variables, "RANKS_PER_NODE", 1, 1024, 1) if named else default_ranks()
    max_restarts = _setting(variables, "MAX_RESTARTS", 0, UNLIMITED, 3)
    text = variables.get("NODES") or "1"
    match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    nodes = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if not 1 <= nodes[0] <= nodes[1]:
        raise ConfigError(f"NODES={text!r}: wanted a number, or MIN:MAX for nodes that come and go")
    if nodes == (1, 1):
        return Plan(ranks_here, job=variables.get("JOB_ID") or f"megaresnorm-{uuid4().hex}", max_restarts=max_restarts)
    address = variables.get("MASTER_ADDR")
    elastic = nodes[0] != nodes[1]
    if not address or (not elastic and not variables.get("NODE_RANK")):
        wanted = "MASTER_ADDR" if elastic else "NODE_RANK and MASTER_ADDR"
        raise ConfigError(f"NODES={text} needs {wanted} on every node")
    port = _setting(variables, "MASTER_PORT", 1, MAX_PORT, 29500)
    node_rank = None if elastic else _setting(variables, "NODE_RANK", 0, nodes[1] - 1, 0)
    job = variables.get("JOB_ID") or f"megaresnorm-{address}-{port}"
    return Plan(ranks_here, nodes, node_rank, (address, port), job, max_restarts)


def _setting(variables: Mapping[str, str], name: str, least: int, most: int, default: int) -> int:
    text = variables.get(name) or str(default)
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text!r}: wanted a whole number from {least} to {most}")
    return int(text)
