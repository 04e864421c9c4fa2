"""Two hosts whose link is cut, for a while or for good; hangs are named alike on both, and hosts may be lost."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from hosts import CAN_MAKE_HOSTS, Hosts, free_port
from launched import Launched, alive

from megaresnorm.resilience.hang_report import EXIT_CODE

needs_hosts = pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root, ip and unshare, to make network namespaces")
STEP = 4  # seconds


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(2, tmp_path_factory.mktemp("hosts"), names=True) as made:
        yield made


@pytest.fixture
def nodes(hosts, tiny, tmp_path):
    """A function that starts a job of two hosts, of a rank each, by hand; their output folder is shared."""
    started: list[Launched] = []

    def start(faults=(), **variables: str) -> list[Launched]:
        more = {"drill": {"faults": list(faults)}} if faults else {}
        variables |= {"MEGARESNORM_DRILL": "1"} if faults else {}
        recipe = tiny(
            train={"steps": 10**6, "eval_every": 0},
            checkpoint={"every": 50},
            watchdog={"start": 60, "step": STEP, "checkpoint": STEP},
            **more,
        )
        variables |= {"NODES": "2", "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": str(free_port())}
        for i in range(2):
            folder, prefix = tmp_path / str(i), hosts.on(i)
            started.append(Launched(folder, recipe, 1, NODE_RANK=str(i), prefix=prefix, **variables))
        both = started[-2:]
        both[0].recipe, both[0].port = recipe, variables["MASTER_PORT"]
        return both

    yield start
    for node in started:
        node.end()


def link(hosts: Hosts, state: str) -> None:
    """Cut the cable of the second host, or plug it in: nothing is told to either side."""
    subprocess.run(["ip", "-n", hosts._network, "link", "set", "port1", state], check=True)


def text_of(nodes: list[Launched]) -> str:
    return "\n".join(node.text for node in nodes)


def train_for_a_while(nodes: list[Launched], steps: int = 20) -> None:
    seen = sum(len(node.steps) for node in nodes)
    nodes[0].wait_for(lambda: sum(len(node.steps) for node in nodes) > seen + steps, "steps", 60)


@needs_hosts
@pytest.mark.slow
def test_a_cut_link_ends_both_sides_and_names_the_other_host(hosts, nodes):
    both = nodes(MAX_RESTARTS="0")
    train_for_a_while(both)
    everybody = [pid for node in both for pid in node.everybody()]
    link(hosts, "down")
    cut = time.monotonic()
    try:
        codes = [node.finish(STEP + 15) for node in both]
        seconds = [node.lines[-1][0] - cut for node in both]
    finally:
        link(hosts, "up")
    assert codes == [EXIT_CODE, EXIT_CODE], text_of(both)
    for node, other in zip(both, (1, 0), strict=True):
        named = [at - cut for at, line in node.lines if f"rank {other} on mrn-{other}: cannot be reached" in line]
        assert named and named[0] < STEP + 5, node.text
        print(f"named after {named[0]:.1f} s, ended after {seconds[1 - other]:.1f} s")
    assert not any(map(alive, everybody))


@needs_hosts
@pytest.mark.slow
def test_a_blip_of_the_link_is_survived(hosts, nodes):
    """Of three seconds, within the time of a step; gloo's sockets send what is left when the link is back."""
    both = nodes(MAX_RESTARTS="0")
    train_for_a_while(both)
    link(hosts, "down")
    time.sleep(STEP - 1.5)
    link(hosts, "up")
    train_for_a_while(both, 100)
    assert all(node.process.poll() is None for node in both) and "hangs" not in text_of(both)


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_on_one_host_is_named_alike_on_both(nodes, rank):
    both = nodes([{"kind": "hang", "place": "interpreter", "rank": rank, "step": 20}], MAX_RESTARTS="0")
    assert [node.finish(90) for node in both] == [EXIT_CODE, EXIT_CODE]
    for node in both:
        assert re.search(
            rf"megaresnorm: error: rank {rank} on mrn-{rank}: hangs in step 20 before its samples", node.text
        ), text_of(both)
    lines = (both[0].output / "events.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["kind"] == "hang"]
    assert [(event["rank"], event["host"]) for event in events] == [(rank, f"mrn-{rank}")]


@needs_hosts
@pytest.mark.slow
def test_the_loss_of_rank_0s_host_ends_the_other(hosts, nodes):
    both = nodes()
    train_for_a_while(both)
    everybody = both[1].everybody()
    for pid in hosts.processes(0):
        os.kill(pid, signal.SIGKILL)
    assert both[1].finish(STEP + 30) == EXIT_CODE, both[1].text
    assert not any(map(alive, everybody))


@needs_hosts
@pytest.mark.slow
def test_the_ranks_of_a_host_that_was_lost_come_back(hosts, nodes, tmp_path):
    both = nodes()
    train_for_a_while(both, 120)
    for pid in hosts.processes(1):
        os.kill(pid, signal.SIGKILL)
    variables = {"NODES": "2", "MASTER_ADDR": hosts.addresses[0], "MASTER_PORT": both[0].port, "NODE_RANK": "1"}
    time.sleep(2)
    again = Launched(tmp_path / "again", both[0].recipe, 1, prefix=hosts.on(1), **variables)
    try:
        both[0].wait_for(lambda: "resumed   " in both[0].text + again.text, "another start", 60)
        train_for_a_while([both[0], again], 20)
    finally:
        again.end()
