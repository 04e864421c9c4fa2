"""torchrun as a supervisor starts it: it leaves signals to the supervisor, and ends with its supervisor.

Thirty seconds after a SIGTERM torchrun by itself would kill ranks that have not saved yet. Here it never hears of one:
signals are blocked, a thread passes them on to the supervisor, and the ranks inherit the mask, so that a signal that
comes while a rank is still importing torch waits until somebody listens (resilience/signals.py).

Where several nodes meet on this one, it keeps their store, on the one address that the supervisor listens on.
"""

import logging
import os
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from megaresnorm.errors import LostRankError
from megaresnorm.parallel.environment import host_name, listening_socket, node_number, read_environment
from megaresnorm.resilience.beats import STEP, Beats
from megaresnorm.resilience.hang_report import WRITING
from megaresnorm.resilience.launcher import SIGNALS, Failure, Launcher, children, end_with, kill
from megaresnorm.resilience.neighbours import CONNECT, Neighbours
from megaresnorm.resilience.watcher import Watcher, ends_ranks, known_hosts, slots_of
from megaresnorm.text import say

BLOCKED = (*SIGNALS, signal.SIGHUP)


def main() -> None:
    """Run torchrun with the arguments of this process; its parent is the supervisor."""
    supervisor = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    folder = read_environment().launcher
    assert folder is not None, "the supervisor names it"
    launcher = Launcher(folder)
    threading.Thread(target=_pass_on, args=(supervisor,), name="signals", daemon=True).start()
    end_with(supervisor, launcher, first=_kill_ranks)
    deaths = Deaths(launcher, _watch(launcher))
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addHandler(_Failed(deaths))
    _see_all_that_failed(deaths)
    if (node := node_number()) is not None:
        _number_this_node(node)
    store = None
    if (listener := listening_socket()) is not None:
        descriptor, address, port = listener
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    try:
        torchrun(sys.argv[1:])
    except (SignalException, ChildFailedError):  # the supervisor's SIGQUIT; ranks that are not to be started again
        sys.exit(1)
    except (RendezvousError, DistError) as e:
        if launcher.asked_to_stop():  # node 0, which keeps the store, has ended a moment sooner
            sys.exit(LostRankError.exit_code)
        reason = str(e).splitlines()[0].partition(".")[0]
        say(
            f"megaresnorm: error: this node and the one at MASTER_ADDR did not meet ({reason}): node 0 has ended, or "
            "its --job or --nodes differ from those here",
            error=True,
        )
        sys.exit(LostRankError.exit_code)
    finally:
        del store  # other nodes have used it until here


def _number_this_node(node: int) -> None:
    """Let torchrun number the nodes as the job does, so that rank 0 is on node 0: by itself it sorts their addresses.

    The last number of a node's description there only tells rendezvous of one process apart, of which this has one.
    """
    try:
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _NodeDescGenerator
    except ImportError:  # a later torch: rank 0 may be on another node, which changes where its lines are printed
        return
    if "local_id" not in {field.name for field in fields(_NodeDesc)}:
        return
    generate = _NodeDescGenerator.generate

    def numbered(self: _NodeDescGenerator, local_addr: str | None = None) -> _NodeDesc:
        return replace(generate(self, local_addr), local_id=node)

    def comes_first(self: _NodeDesc, other: _NodeDesc) -> bool:
        return self.local_id < other.local_id

    _NodeDescGenerator.generate = numbered  # type: ignore[method-assign]
    _NodeDesc.__lt__ = comes_first  # type: ignore[method-assign, assignment]


class Deaths:
    """Notes ranks of this node that have died by themselves: for the supervisor, and in the run's events.jsonl.

    A rank that a signal has killed could not do so itself. Not noted are ranks that end because they were asked to, or
    were killed since they hung, and those that only lost another rank.

    Args:
        launcher: the node's files; there the ranks have said where the run's folder is.
        beats: in which they have told their steps; None where nobody knows these.
    """

    def __init__(self, launcher: Launcher, beats: Beats | None = None) -> None:
        self._launcher, self._beats = launcher, beats
        self._noted: set[tuple[int, int]] = set()

    def note(self, code: int, local_rank: int) -> None:
        """Note the end of a rank, once in a start of the ranks.

        Args:
            code: its exit code; - the signal that has killed it.
        """
        if -code == signal.SIGTERM:
            return
        launcher, attempt = self._launcher, self._launcher.read("attempt") or 0
        rank = launcher.ranks().get(local_rank, local_rank)
        if code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            hint = "; was its memory used up? (dmesg)" if -code == signal.SIGKILL else ""
            with suppress(OSError):
                launcher.note_failure(Failure(rank, host_name(), f"killed by {name}{hint}", 128 - code), attempt)
        failure = launcher.failure() if launcher.last_failed == attempt else None
        if failure is None or failure.rank != rank or failure.exit_code == LostRankError.exit_code:
            return  # of another rank, which has caused this, or of a hang, which is noted as such
        ended = launcher.asked_to_stop() or (code < 0 and launcher.read("end") is not None)
        output = launcher.read_json("run").get("output")
        if not ended and isinstance(output, str) and (attempt, rank) not in self._noted:
            self._noted.add((attempt, rank))
            step = 0 if self._beats is None else self._beats.read(local_rank).words[STEP]
            _write_down(Path(output), failure, step)


def _write_down(output: Path, failure: Failure, step: int) -> None:
    """Append a death to a run's events, unless that takes too long: what has killed a rank may be the folder's disk."""
    from megaresnorm.telemetry.incidents import Incidents

    about = {"rank": failure.rank, "host": failure.host, "exit_code": failure.exit_code}
    arguments = ("died", step, failure.line)
    thread = threading.Thread(target=Incidents(output).note, args=arguments, kwargs=about, daemon=True)
    thread.start()
    thread.join(WRITING)


class _Failed(logging.Handler):
    """Hears which rank has failed first: torchrun logs its exit code."""

    def __init__(self, deaths: Deaths) -> None:
        super().__init__(logging.ERROR)
        self._deaths = deaths

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        if not str(record.msg).startswith("failed (exitcode: %s) local_rank: %s") or len(arguments) < 2:
            return
        code, local_rank = arguments[:2]
        if isinstance(code, int) and isinstance(local_rank, int):
            self._deaths.note(code, local_rank)


def _see_all_that_failed(deaths: Deaths) -> None:
    """Note a rank that has died, also where another, which has lost it, is the one that torchrun logs.

    Before torchrun ends the other ranks it looks which have failed by themselves.
    """
    try:
        from torch.distributed.elastic.multiprocessing.api import SubprocessContext

        look = SubprocessContext._capture_process_failures
    except (ImportError, AttributeError):  # a later torch, of which the log alone is heard
        return

    def seen(self: SubprocessContext, done_local_ranks: set[int]) -> None:
        known = bool(self._failures)
        look(self, done_local_ranks)
        for failure in () if known else self._failures.values():
            deaths.note(failure.exitcode, failure.local_rank)

    SubprocessContext._capture_process_failures = seen  # type: ignore[method-assign]


def _watch(launcher: Launcher) -> Beats:
    """Watch the ranks of this node: they tell what they are at in memory that they open through this process."""
    num_ranks = int(sys.argv[sys.argv.index("--nproc-per-node") + 1])
    beats, descriptor = Beats.make(num_ranks)
    with suppress(OSError):  # a full /tmp: then ranks that hang are ended by the time-outs of their groups
        launcher.write("agent", os.getpid())
        launcher.write("beats", descriptor)
    others = _neighbours(launcher)
    Watcher(slots_of(beats, num_ranks), ends_ranks(launcher, others), others).start()
    return beats


def _neighbours(launcher: Launcher) -> Neighbours | None:
    """The watchers of other nodes, which meet in the store of torchrun's rendezvous; None where there is one node."""
    given = dict(zip(sys.argv, sys.argv[1:], strict=False))
    if "store_type=tcp" not in given["--rdzv-conf"]:
        return None
    host, _, port = given["--rdzv-endpoint"].rpartition(":")

    def connect() -> Any:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        wait = timedelta(seconds=CONNECT)
        store = TCPStore(host.strip("[]"), int(port), is_master=False, wait_for_workers=False, timeout=wait)
        return PrefixStore(f"megaresnorm/hang/{given['--rdzv-id']}", store)

    return Neighbours(connect, lambda: known_hosts(launcher))


def _kill_ranks() -> None:
    for rank in children(os.getpid()):
        kill(rank)


def _pass_on(supervisor: int) -> None:
    while True:
        kill(supervisor, signal.Signals(signal.sigwait(BLOCKED)))


if __name__ == "__main__":
    main()
