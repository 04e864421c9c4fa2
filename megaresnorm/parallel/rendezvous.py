"""Small agreements of all ranks before they have a process group, over torch's store.

Nothing is pickled, and no rank waits in silence.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from hashlib import sha256
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megaresnorm.errors import LostRankError, UserError, error_of
from megaresnorm.parallel.addresses import listen, local_address_of
from megaresnorm.parallel.environment import Environment, master_here, use_interface
from megaresnorm.parallel.mesh import TIMEOUT

log = logging.getLogger(__name__)
T = TypeVar("T")
Facts = Mapping[str, str]
LOOK = 0.05  # seconds between two looks into the store
LAST_WORDS = 10.0  # seconds that rank 0 waits at its end for others to have read why
SILENT = 10.0  # seconds of waiting before the first log line about it, and between two
LONGEST_FACT = 200  # characters; values up to there are compared as they are, longer ones by their digest
_meetings = count()  # every rank holds the same meetings in the same order


def open_store(environment: Environment, timeout: float = TIMEOUT) -> Store:
    """The store through which the ranks of a job find each other. All of them must open it.

    On one node under a supervisor it is a file in a private folder, so that nothing listens on a port. Elsewhere
    rank 0 listens on the address that torchrun gives, and on no other.

    Args:
        timeout: seconds in which rank 0 must be there.

    Communication:
        One TCP connection to rank 0, or to torchrun's own store; none with a file.

    Raises:
        LostRankError: rank 0 cannot listen on its address.
    """
    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if environment.launcher is not None and environment.one_node:
        # torchrun takes another port for every start of the ranks.
        round_of = f"{environment.attempt}-{environment.master_port}"
        return FileStore(str(environment.launcher / f"ranks-{round_of}"), environment.world_size)
    assert environment.master_addr is not None and environment.master_port is not None
    listens = environment.rank == 0 and not environment.agent_store
    host, port = master_here(environment.master_addr), environment.master_port
    if not environment.one_node and environment.launcher is None:  # nobody has told this rank
        use_interface(local_address_of(host, port))
    if listens and not environment.one_node:
        host = local_address_of(host, port) or host
    store = TCPStore(
        host,
        port,
        environment.world_size,
        is_master=listens,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=_listen(host, port) if listens else None,
    )
    # torchrun's own store outlives the ranks, so each attempt has names of its own there. Rank 0's store is a new one
    # for every start of the ranks and gets no prefix: nodes may count their attempts differently, since torchrun does
    # not count those that other nodes have brought about.
    return PrefixStore(f"attempt-{environment.attempt}", store) if environment.agent_store else store


def _listen(address: str, port: int) -> int:
    """A listening socket on one address; torch's own would be on all.

    Raises:
        LostRankError: it cannot listen there. Started again by torchrun, the ranks get another port.
    """
    try:
        return listen(address, port)
    except OSError as e:
        raise LostRankError(
            f"MASTER_ADDR={address} MASTER_PORT={port}: rank 0 cannot listen there ({e.strerror}); "
            "MASTER_ADDR must be an address of the node of rank 0"
        ) from None


def agree(
    work: Callable[[], T], facts: Callable[[T], Facts], environment: Environment, store: Store, timeout: float
) -> T:
    """Run ``work`` on every rank, which must fail on none and give the same facts on all. Collective.

    Args:
        facts: result of ``work`` -> values by name, in which all ranks must agree.
        timeout: seconds that this rank, which has done its work, waits for the others.

    Returns:
        What ``work`` returned on this rank.

    Communication:
        Through the store: each rank writes one message of JSON, rank 0 reads them all, and all read its verdict.

    Raises:
        UserError: on all ranks, that of the first rank that has one.
        ConfigError: on all ranks; it names the first fact that differs, and the rank.
        LostRankError: another rank had any other exception, which it raises itself, or did not answer.
    """
    meeting = PrefixStore(f"megaresnorm/{next(_meetings)}", store)
    error: UserError | None = None
    found: dict[str, str] = {}
    try:
        result = work()
        found = {name: _short(value) for name, value in facts(result).items()}
        said: dict[str, Any] = {"facts": found}
    except UserError as e:
        error, said = e, {"kind": type(e).__name__, "error": str(e), "exit_code": e.exit_code}
    except Exception as e:
        meeting.set(f"rank-{environment.rank}", json.dumps(_unexpected(e)))
        raise
    meeting.set(f"rank-{environment.rank}", json.dumps(said))
    if environment.rank == 0:
        meeting.set("verdict", json.dumps(_verdict(meeting, said, environment.world_size, timeout)))
    _wait_for(meeting, ["verdict"], environment, timeout)
    verdict = json.loads(meeting.get("verdict"))
    if verdict is not None:
        meeting.set(f"heard-{environment.rank}", "")
        if environment.rank == 0:  # which may keep the store
            wait_until_heard(meeting, [f"heard-{rank}" for rank in range(environment.world_size)])
        rank = verdict.get("rank", 0)
        line = f"rank {rank}: {verdict['error']}" if rank else verdict["error"]
        raise error_of(verdict["kind"], line, verdict.get("exit_code")) from error
    return result


def _verdict(meeting: Store, mine: dict[str, Any], world_size: int, timeout: float) -> dict[str, Any] | None:
    """Read what all ranks have said, on rank 0: the error that all shall raise, or None to go on."""
    _wait_for(meeting, [f"rank-{rank}" for rank in range(world_size)], None, timeout)
    everyone = [json.loads(meeting.get(f"rank-{rank}")) for rank in range(world_size)]
    for rank, said in enumerate(everyone):
        if "error" in said:
            return {"rank": rank, **said}
    for rank, said in enumerate(everyone):
        theirs, ours = said["facts"], mine["facts"]
        for name in ours | theirs:
            if theirs.get(name) != ours.get(name):
                line = (
                    f"{name} is {theirs.get(name, 'not set')} on rank {rank} and {ours.get(name, 'not set')} on rank "
                    "0; all ranks must start from the same recipe, program and data"
                )
                return {"kind": "ConfigError", "error": line}
    return None


def wait_until_heard(store: Store, names: list[str]) -> None:
    """Wait until other ranks have set all of these names, at most for ``LAST_WORDS``.

    The process that keeps the store may not end before they have read.

    Communication:
        One look into the store for each missing name every ``LOOK`` seconds.
    """
    end = time.monotonic() + LAST_WORDS
    with suppress(dist.DistError):
        while time.monotonic() < end and (names := [name for name in names if not store.check([name])]):
            time.sleep(LOOK)


def _wait_for(meeting: Store, names: list[str], environment: Environment | None, timeout: float) -> None:
    """Wait until all names are in the store.

    Args:
        environment: that of a rank that waits for rank 0; None on rank 0, which waits for all, and says so.

    Raises:
        LostRankError: ``timeout`` is over, or the store is gone.
    """
    started = said = time.monotonic()
    missing = list(names)
    try:
        while missing := [name for name in missing if not meeting.check([name])]:
            now = time.monotonic()
            if now > started + timeout:
                absent = ", ".join(missing[:4]).replace("-", " ")
                who = f"{absent} did not come" if environment is None else "rank 0 did not answer"
                raise LostRankError(f"{who} within {timeout:g} s (watchdog.start); start again to go on")
            if environment is None and now > said + SILENT:
                said = now
                log.info("waiting for %d of %d ranks, the first is %s", len(missing), len(names), missing[0][5:])
            time.sleep(LOOK)
    except dist.DistError as e:
        raise LostRankError(f"rank 0 is gone ({str(e).splitlines()[0]}); start again to go on") from None


def _unexpected(error: Exception) -> dict[str, Any]:
    return {"kind": LostRankError.__name__, "error": f"failed: {type(error).__name__}: {error}".splitlines()[0]}


def _short(value: str) -> str:
    return (
        value if len(value) <= LONGEST_FACT else f"{value[:40]}... (SHA-256 {sha256(value.encode()).hexdigest()[:12]})"
    )
