"""What a rank says of its node: limits, memory, addresses, sockets. Read from the system; nothing is measured."""

import resource
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.errors import ConfigError
from megaresnorm.parallel.addresses import interface_of, is_loopback, local_address_of, names_this_host
from megaresnorm.parallel.environment import Environment, chosen_interface, host_name
from megaresnorm.parallel.shared_memory import CAPACITY, FOLDER
from megaresnorm.parallel.sockets import own_sockets
from megaresnorm.resilience.cluster.check import Check, Verdict, check, some_of
from megaresnorm.resilience.host import host_memory

EVERYWHERE = ("0.0.0.0", "::")
FILES, FILES_A_RANK = 256, 4  # open files: of a rank itself, and of its connections to each other one
PROCESSES = 512  # that a rank may need: threads of torch, NCCL and loaders count
GPU_SHM = 64 << 20  # bytes of shared memory that NCCL takes a rank
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """A rank and its node.

    Attributes:
        machine: tells hosts with one name apart; empty where the system does not tell.
        files, processes, locked: limits on open files, processes and bytes of locked memory; None without one.
        shm: free bytes of shared memory; None without any.
        addresses: local ends of this rank's connections; with the interface, where it is known.
        listening: addresses and ports on which this rank listens.
        memory: free and all bytes of the host; None where unknown.
        device_memory: the same of a GPU.
    """

    rank: int
    local_rank: int
    host: str
    machine: str
    device: str
    files: int | None
    processes: int | None
    locked: int | None
    shm: int | None
    addresses: list[str]
    interfaces: list[str]
    listening: list[str]
    memory: list[int] | None
    device_memory: list[int] | None

    @classmethod
    def here(cls, environment: Environment, device: torch.device) -> "Place":
        """This rank's."""
        sockets, memory = own_sockets(), host_memory()
        connected = Counter(one.address for one in sockets if not one.listening)
        addresses = [address for address, _ in connected.most_common()]
        return cls(
            rank=environment.rank,
            local_rank=environment.local_rank,
            host=host_name(),
            machine=_BOOT.read_text().strip()[:8] if _BOOT.exists() else "",
            device=str(device),
            files=_limit(resource.RLIMIT_NOFILE),
            processes=_limit(resource.RLIMIT_NPROC),
            locked=_limit(resource.RLIMIT_MEMLOCK),
            shm=_free(FOLDER),
            addresses=addresses,
            interfaces=[interface_of(address) or "" for address in addresses],
            listening=[f"{_bracketed(one.address)}:{one.port}" for one in sockets if one.listening],
            memory=None if memory is None else [memory.free, memory.total],
            device_memory=[*torch.cuda.mem_get_info(device)] if device.type == "cuda" else None,
        )


def _limit(what: int) -> int | None:
    soft, _ = resource.getrlimit(what)
    return None if soft == resource.RLIM_INFINITY else soft


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def hosts_of(places: Sequence[Place]) -> dict[str, list[int]]:
    """Ranks by host, in the order of the first of each; two machines with one name are told apart."""
    machines: dict[str, list[str]] = {}
    for place in places:
        if place.machine not in machines.setdefault(place.host, []):
            machines[place.host].append(place.machine)
    found: dict[str, list[int]] = {}
    for place in places:
        alone = len(machines[place.host]) == 1
        found.setdefault(place.host if alone else f"{place.host} ({place.machine})", []).append(place.rank)
    return found


def check_address(environment: Environment) -> None:
    """Check that this rank will not offer others of its job on other nodes a loopback address.

    Several nodes of one machine, which meet on its loopback, may.

    Raises:
        ConfigError: it would.
    """
    if environment.one_node or environment.ranks_here is None or environment.master_addr is None:
        return
    if names_this_host(environment.master_addr):
        return
    chosen = chosen_interface()
    address = local_address_of(environment.master_addr, environment.master_port or 1) if chosen is None else chosen[1]
    if address is not None and is_loopback(address):
        why = f"MASTER_ADDR={environment.master_addr}" if chosen is None else f"GLOO_SOCKET_IFNAME={chosen[0]}"
        raise ConfigError(
            f"{why} is loopback ({address}) on {host_name()}, which other nodes have no way to; name the interface "
            "of the network between them"
        )


def judge_limits(places: Sequence[Place], hosts: dict[str, list[int]], tp: int) -> list[Check]:
    """The verdicts on limits and shared memory of all nodes.

    Args:
        hosts: as of ``hosts_of``.
        tp: tensor-parallel ranks, which share memory where they are on CPUs.
    """
    on_gpus = places[0].device.startswith("cuda")
    most = max(map(len, hosts.values()))
    found = [_files(places)]
    found.append(_least("processes", [p.processes for p in places], places, PROCESSES * most, "ulimit -u"))
    if on_gpus:
        found.append(_least("locked memory", [p.locked for p in places], places, 1 << 40, "ulimit -l unlimited"))
    need = most * GPU_SHM if on_gpus else 2 * tp * CAPACITY * -(-most // tp) if tp > 1 else 0
    shm = [0 if p.shm is None else p.shm for p in places]
    advice = "docker run --shm-size=8g; ranks of a host send through sockets without it, which is slower"
    return [*found, _least("shared memory", shm, places, need, advice, of_bytes=True)]


def _files(places: Sequence[Place]) -> Check:
    """Each rank has a connection to every other one in each of its groups."""
    wanted, least = FILES + FILES_A_RANK * len(places), 64 + len(places)
    limits = [place.files for place in places]
    fails = any(limit is not None and limit < least for limit in limits)
    return _least("open files", limits, places, wanted, "ulimit -n", "FAIL" if fails else "WARN")


def _least(
    name: str,
    values: Sequence[int | None],
    places: Sequence[Place],
    wanted: int,
    advice: str,
    otherwise: Verdict = "WARN",
    *,
    of_bytes: bool = False,
) -> Check:
    """A verdict on the smallest of some limits, of which None is none."""
    known = [(value, place) for value, place in zip(values, places, strict=True) if value is not None]
    low = {place.host: value for value, place in sorted(known, key=lambda one: -one[0]) if value < wanted}
    show = human_bytes if of_bytes or name == "locked memory" else str
    words = [f"{show(value)} on {host}" for host, value in low.items()]
    usual = show(min(value for value, _ in known)) if known else "unlimited"
    asks = f"{advice} {wanted}" if advice.startswith("ulimit") and " un" not in advice else advice
    return check(name, some_of(words) or usual, not low, asks, otherwise, wanted=f"{show(wanted)} or more")


def judge_addresses(places: Sequence[Place], hosts: dict[str, list[int]]) -> list[Check]:
    """The verdicts on the addresses that ranks use, and on those that they listen on."""
    if len(places) == 1:
        return []
    several = len(hosts) > 1
    own = [p for p in places if several and p.addresses and all(map(is_loopback, p.addresses))]
    kinds: dict[str, list[str]] = {}
    for place in places:
        for interface, address in zip(place.interfaces[:1], place.addresses[:1], strict=True):
            kinds.setdefault(interface or "an unknown interface", []).append(address)
    used = [f"{interface} ({some_of(list(dict.fromkeys(each)))})" for interface, each in kinds.items()]
    words = [f"rank {p.rank} on {p.host}: {p.addresses[0]}" for p in own]
    advice = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network between the nodes"
    found = [check("addresses", some_of(words) or some_of(used) or "unknown", not own, advice, "FAIL")]
    wide = [
        f"rank {p.rank} on {p.host}: {where}"
        for p in places
        for where in p.listening
        if where.rpartition(":")[0].strip("[]") in EVERYWHERE
        or (not several and not is_loopback(where.rpartition(":")[0].strip("[]")))
    ]
    count = sum(len(place.listening) for place in places)
    usual = f"{count} listening, each on one address" if count else "none is listening"
    advice = "whoever reaches this host can connect there: name an interface, and close the network to others"
    return [*found, check("ports", some_of(wide) or usual, not wide, advice)]
