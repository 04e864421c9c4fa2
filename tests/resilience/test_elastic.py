"""A node is lost for good: the run goes on with the ranks that are left, from a checkpoint of more."""

import json
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


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_lost_node_leaves_a_run_of_fewer_ranks(tiny, tmp_path):
    """Two launchers of one rank each, as on two hosts; all of the second is killed. In FP64 the losses are one process's."""
    settings = {
        "model": {"dim": 32, "num_blocks": 8, "num_heads": 4, "dropout": 0.1, "ffn_dim": 64, "seq_len": 32},
        "precision": {"compute": "fp64"},
        "checkpoint": {"every": INTERVAL},
    }
    train = {"steps": 3 * STEPS, "global_batch": 8, "eval_every": 0}
    recipe = tiny(**settings, train=train)
    alone = tiny(**settings, train=train | {"output": str(tmp_path / "alone")})
    run_ranks(1, train_on_rank, 1, alone)
    variables = {"NODES": "1:2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "JOB_ID": "elastic-test"}
    first = Launched(tmp_path / "a", recipe, 1, **variables)
    first.wait_for(
        lambda: listening(int(variables["MASTER_PORT"])), "rendezvous"
    )  # this one has it, as MASTER_ADDR's node would
    second = Launched(tmp_path / "b", recipe, 1, **variables)
    both = (first, second)
    first.wait_for(lambda: any(run.steps and run.steps[-1][1] > STEPS for run in both), f"step {STEPS}")
    logging = next(run for run in both if run.steps)
    assert "ranks     2 = dp_replicate 2" in logging.text
    killed = time.monotonic()
    for pid in (second.process.pid, second.torchrun, *second.ranks()):
        os.kill(pid, signal.SIGKILL)
    assert first.finish(300) == 0, first.text
    at = next(at for at, _ in first.steps if at > killed + 1)
    print(f"{at - killed:.1f} s from the loss of a node to the next step", flush=True)
    assert "resumed   " in first.text
    got = {step: float.fromhex(loss) for step, loss in losses(first.output).items()}
    want = {step: float.fromhex(loss) for step, loss in losses(tmp_path / "alone").items()}
    assert got.keys() == want.keys() and all(abs(got[step] - want[step]) < 1e-9 for step in want)
    assert (
        json.loads((first.output / "checkpoints" / f"step-{3 * STEPS:08d}" / "manifest.json").read_text())["step"]
        == 3 * STEPS
    )


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
