"""A node is lost for good: the run goes on with the ranks that are left, from a checkpoint of more."""

import os
import signal
import socket
import time

import pytest
from launched import INTERVAL, STEPS, Launched, alive, losses, train_on_rank

from megaresnorm.testing import run_ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_nodes_may_come_and_go(tiny, tmp_path):
    """A launcher of one rank; a second one joins the running job and is lost again, all of it killed.

    In FP64 the losses are one process's.
    """
    settings = {
        "model": {"dim": 32, "num_blocks": 8, "num_heads": 4, "dropout": 0.1, "ffn_dim": 64, "seq_len": 32},
        "precision": {"compute": "fp64"},
        "checkpoint": {"every": INTERVAL},
    }
    train = {"steps": 20 * STEPS, "global_batch": 8, "eval_every": 0}
    recipe = tiny(**settings, train=train)
    alone = tiny(**settings, train=train | {"output": str(tmp_path / "alone")})
    run_ranks(1, train_on_rank, 1, alone)
    variables = {"NODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "JOB_ID": "elastic-test"}
    first = Launched(tmp_path / "a", recipe, 1, **variables)
    first.wait_for_step(INTERVAL)
    assert "ranks     2" not in first.text
    started = time.monotonic()
    second = Launched(tmp_path / "b", recipe, 1, **variables)
    both = (first, second)
    first.wait_for(lambda: any("ranks     2 = dp_replicate 2" in run.text for run in both), "second node")
    logging = next(run for run in both if "ranks     2 = dp_replicate 2" in run.text)
    count = len(logging.steps)
    first.wait_for(lambda: len(logging.steps) > count + INTERVAL, "step of two ranks")
    print(
        f"{logging.steps[count][0] - started:.1f} s from the start of another node to the first step with it",
        flush=True,
    )
    assert "other nodes: saved step" in first.text
    killed = time.monotonic()
    for pid in (second.process.pid, second.torchrun, *second.ranks()):
        os.kill(pid, signal.SIGKILL)
    count = len(first.steps)
    first.wait_for(lambda: len(first.steps) > count + INTERVAL, "step of one rank")
    third = Launched(tmp_path / "b", recipe, 1, **variables)
    starts = sum("ranks     2 = dp_replicate 2" in run.text for run in both)
    first.wait_for(
        lambda: sum(run.text.count("ranks     2 = dp_replicate 2") for run in (*both, third)) > starts, "third node"
    )
    assert first.finish(300) == 0, first.text
    at = next(at for at, _ in first.steps if at > killed + 1)
    print(f"{at - killed:.1f} s from the loss of a node to the next step", flush=True)
    got = {step: float.fromhex(loss) for step, loss in losses(first.output).items()}
    want = {step: float.fromhex(loss) for step, loss in losses(tmp_path / "alone").items()}
    assert got.keys() == want.keys() and all(abs(got[step] - want[step]) < 1e-9 for step in want)


def test_two_nodes_are_one_job(tiny, tmp_path):
    """Two launchers of a rank each. One rank dies, and both start again.

    A signal to one stops both at one step, with one exit code.
    """
    recipe = tiny(train={"steps": 10**6, "eval_every": 0})
    variables = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [Launched(tmp_path / str(i), recipe, 1, NODE_RANK=str(i), **variables) for i in range(2)]
    nodes[0].wait_for(lambda: any(node.steps for node in nodes), "first step")
    os.kill(nodes[1].ranks()[0], signal.SIGKILL)
    nodes[0].wait_for(lambda: sum(node.text.count("ranks     2 =") for node in nodes) == 2, "another start")
    seen = sum(len(node.steps) for node in nodes)
    nodes[0].wait_for(lambda: sum(len(node.steps) for node in nodes) > seen, "step after it")
    os.kill(nodes[1].process.pid, signal.SIGTERM)
    assert [node.finish(60) for node in nodes] == [143, 143]
    assert any(f"saved step {len(losses(node.output))} of" in node.text for node in nodes)
    refused = Launched(tmp_path / "0", recipe, 1, NODES="2")
    assert refused.finish() == 2 and "NODES=2 needs NODE_RANK and MASTER_ADDR" in refused.text


def test_a_node_that_waits_for_another_says_so_and_is_stopped_at_once(tiny, tmp_path):
    recipe = tiny(train={"steps": 10**6, "eval_every": 0})
    variables = {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    node = Launched(tmp_path / "0", recipe, 1, **variables)
    node.wait_for(lambda: "waiting for 1 of 2 nodes to start their ranks" in node.text, "word about it", 60)
    everybody, start = node.everybody(), time.monotonic()
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.finish(30) == 143 and time.monotonic() - start < 10 and not any(map(alive, everybody))


def test_a_node_that_has_lost_the_other_is_stopped_at_once(tiny, tmp_path):
    """It waits for the other to come back; of its own ranks none is left that could save."""
    recipe = tiny(train={"steps": 10**6, "eval_every": 0})
    variables = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [Launched(tmp_path / str(i), recipe, 1, NODE_RANK=str(i), **variables) for i in range(2)]
    nodes[0].wait_for(lambda: any(node.steps for node in nodes), "first step")
    (old,) = nodes[0].ranks()
    for pid in reversed(nodes[1].everybody()):
        os.kill(pid, signal.SIGKILL)
    nodes[0].wait_for(lambda: not alive(old), "end of the rank that is left")
    time.sleep(5)
    assert nodes[0].process.poll() is None
    everybody, start = nodes[0].everybody(), time.monotonic()
    os.kill(nodes[0].process.pid, signal.SIGTERM)
    assert nodes[0].finish(30) == 143 and time.monotonic() - start < 10 and not any(map(alive, everybody))


@pytest.mark.slow
def test_ranks_that_do_not_fit_idle_and_too_few_wait(tiny, tmp_path):
    """Three ranks of a job that may have six: two work on shards for two; shards for four wait for another node."""
    settings = {"precision": {"compute": "fp64"}}
    alone = tiny(**settings, train={"output": str(tmp_path / "alone")})
    run_ranks(1, train_on_rank, 1, alone)
    variables = {"NODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    three = Launched(tmp_path / "three", tiny(**settings, parallel={"dp_shard": 2}), 3, **variables)
    assert three.finish(180) == 0, three.text
    assert "1 of 3 ranks idle: the layout takes multiples of 2" in three.text
    got, want = losses(three.output), losses(tmp_path / "alone")
    assert got.keys() == want.keys()
    assert all(abs(float.fromhex(got[step]) - float.fromhex(want[step])) < 1e-9 for step in want)
    waiting = tiny(train={"output": str(tmp_path / "waiting")}, parallel={"dp_shard": 4})
    variables["MASTER_PORT"] = str(free_port())
    few = Launched(tmp_path / "few", waiting, 3, **variables)
    few.wait_for(lambda: "waiting for more nodes: 3 ranks are here, the layout needs 4" in few.text, "word about it")
    os.kill(few.process.pid, signal.SIGTERM)
    assert few.finish(30) == 143 and not few.steps
