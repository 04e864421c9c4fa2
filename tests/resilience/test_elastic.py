"""A node is lost for good: the run goes on with the ranks that are left, from a checkpoint of more."""

import os
import signal
import socket
import time

import pytest
from launched import INTERVAL, STEPS, Launched, losses, train_on_rank
from ranks import run_ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_nodes_may_come_and_go(tiny, tmp_path):
    """A launcher of one rank; a second one joins the running job and is lost again, all of it killed. In FP64 the losses are one
    process's.
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
    assert first.finish(300) == 0, first.text
    at = next(at for at, _ in first.steps if at > killed + 1)
    print(f"{at - killed:.1f} s from the loss of a node to the next step", flush=True)
    got = {step: float.fromhex(loss) for step, loss in losses(first.output).items()}
    want = {step: float.fromhex(loss) for step, loss in losses(tmp_path / "alone").items()}
    assert got.keys() == want.keys() and all(abs(got[step] - want[step]) < 1e-9 for step in want)


def test_two_nodes_are_one_job(tiny, tmp_path):
    """Two launchers of a rank each; a signal to one of them stops both at one step, with one exit code."""
    recipe = tiny(train={"steps": 10**6, "eval_every": 0})
    variables = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [Launched(tmp_path / str(i), recipe, 1, NODE_RANK=str(i), **variables) for i in range(2)]
    nodes[0].wait_for(lambda: any(node.steps for node in nodes), "first step")
    os.kill(nodes[1].process.pid, signal.SIGTERM)
    assert [node.finish(60) for node in nodes] == [143, 143]
    (logging,) = (node for node in nodes if node.steps)
    assert f"saved step {len(losses(logging.output))} of" in logging.text and "ranks     2" in logging.text
    refused = Launched(tmp_path / "0", recipe, 1, NODES="2")
    assert refused.finish() == 1 and "NODES=2 needs NODE_RANK and MASTER_ADDR" in refused.text
