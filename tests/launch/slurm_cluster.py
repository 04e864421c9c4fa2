"""A cluster of Slurm's own daemons on simulated hosts: a login node with the controller, and compute nodes.

Everything lies in one folder, munge's key and socket too, and every daemon is a child process in the foreground. Slurm
calls the compute nodes n1, n2, ...; no host can resolve these names, as where only Slurm knows the nodes' addresses.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hosts import CAN_MAKE_HOSTS, ROOT, Hosts

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "salloc", "scontrol", "scancel", "squeue")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
MISSING = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
WHY_NOT = (
    "needs root, ip and unshare"
    if not CAN_MAKE_HOSTS
    else f"needs {', '.join(MISSING)} (tests/launch/install.sh)"
    if MISSING
    else ""
)
REQUEUE = 10  # seconds that a job waits at least when it was requeued
DAEMONS = ("slurmctld", "slurmscriptd", "slurmd", "slurmstepd", "munged")


class SlurmCluster:
    """Slurm on ``count`` compute nodes (``with SlurmCluster(2, folder) as cluster``).

    Commands of users run on the login node.

    Args:
        count: of compute nodes.
        folder: for everything of the cluster.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.count = folder / "slurm", count
        self.hosts = Hosts(1 + count, folder)
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "SlurmCluster":
        self.folder.mkdir(parents=True)
        self.hosts.__enter__()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        for name in ("state", *(f"spool/n{i}" for i in range(1, self.count + 1))):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        socket = self.folder / "munge.socket"
        self._daemon(0, "munged", "munged", "--foreground", "--force", "--key-file", key, "--socket", socket,
                     "--pid-file", self.folder / "munged.pid", "--log-file", self.folder / "munged.own.log",
                     "--seed-file", self.folder / "munge.seed")  # fmt: skip
        self._wait(socket.exists, "munge's socket")
        self.conf.write_text(self._configuration())
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._daemon(0, "slurmctld", "slurmctld", "-D", "-f", self.conf)
        for i in range(1, self.count + 1):
            # ip netns exec lays an empty /sys over the host's; slurmd wants to find some file system of control groups.
            mount = 'mount -t tmpfs none /sys/fs/cgroup; exec "$@"'
            self._daemon(i, f"slurmd-n{i}", "sh", "-c", mount, "-", "slurmd", "-D", "-f", self.conf, "-N", f"n{i}")
        idle = rf"n\[1-{self.count}\] idle" if self.count > 1 else "n1 idle"
        self._wait(lambda: bool(re.fullmatch(idle, self.ask("sinfo", "-h", "-o", "%N %t"))), "idle nodes")

    @property
    def conf(self) -> Path:
        """The file that SLURM_CONF names."""
        return self.folder / "slurm.conf"

    def _configuration(self) -> str:
        """Slurm's words for it. The life of credentials is how long a requeued job waits: 120 seconds by default."""
        folder, hosts = self.folder, self.hosts
        nodes = "\n".join(
            f"NodeName=n{i} NodeAddr={hosts.addresses[i]} NodeHostname={hosts.names[i]} CPUs=4 State=UNKNOWN"
            for i in range(1, self.count + 1)
        )
        return f"""
ClusterName=tests
SlurmctldHost={hosts.names[0]}({hosts.addresses[0]})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={REQUEUE}
CredType=cred/munge
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.own.log
SlurmdLogFile={folder}/slurmd-%n.own.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

    def _daemon(self, host: int, name: str, *words: object) -> None:
        log = (self.folder / f"{name}.log").open("w")
        command = [*self.hosts.on(host), *(str(word) for word in words)]
        self._daemons.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )
        )

    def _wait(self, condition, what: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not condition():
            dead = [d.args for d in self._daemons if d.poll() is not None]
            assert not dead and time.monotonic() < end, f"no {what}: {dead or timeout}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """What the daemons say."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    @property
    def environment(self) -> dict[str, str]:
        """Of the users of the cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {
            "SLURM_CONF": str(self.conf), "PATH": _PATH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }  # fmt: skip

    def on_login(self, *words: object) -> list[str]:
        """A command as a user gives it on the login node."""
        return [*self.hosts.on(0), *(str(word) for word in words)]

    def ask(self, *words: object, check: bool = True) -> str:
        """The output of a command of Slurm."""
        done = subprocess.run(self.on_login(*words), capture_output=True, text=True, env=self.environment, timeout=60)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def launch(self, *words: object) -> list[str]:
        """The command ``megaresnorm launch --with slurm`` on the login node."""
        return self.on_login(sys.executable, "-m", "megaresnorm", "launch", *words, "--with", "slurm")

    def job(self, number: int) -> dict[str, str]:
        """What Slurm says of a job, by name."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", "-o", number)))

    def processes(self) -> list[str]:
        """Command lines of what is left of jobs on all hosts."""
        found = []
        for pid in self.hosts.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if words and not any(daemon in words for daemon in DAEMONS):
                found.append(f"{pid}: {words}")
        return found

    def end_jobs(self) -> None:
        """Cancel all jobs, and wait until they are gone."""
        self.ask("scancel", "--user=root", "--full", "--signal=KILL", check=False)
        self.ask("scancel", "--user=root", check=False)
        self._wait(lambda: not self.ask("squeue", "-h"), "empty queue", 90)

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.hosts.__exit__()


class Terminal:
    """A command in a terminal of the login node, watched line by line.

    Attributes:
        lines: what it printed, each with the time.
    """

    def __init__(self, cluster: SlurmCluster, folder: Path, words: Sequence[str], **variables: str) -> None:
        self.process = subprocess.Popen(
            words,
            cwd=folder,
            env=cluster.environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def find(self, pattern: str) -> tuple[float, re.Match] | None:
        """The first line that has the pattern, and when it came."""
        return next(((at, found) for at, line in list(self.lines) if (found := re.search(pattern, line))), None)

    def wait_for(self, pattern: str, timeout: float = 120) -> tuple[float, re.Match]:
        end = time.monotonic() + timeout
        while (found := self.find(pattern)) is None:
            assert self.process.poll() is None, f"ended before {pattern!r}:\n{self.text}"
            assert time.monotonic() < end, f"no {pattern!r} in {timeout} s:\n{self.text}"
            time.sleep(0.05)
        return found

    def finish(self, timeout: float = 180) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
