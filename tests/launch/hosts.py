"""Hosts made of network namespaces: each with an address, a name and an /etc/hosts of its own, and an sshd.

They share the file system, as the nodes of a cluster share the folder of a run. Needs root, ``ip`` and ``unshare``, and
for ssh OpenSSH's server; ``bash tests/launch/install.sh`` brings what Debian has.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
CAN_MAKE_HOSTS = os.getuid() == 0 and bool(shutil.which("ip")) and bool(shutil.which("unshare"))
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if Path("/usr/sbin/sshd").exists() else None)


def run(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


class Hosts:
    """Several hosts on one network (``with Hosts(2, folder) as hosts``).

    Args:
        count: of hosts, named mrn-0, mrn-1, ...; their addresses are 10.77.0.1, 10.77.0.2, ..., and fd77::1, ...
            Several processes may have such hosts at once, each on a network of its own.
        folder: for keys and configurations.
        names: whether each host knows the names of the others. Its own is 127.0.1.1, as Debian has it, in any case.
        sshd: whether each runs one, on port 2222, which lets the one key of ``folder`` in.
    """

    def __init__(self, count: int, folder: Path, *, names: bool = False, sshd: bool = False) -> None:
        self.names = [f"mrn-{i}" for i in range(count)]
        self.namespaces = [f"mrn-{os.getpid()}-{i}" for i in range(count)]
        self._network = f"mrn-{os.getpid()}-net"  # the namespace of the switch between them
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.addresses_v6 = [f"fd77::{i + 1}" for i in range(count)]
        self._folder, self._known, self._sshd = folder / "hosts", names, sshd
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        self._folder.mkdir(parents=True)
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        run("ip", "netns", "add", self._network)
        run("ip", "-n", self._network, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", self._network, "link", "set", "switch", "up")
        for i, name in enumerate(self.namespaces):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", f"port{i}", "netns", self._network)
            run("ip", "-n", self._network, "link", "set", f"port{i}", "master", "switch", "up")
            run("ip", "-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
            run("ip", "-n", name, "addr", "add", f"{self.addresses_v6[i]}/64", "dev", "eth0", "nodad")
            for device in ("eth0", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
            self.hosts_file(i).parent.mkdir(parents=True)
            others = zip(self.addresses, self.names, strict=True) if self._known else ()
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {self.names[i]}"]
            lines += [f"{address} {other}" for address, other in others if other != self.names[i]]
            self.hosts_file(i).write_text("\n".join(lines) + "\n")
        if self._sshd:
            self._start_sshd()

    def on(self, i: int) -> list[str]:
        """What stands before a command that is to run on a host."""
        own = f'hostname {self.names[i]}; exec "$@"'
        return ["ip", "netns", "exec", self.namespaces[i], "unshare", "--uts", "sh", "-c", own, "-"]

    def hosts_file(self, i: int) -> Path:
        """The /etc/hosts of a host: ip netns exec lays it over that of the machine. To be written in place."""
        return Path("/etc/netns") / self.namespaces[i] / "hosts"

    @property
    def ssh(self) -> str:
        """The command by which a host reaches another."""
        quiet = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        return f"ssh -p 2222 -i {self._folder / 'key'} {quiet}"

    def _start_sshd(self) -> None:
        assert SSHD is not None
        Path("/run/sshd").mkdir(exist_ok=True)
        for key in ("key", "host_key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._folder / key)
        shutil.copy(self._folder / "key.pub", self._folder / "authorized_keys")
        for i, name in enumerate(self.names):
            options = {
                "Port": 2222, "HostKey": self._folder / "host_key", "PidFile": "none", "UsePAM": "no",
                "AuthorizedKeysFile": self._folder / "authorized_keys", "StrictModes": "no", "PermitRootLogin": "yes",
            }  # fmt: skip
            words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
            log = (self._folder / f"sshd-{name}.log").open("w")
            command = [*self.on(i), SSHD, "-D", "-e", "-f", "/dev/null", *words]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        for i in range(len(self.names)):
            self.wait_for_port(i, 2222)

    def wait_for_port(self, i: int, port: int) -> None:
        """Wait until a process on a host listens."""
        probe = f"import socket; socket.create_connection(({self.addresses[i]!r}, {port}), 1)"
        end = time.monotonic() + 30
        while subprocess.run([*self.on(i), sys.executable, "-c", probe], capture_output=True).returncode:
            assert time.monotonic() < end, f"nothing listens on port {port} of {self.names[i]}"
            time.sleep(0.1)

    def processes(self, i: int | None = None) -> list[int]:
        """Process ids on one host, or on all, without what keeps them up."""
        found = []
        for name in self.namespaces if i is None else [self.namespaces[i]]:
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            found += [int(pid) for pid in done.stdout.split()]
        return [pid for pid in found if not is_of_the_host(pid)]

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for name in self.namespaces:
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in done.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        for process in self._processes:
            process.wait()
        for name in (*self.namespaces, self._network):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)


def is_of_the_host(pid: int) -> bool:
    """Whether a process is an sshd, or is gone."""
    try:
        return "sshd" in Path(f"/proc/{pid}/cmdline").read_text() or not Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
