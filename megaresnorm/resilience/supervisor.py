"""The process of a node under every launcher: it starts torchrun with the node's ranks, and hears signals for all.

A signal saves a checkpoint, however long that takes; before the first step, when there is nothing to save, it ends the
ranks at once. A second one ends them at once in any case. Whatever ends this process ends the job on this node.
"""

import errno
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megaresnorm.errors import ConfigError, LostRankError
from megaresnorm.parallel.addresses import answers, listen_where_reached, local_address_of, resolved
from megaresnorm.parallel.environment import LAUNCHER, STORE, host_name, is_in_pod, master_here
from megaresnorm.parallel.plan import Plan, read_plan
from megaresnorm.resilience.hearing import Hearing
from megaresnorm.resilience.launcher import PREFIX, Launcher, children, kill
from megaresnorm.resilience.processes import end_without, launchers, processes_with
from megaresnorm.resilience.rank_logs import Followed, make_logs
from megaresnorm.resilience.signals import exit_reason
from megaresnorm.resilience.torchrun import CONNECT, JOIN, environment_of, raise_limits, torchrun_command
from megaresnorm.text import say

GRACE = 1.0  # seconds between asking torchrun to end and killing it
# Seconds that torchrun may wait for those of other nodes once its ranks have ended on purpose; by itself it waits 300.
BARRIER = 20.0
LAST_WORDS = 4.0  # seconds for the other ranks to end, once one has ended on purpose before the first step
SILENT = 5.0  # seconds of waiting for other nodes before the first message about it
EVERY = 60.0  # seconds between two such messages
NEXT_TURN = 128 + signal.SIGUSR1  # exit code of a run that is to go on in its next turn


class Supervisor:
    """Hears signals from its construction on, and runs one torchrun to its end."""

    def __init__(self) -> None:
        self._ended = float("inf")  # when a rank was seen to have ended on purpose
        # When ranks of this node were last seen; inf before that, and always where the system does not tell.
        self._ranks_seen = float("inf")
        self._starts, self._last_ranks = 0, set[int]()  # of the ranks, since the newest checkpoint
        self._said_starts = 0  # what was said of these starts
        self._said_failure = -1  # attempt whose failure was said
        self._progress: int | None = None  # attempt of that checkpoint
        self._hearing = Hearing(self._pass_on)

    def run(self, plan: Plan, arguments: Sequence[str]) -> int:
        """Run the job to its end, and return its exit code.

        Args:
            arguments: of the plan's command.

        Raises:
            ConfigError: this node cannot listen at the address of the job, that name does not resolve, or logs cannot
                be written.
            OSError: the folder for temporary files cannot be written.
        """
        self._plan, self._arguments = plan, arguments
        if plan.attached:
            end_without(launchers(), lambda: signal.raise_signal(signal.SIGHUP), self._end_all_now)
        if plan.logs is not None:
            make_logs(plan.logs)
        raise_limits()
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
            self._launcher = Launcher(Path(folder))
            if self._hearing.stop:  # the signal came when the folder was not there yet
                return self._hearing.stop
            lock = self._launcher.lock()
            try:
                return self._run(Path(folder))
            finally:
                os.close(lock)

    def _run(self, folder: Path) -> int:
        if self._plan.master is not None:
            host, port = self._plan.master
            self._plan = replace(self._plan, master=(master_here(host), port))
        local_address = None if self._plan.master is None else self._await_address(*self._plan.master)
        if self._hearing.stop:
            return self._hearing.stop
        environment = environment_of(self._plan, os.environ, folder, local_address)
        store = self._listen()
        if store is not None:
            environment[STORE] = str(store)
        logs = self._plan.logs
        self._followed = None if logs is None else Followed(logs, lambda: self._launcher.ranks().values())
        self._torchrun = subprocess.Popen(
            [*torchrun_command(self._plan, folder, local_address), *self._arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone
            pass_fds=() if store is None else (store,),
        )
        if store is not None:
            os.close(store)
        try:
            self._wait()
        finally:
            self._end_all()
        return self._last_word()

    def _last_word(self) -> int:
        """The exit code. The first error of this node's ranks is said once more, behind those that it has caused."""
        if self._followed is not None:
            self._followed.print_new(last=True)
        end, failure = self._launcher.read("end"), self._launcher.failure()
        code = end if end is not None else self._hearing.stop or self._torchrun.returncode
        saved = self._plan.saved if not self._plan.node_rank else None
        if saved is not None and code == NEXT_TURN and self._launcher.read("progress") is not None:
            saved.touch()
        if end is None and self._hearing.stop and not self._hearing.again:  # of a second one it was said
            begun = self._launcher.read("begun") is not None
            why = "ended without saving" if begun else "nothing was to be saved"
            self._say(f"{exit_reason(self._hearing.stop)}: {why}")
        elif end is None and failure is None and code < 0:
            self._say(f"error: torchrun on {host_name()} was killed by {exit_reason(128 - code)}")
            return 128 - code
        counts = end is None or end == LostRankError.exit_code or (failure is not None and end == failure.exit_code)
        if failure is None or code == 0 or self._hearing.stop or not counts:
            return code if code >= 0 else 1
        say(f"megaresnorm: error: {failure}", error=True)
        return end if end is not None else failure.exit_code

    def _await_address(self, host: str, port: int) -> str | None:
        """This node's address on the way to ``host``, once that name resolves: a pod's does when the pod runs.

        Raises:
            ConfigError: it does not within ``CONNECT`` seconds; the pods of a job may be days apart.
        """
        start, most = time.monotonic(), JOIN if is_in_pod() else CONNECT
        said = start + SILENT - EVERY
        while (address := local_address_of(host, port)) is None and not self._hearing.stop:
            now = time.monotonic()
            if now > start + most:
                raise ConfigError(f"MASTER_ADDR={host} does not resolve on {host_name()}; give an address")
            if now > said + EVERY:
                said = now
                self._say(f"{host_name()} waits for the name {host} (MASTER_ADDR) to resolve")
            self._hearing.sleep(0.5)
        return address

    def _listen(self) -> int | None:
        """The socket of the nodes' store, where this node keeps it.

        In an elastic job that is the node that has the address, or the first of several supervisors that do.

        Raises:
            ConfigError: the port is taken.
        """
        plan = self._plan
        if plan.master is None or plan.node_rank not in (0, None):
            return None
        host, port = plan.master
        try:
            if plan.elastic and local_address_of(host, port) != resolved(host):
                return None
            return listen_where_reached(host, port)
        except OSError as e:
            if plan.elastic and e.errno == errno.EADDRINUSE:
                return None
            raise ConfigError(
                f"MASTER_ADDR={host} MASTER_PORT={port}: node 0 cannot listen there ({e.strerror}); "
                "take another MASTER_PORT on all nodes"
            ) from None

    def _wait(self) -> None:
        """Wait until torchrun has ended, or is to be ended without waiting."""
        said = time.monotonic() + SILENT - EVERY
        while self._torchrun.poll() is None:
            self._hearing.sleep(0.1)
            ranks = self._ranks()
            if ranks:
                self._ranks_seen = time.monotonic()
            if self._followed is not None:
                self._followed.print_new()
            if self._is_to_end_at_once() or self._starts_in_vain(ranks):
                return
            if self._launcher.read("end") is not None and time.monotonic() > self._ranks_seen + BARRIER:
                return
            if self._plan.nodes[1] == 1 or self._hearing.stop or ranks:
                said = max(said, time.monotonic() + SILENT - EVERY)
            elif time.monotonic() > said + EVERY:
                said = time.monotonic()
                self._say(self._what_it_waits_for())

    def _is_to_end_at_once(self) -> bool:
        """Whether the ranks are to end without waiting for a checkpoint.

        They are after a second signal. Where nothing is to be saved, since no rank has begun or all are gone without
        having ended on purpose, they are after the first, and once one has ended on purpose: others may wait for it.
        """
        if self._hearing.again:
            self._say("a second signal: ended at once, without saving")
            return True
        ended = self._launcher.read("end") is not None
        gone = not ended and time.monotonic() > self._ranks_seen + GRACE
        if self._launcher.read("begun") is not None and not gone:
            return False
        if ended:
            self._ended = min(self._ended, time.monotonic())
            return time.monotonic() > self._ended + LAST_WORDS
        return bool(self._hearing.stop) and time.monotonic() > self._hearing.first + GRACE

    def _starts_in_vain(self, ranks: list[int]) -> bool:
        """Whether ranks die again and again before they can count that themselves (opening.py): a broken package."""
        self._starts += bool(ranks) and not set(ranks) & self._last_ranks
        self._last_ranks = set(ranks) or self._last_ranks
        if (progress := self._launcher.read("progress")) != self._progress:
            self._progress, self._starts = progress, 1
        if self._starts > self._said_starts and self._starts > 1 and not self._hearing.stop:
            again, most = self._starts - 1, None if self._plan.elastic else self._plan.max_restarts
            if most is None or again <= most:
                allowed = "" if most is None else f" of at most {most}"
                self._say(f"ranks are started again ({again}{allowed} without a new checkpoint){self._why()}")
            elif again == most + 1:  # they count as well, and end at once (opening.py)
                self._say(f"ranks are not started again (MAX_RESTARTS={most} without a new checkpoint){self._why()}")
        self._said_starts = self._starts
        if self._plan.elastic or self._starts <= self._plan.max_restarts + 3:
            return False
        self._say(f"error: ranks were started {self._starts} times and died; the first error stands above")
        self._launcher.write("end", LostRankError.exit_code)
        return True

    def _why(self) -> str:
        """What has ended the ranks, where one of this node has noted it and it was not said before."""
        last, failure = self._launcher.last_failed, self._launcher.failure()
        new, self._said_failure = last > self._said_failure, max(last, self._said_failure)
        return f": {failure}" if new and failure is not None else ""

    def _what_it_waits_for(self) -> str:
        (least, most), master = self._plan.nodes, self._plan.master
        assert master is not None
        others = f"1 of {most}" if most == 2 else f"up to {most - 1} of {most}"
        enough = f", {least} are enough" if least < most else ""
        place = f"[{master[0]}]:{master[1]}" if ":" in master[0] else f"{master[0]}:{master[1]}"
        if self._plan.node_rank and not answers(*master):
            return f"{host_name()}, node {self._plan.node_rank}, waits for node 0: nothing answers at {place} yet"
        return f"waiting for {others} nodes to start their ranks ({place}, --job {self._plan.job}{enough})"

    def _pass_on(self, number: signal.Signals) -> None:
        """Pass the first signal on to the ranks. The agent sends here what torchrun was sent."""
        with suppress(OSError, AttributeError):  # a full disk, or no folder yet: ranks that have begun hear it anyway
            self._launcher.write("stop", 128 + number)
        for rank in self._ranks():
            kill(rank, number)

    def _ranks(self) -> list[int]:
        torchrun = getattr(self, "_torchrun", None)
        return [] if torchrun is None else children(torchrun.pid)

    def _end_all(self) -> None:
        """End everything of the job on this node: torchrun may be gone before its ranks."""
        ranks = self._ranks()
        if self._torchrun.poll() is None:
            for rank in ranks:
                kill(rank)
            self._torchrun.send_signal(signal.SIGQUIT)  # it leaves the other nodes' rendezvous
            try:
                self._torchrun.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._torchrun.kill()
                self._torchrun.wait()
        for pid in processes_with(f"{LAUNCHER}={self._launcher.folder}"):
            kill(pid)

    def _end_all_now(self) -> None:
        """End this process and, by that, all of the job on this node: who has started it is gone."""
        for pid in self._ranks():
            kill(pid)
        kill(os.getpid())

    def _say(self, line: str) -> None:
        say(f"megaresnorm: {line}", error=True)


def default_ranks() -> int:
    """The number of GPUs, or 2 without one. Asked in another process, since this one has no use for torch."""
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdecimal() and int(done.stdout) else 2


def describe(arguments: Sequence[str], **settings: str | None) -> list[str]:
    """What ``supervise`` would run, as lines for a shell; those that begin with # say where.

    Raises:
        ConfigError: a setting or variable cannot be used.
    """
    plan = read_plan(default_ranks, None, **settings)
    folder, address = Path(tempfile.gettempdir()) / f"{PREFIX}...", None
    if plan.master is not None:
        address = local_address_of(*plan.master)
    variables = environment_of(plan, {}, folder, address)
    place = "this node" if plan.node_rank is None else f"node {plan.node_rank} of {plan.nodes[1]}"
    command = [*torchrun_command(plan, folder, address), *arguments]
    return [
        f"# {place}, {host_name()}: {plan.ranks_here} ranks, job {plan.job}; the supervisor would start",
        shlex.join(["env", *(f"{name}={value}" for name, value in sorted(variables.items())), *command]),
    ]


def supervise(arguments: Sequence[str], **settings: str | None) -> int:
    """Run ``megaresnorm train``, or another command, on the ranks of this node, and return the exit code of the job.

    Args:
        arguments: of the command.
        **settings: of ``read_plan``.

    Raises:
        ConfigError: a setting or variable cannot be used.
    """
    supervisor = Supervisor()
    try:
        return supervisor.run(read_plan(default_ranks, None, **settings), arguments)
    except OSError as e:
        say(f"megaresnorm: error: {e.filename or 'TMPDIR'}: cannot be written ({e.strerror})", error=True)
        return 1
