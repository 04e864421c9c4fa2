"""Faults of files, links and clocks: each is really injected, is noticed, and leaves the curve as it was."""

import json
import os
import time
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from launched import be_rank, losses

from megaresnorm.checkpoint import writer
from megaresnorm.data import token_file
from megaresnorm.errors import DataError
from megaresnorm.parallel.sockets import cut_connections, own_sockets
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

STEPS, EVERY = 12, 4


@pytest.fixture
def drilled(tiny, tmp_path, monkeypatch):
    """A function from faults to the digest of a run that has them; what they have replaced is put back."""
    for module in (writer, token_file):
        monkeypatch.setattr(module, "os", os)
    monkeypatch.setattr(time, "time", time.time)

    def run(*faults: dict, name: str = "run") -> str:
        recipe = tiny(
            train={"steps": STEPS, "output": str(tmp_path / name)},
            checkpoint={"every": EVERY},
            **({"drill": {"faults": list(faults)}} if faults else {}),
        )
        monkeypatch.setenv("MEGARESNORM_DRILL", "1" if faults else "0")
        return train(recipe).weights_digest

    return run


def injected(run) -> list[tuple[str, int]]:
    lines = (run / "drill" / "rank-0.jsonl").read_text().splitlines()
    return [(one["kind"], one["step"]) for one in map(json.loads, lines)]


def test_full_and_failing_disks_cost_a_checkpoint_and_a_jump_of_the_clock_nothing(drilled, tmp_path, caplog):
    plain = drilled(name="plain")
    caplog.clear()
    faults = [{"kind": "no_space", "step": 2}, {"kind": "clock", "step": 3, "seconds": 5000},
              {"kind": "io_error", "step": 6, "place": "save"}]  # fmt: skip
    start = time.time()
    assert drilled(*faults) == plain
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert sorted(injected(tmp_path / "run")) == [("clock", 3), ("io_error", 6), ("no_space", 2)]
    warnings = [line for line in caplog.messages if "training goes on" in line]
    assert len(warnings) == 2 and "step-00000004: no space: need" in warnings[0]
    assert "step-00000008: cannot be written (Input/output error, " in warnings[1]
    assert "weights-00000-00001.safetensors" in warnings[1]
    times = [json.loads(line)["time"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert times[1] < start + 1000 and times[3] > start + 4900, "the clock has jumped"


@pytest.mark.parametrize("place", [None, "save"], ids=["when it counts", "before it counts"])
def test_a_torn_file_is_named_by_the_next_start_which_goes_back_and_ends_the_same(drilled, tmp_path, caplog, place):
    plain = drilled(name="plain")
    fault = {"kind": "torn_write", "step": 10} | ({} if place is None else {"place": place})
    drilled(fault)
    assert injected(tmp_path / "run") == [("torn_write", 10)]
    newest = tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}"
    caplog.clear()
    assert drilled(fault) == plain
    (warning,) = [line for line in caplog.messages if "going back to" in line]
    assert f"{newest.name}/" in warning and "-00000-00001.safetensors: has " in warning
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")


def test_data_that_cannot_be_read_are_one_line_with_the_file(drilled, tmp_path):
    with pytest.raises(DataError, match=r"tokens.bin: byte \d+ cannot be read \(Input/output error\)"):
        drilled({"kind": "io_error", "step": 5, "place": "loader"})
    assert injected(tmp_path / "run")[0][0] == "io_error"


def test_a_slow_rank_is_slow_once_a_step(drilled, tmp_path):
    start = time.perf_counter()
    drilled({"kind": "slow", "step": 3, "times": 5, "seconds": 0.2, "place": "forward"})
    assert 1.0 < time.perf_counter() - start < 10
    assert injected(tmp_path / "run") == [("slow", step) for step in range(3, 8)]


def test_a_fault_of_files_has_no_other_place(tiny):
    with pytest.raises(Exception, match="place=loader is none of no_space's: save, or unset"):
        tiny(drill={"faults": [{"kind": "no_space", "step": 1, "place": "loader"}]})
    assert build_recipe(tiny().model_dump(exclude_none=True)).drill is None


def test_a_rank_whose_connections_are_cut_and_its_peers_all_lose_contact():
    def on_rank(rank: int) -> dict:
        be_rank(rank, 3)
        dist.all_reduce(torch.ones(1))
        before = sum(not one.listening for one in own_sockets())
        cut = cut_connections() if rank == 1 else 0
        lost = False
        try:
            for _ in range(100):
                dist.all_reduce(torch.ones(1 << 16))
        except RuntimeError:
            lost = True
        with suppress(RuntimeError):
            dist.barrier()
        return {"before": before, "cut": cut, "lost": lost}

    found = run_ranks(3, on_rank)
    assert found[1]["cut"] == found[1]["before"] >= 2 and all(one["lost"] for one in found), found
