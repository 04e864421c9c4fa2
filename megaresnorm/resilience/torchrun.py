"""How a supervisor starts torchrun on its node: arguments, environment, limits."""

import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from megaresnorm.parallel.environment import ELASTIC, LAUNCHER, LOGS, MAX_RESTARTS, NODE, STORE, use_interface
from megaresnorm.parallel.plan import UNLIMITED, Plan
from megaresnorm.resilience.host import available_cores

JOIN = 30 * 24 * 3600  # seconds that a node waits for others; its supervisor says so, and a signal ends it
CONNECT = 900  # seconds that it waits for the rendezvous node, which may be installing an environment first
OPEN_FILES = 65536  # a rank has sockets to others, shared memory, files of data; systems give 1024 unless asked


def torchrun_command(plan: Plan, folder: Path, local_address: str | None) -> list[str]:
    """The command that starts torchrun, with all that it could also take from PET_... variables.

    The rendezvous of one node is a file: nothing listens on a port.
    """
    if plan.master is None:
        conf, endpoint = "store_type=file", str(folder / "rendezvous")
    else:
        host, port = plan.master
        # The agent itself keeps the store, on one address; torchrun's would be on all.
        conf = f"store_type=tcp,is_host=0,join_timeout={JOIN},read_timeout={CONNECT}"
        endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    restarts = UNLIMITED if plan.max_restarts else 0  # ranks count those without progress (opening.py)
    # Not torchrun's static rendezvous, in which nodes would not hear that another restarts its ranks, or has ended.
    return [
        *(sys.executable, "-m", "megaresnorm.resilience.agent"),
        *("--nnodes", f"{plan.nodes[0]}:{plan.nodes[1]}", "--nproc-per-node", str(plan.ranks_here)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", plan.job, "--rdzv-conf", conf),
        *("--max-restarts", str(restarts), "--monitor-interval", "0.1", "--signals-to-handle", "SIGQUIT"),
        *("--log-dir", str(folder / "torchrun")),  # else it leaves a folder behind
        *(() if local_address is None else ("--local-addr", local_address)),
        *("-m", "megaresnorm.cli", plan.command),
    ]  # fmt: skip


def environment_of(plan: Plan, variables: Mapping[str, str], folder: Path, local_address: str | None) -> dict[str, str]:
    """Environment variables of torchrun and its ranks.

    Network libraries use the interface of ``local_address``; with one node, none but loopback.
    """
    ours = {name: value for name, value in variables.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    for left in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", ELASTIC, LOGS):
        ours.pop(left, None)
    for left in ("CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE", NODE, STORE):
        if ours.pop(left, None) is not None and left == "CROSS_SIZE":
            ours.pop("CUDA_VISIBLE_DEVICES", None)  # DeepSpeed has started one process here, and shows it one GPU
    ours |= {LAUNCHER: str(folder), MAX_RESTARTS: str(plan.max_restarts)}
    # Workers that share the launcher's store find dead addresses in it after a restart.
    ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Threads of several ranks would compete for the cores.
    ours.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // plan.ranks_here)))
    if plan.elastic:
        ours[ELASTIC] = "1"
    if plan.node_rank is not None:
        ours[NODE] = str(plan.node_rank)
    if plan.logs is not None:
        ours[LOGS] = str(plan.logs)
    use_interface("127.0.0.1" if plan.master is None else local_address, ours)
    return ours


def raise_limits() -> None:
    """Let this process and its children open ``OPEN_FILES`` files, or as many as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
