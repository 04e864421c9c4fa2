"""Who reaches a port runs no code: what a job listens on, and what a stranger finds there."""

import base64
import multiprocessing
import os
import pickle
import signal
import time
from datetime import timedelta
from pathlib import Path

from launched import Launched, listening
from test_elastic import free_port
from torch.distributed import TCPStore

LOOPBACK = ("127.0.0.1", "::1")


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def attack(port: int, job: str, trap: Path) -> None:
    """What a stranger who reaches a store of torchrun's does: look for its state, and put a pickle in its place."""
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=1), wait_for_workers=False)
    for key in (f"torch.rendezvous.{job}", "torch.rendezvous.none", "torch.rendezvous.megaresnorm"):
        store.set(key, base64.b64encode(pickle.dumps(Evil(str(trap)))).decode())


def stores_among(ports: list[int], trap: Path) -> list[int]:
    """Ports at which the attack got through to the end. gloo lets a stranger wait for an answer that never comes."""
    context = multiprocessing.get_context("fork")
    attackers = {port: context.Process(target=attack, args=(port, "megaresnorm", trap)) for port in ports}
    for attacker in attackers.values():
        attacker.start()
    end = time.monotonic() + 2
    for attacker in attackers.values():
        attacker.join(max(0.0, end - time.monotonic()))
        if attacker.is_alive():
            attacker.kill()
            attacker.join()
    return [port for port, attacker in attackers.items() if attacker.exitcode == 0]


def test_the_attack_gets_through_to_a_store(tmp_path):
    """What it sets is there, so that the test below can fail."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert stores_among([store.port], tmp_path / "trap") == [store.port]
    assert pickle.dumps(Evil(str(tmp_path / "trap"))) == base64.b64decode(store.get("torch.rendezvous.none"))


def test_one_node_listens_on_loopback_alone_and_keeps_no_store_there(long_run, tmp_path):
    """The ranks meet in a file of a private folder. The ports are gloo's, which speaks no pickle, on loopback.

    Other namespaces and hosts cannot reach them, and a stranger of the same host finds no store.
    """
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(2)
    found = listening(run.everybody())
    assert found and {address for _, address, _ in found} <= set(LOOPBACK), found
    assert run.torchrun not in {pid for pid, _, _ in found}
    assert not stores_among([port for _, _, port in found], tmp_path / "trap")
    (folder,) = {
        value for pid in run.ranks() for name, value in variables_of(pid).items() if name == "MEGARESNORM_LAUNCHER"
    }
    assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert (Path(folder) / "rendezvous").exists() and list(Path(folder).glob("ranks-0*"))
    before = run.steps[-1][1]
    run.wait_for_step(before + 3)
    assert not (tmp_path / "trap").exists()
    if os.getuid() == 0:
        assert as_another_user(lambda: os.listdir(folder)) == "PermissionError"
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.finish(60) == 143


def test_two_nodes_listen_on_the_address_in_use_alone(long_run, tmp_path):
    """Two launchers of this host as two nodes: also torchrun's rendezvous, which keeps a pickle in its store there.

    What holds on two hosts is in tests/launch/test_hosts.py.
    """
    _, recipe = long_run("dp2", steps=10**6)
    port = free_port()
    variables = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    nodes = [Launched(tmp_path / str(i), recipe, 1, NODE_RANK=str(i), **variables) for i in range(2)]
    nodes[0].wait_for(lambda: any(node.steps for node in nodes), "first step")
    found = [listening(node.everybody()) for node in nodes]
    assert {address for node in found for _, address, _ in node} <= set(LOOPBACK), found
    assert (nodes[0].torchrun, "127.0.0.1", port) in found[0], found
    rank = next(pid for pid in nodes[0].ranks())
    assert variables_of(rank)["GLOO_SOCKET_IFNAME"] == "lo"
    os.kill(nodes[0].process.pid, signal.SIGTERM)
    assert [node.finish(60) for node in nodes] == [143, 143]


def variables_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def as_another_user(work) -> str:
    """The name of the exception that ``work`` raises as nobody; empty where it raises none."""
    read, write = os.pipe()
    if not os.fork():
        try:
            os.setuid(65534)
            work()
            os._exit(0)
        except BaseException as e:  # noqa: BLE001 - of the child
            os.write(write, type(e).__name__.encode())
            os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as answer:
        return answer.read()
