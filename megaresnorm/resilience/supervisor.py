"""The process of launch/torchrun.sh: it starts torchrun with the ranks of this node, and hears signals for all of them.

A signal saves a checkpoint, however long that takes; before the first step, when there is nothing to save, it ends the
ranks at once. A second one ends them at once in any case. Whatever ends this process ends the job on this node.
"""

import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from megaresnorm.errors import ConfigError
from megaresnorm.parallel.addresses import local_address_of
from megaresnorm.parallel.environment import ELASTIC, LAUNCHER, MAX_RESTARTS, UNLIMITED, Plan, read_plan
from megaresnorm.resilience.launcher import PREFIX, SIGNALS, Launcher, children, kill
from megaresnorm.text import say

LOOPBACK = "lo"
SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
# Seconds after the first signal in which another counts as the same one: what ends a whole job signals its processes
# one after the other, and each passes it on.
REPEATS = 1.0
GRACE = 1.0  # seconds between asking torchrun to end and killing it
# Seconds that torchrun may wait for those of other nodes once its ranks have ended on purpose; by itself it waits 300.
BARRIER = 20.0
LAST_WORDS = 4.0  # seconds for the other ranks to end, once one has ended on purpose before the first step
SILENT = 5.0  # seconds of waiting for other nodes before the first message about it
EVERY = 60.0  # seconds between two such messages
JOIN = 30 * 24 * 3600  # seconds that a node waits for others; this process says so, and a signal ends it
CONNECT = 900  # seconds that it waits for the rendezvous node, which may be installing an environment first


def torchrun_arguments(plan: Plan, folder: Path, local_address: str | None) -> list[str]:
    """Arguments for torchrun, with all that it could also take from PET_... variables.

    The rendezvous of one node is a file: nothing listens on a port.
    """
    if plan.master is None:
        conf, endpoint = "store_type=file", str(folder / "rendezvous")
    else:
        host = "" if plan.node_rank is None else f",is_host={int(plan.node_rank == 0)}"
        waits = f"join_timeout={JOIN},read_timeout={CONNECT}"
        conf, endpoint = f"store_type=tcp{host},{waits}", f"{plan.master[0]}:{plan.master[1]}"
    # Not torchrun's static rendezvous, in which nodes would not hear that another restarts its ranks, or has ended.
    return [
        *("--nnodes", f"{plan.nodes[0]}:{plan.nodes[1]}", "--nproc-per-node", str(plan.ranks_here)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", plan.job, "--rdzv-conf", conf),
        *("--max-restarts", str(UNLIMITED), "--monitor-interval", "0.1", "--signals-to-handle", "SIGQUIT"),
        *(() if local_address is None else ("--local-addr", local_address)),
        *("-m", "megaresnorm.cli", "train"),
    ]  # fmt: skip


def environment_of(plan: Plan, variables: Mapping[str, str], folder: Path, local_address: str | None) -> dict[str, str]:
    """Environment variables of torchrun and its ranks.

    Network libraries use the interface of ``local_address``; with one node, none but loopback.
    """
    ours = {name: value for name, value in variables.items() if not name.startswith(("PET_", "TORCHELASTIC_"))}
    for left in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", ELASTIC):
        ours.pop(left, None)
    ours |= {LAUNCHER: str(folder), MAX_RESTARTS: str(plan.max_restarts)}
    # Workers that share the launcher's store find dead addresses in it after a restart.
    ours["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    ours.setdefault("OMP_NUM_THREADS", "1")  # several ranks with several threads each would compete for the cores
    if plan.elastic:
        ours[ELASTIC] = "1"
    interface = LOOPBACK if plan.master is None else interface_of(local_address)
    if interface is not None:
        ours.setdefault("GLOO_SOCKET_IFNAME", interface)
        ours.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without = NCCL takes every name that begins so
    return ours


def interface_of(address: str | None) -> str | None:
    """Name of the network interface with this IPv4 address; None if the system does not tell (it does on Linux)."""
    for _, name in socket.if_nameindex() if address else []:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


class Supervisor:
    """Hears signals from its construction on, and runs one torchrun to its end."""

    def __init__(self) -> None:
        self._stop = 0  # exit code of the first signal
        self._first, self._ended = 0.0, float("inf")  # when it came; when a rank was seen to have ended on purpose
        # When ranks of this node were last seen; inf before that, and always where the system does not tell.
        self._ranks_seen = float("inf")
        self._again = False
        self._wakeup, self._wakes = socket.socketpair()  # a signal writes to _wakes, which ends a wait for _wakeup
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        # Also if this was started with signals ignored, as by cron and scripts; but nohup ignores SIGHUP on purpose.
        heard = [*SIGNALS] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        for number in heard:
            signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)

    def run(self, plan: Plan, arguments: Sequence[str]) -> int:
        """Run the job to its end, and return its exit code.

        Args:
            arguments: of ``megaresnorm train``.

        Raises:
            OSError: the folder for temporary files cannot be written.
        """
        self._plan, self._arguments = plan, arguments
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
            self._launcher = Launcher(Path(folder))
            if self._stop:  # the signal came when the folder was not there yet
                return self._stop
            lock = self._launcher.lock()
            try:
                return self._run(Path(folder))
            finally:
                os.close(lock)

    def _run(self, folder: Path) -> int:
        local_address = None if self._plan.master is None else local_address_of(*self._plan.master)
        command = [sys.executable, "-m", "megaresnorm.resilience.agent"]
        self._torchrun = subprocess.Popen(
            [*command, *torchrun_arguments(self._plan, folder, local_address), *self._arguments],
            env=environment_of(self._plan, os.environ, folder, local_address),
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal reaches this process alone
        )
        try:
            self._wait()
        finally:
            self._end_all()
        end = self._launcher.read("end")
        if end is not None:
            return end
        return self._stop or (self._torchrun.returncode if self._torchrun.returncode >= 0 else 1)

    def _wait(self) -> None:
        """Wait until torchrun has ended, or is to be ended without waiting."""
        said = time.monotonic() + SILENT - EVERY
        while self._torchrun.poll() is None:
            self._sleep(0.1)
            ranks = self._ranks()
            if ranks:
                self._ranks_seen = time.monotonic()
            if self._is_to_end_at_once():
                return
            if self._launcher.read("end") is not None and time.monotonic() > self._ranks_seen + BARRIER:
                return
            if self._plan.nodes[1] == 1 or self._stop or ranks:
                said = max(said, time.monotonic() + SILENT - EVERY)
            elif time.monotonic() > said + EVERY:
                said = time.monotonic()
                self._say(self._what_it_waits_for())

    def _is_to_end_at_once(self) -> bool:
        """Whether the ranks are to end without waiting for a checkpoint.

        They are after a second signal. Where nothing is to be saved, since no rank has begun or all are gone without
        having ended on purpose, they are after the first, and once one has ended on purpose: others may wait for it.
        """
        if self._again:
            self._say("a second signal: ended at once, without saving")
            return True
        ended = self._launcher.read("end") is not None
        gone = not ended and time.monotonic() > self._ranks_seen + GRACE
        if self._launcher.read("begun") is not None and not gone:
            return False
        if ended:
            self._ended = min(self._ended, time.monotonic())
            return time.monotonic() > self._ended + LAST_WORDS
        return bool(self._stop) and time.monotonic() > self._first + GRACE

    def _what_it_waits_for(self) -> str:
        least, most = self._plan.nodes
        assert self._plan.master is not None
        others = f"1 of {most}" if most == 2 else f"up to {most - 1} of {most}"
        enough = f", {least} are enough" if least < most else ""
        return (
            f"waiting for {others} nodes to start their ranks ({self._plan.master[0]}:{self._plan.master[1]}{enough})"
        )

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on to the ranks."""
        # The agent sends here what torchrun was sent. It counts as the same signal if it comes within REPEATS.
        now = time.monotonic()
        if self._stop:
            self._again = self._again or now > self._first + REPEATS
            return
        number = signal.SIGTERM if number == signal.SIGHUP else number
        self._stop, self._first = 128 + number, now
        self._leave_word()
        for rank in self._ranks():
            kill(rank, signal.Signals(number))

    def _leave_word(self) -> None:
        try:
            self._launcher.write("stop", self._stop)
        except (OSError, AttributeError):  # a full disk, or no folder yet: ranks that have begun hear the signal itself
            return

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
        for pid in _processes_with(f"{LAUNCHER}={self._launcher.folder}"):
            kill(pid)

    def _sleep(self, seconds: float) -> None:
        """Sleep, for less if a signal comes."""
        self._wakeup.settimeout(seconds)
        try:
            self._wakeup.recv(64)
        except TimeoutError:
            return

    def _say(self, line: str) -> None:
        say(f"megaresnorm: {line}", error=True)


def _processes_with(variable: str) -> list[int]:
    """Process ids of this user's other processes with this variable; empty if the system does not tell (Linux does)."""
    wanted, found = variable.encode() + b"\0", []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError as e:
            if e.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ESRCH):
                raise
    return found


def default_ranks() -> int:
    """The number of GPUs, or 2 without one. Asked in another process, since this one has no use for torch."""
    count = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdecimal() and int(done.stdout) else 2


def main() -> int:
    """Run ``megaresnorm train`` on the ranks of this node, and return the exit code of the job."""
    supervisor = Supervisor()
    try:
        return supervisor.run(read_plan(default_ranks), sys.argv[1:])
    except ConfigError as e:
        say(f"error: {e}", error=True)
        return e.exit_code
    except OSError as e:
        say(
            f"error: {e.filename or 'TMPDIR'}: cannot be written ({e.strerror}); TMPDIR names another folder",
            error=True,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
