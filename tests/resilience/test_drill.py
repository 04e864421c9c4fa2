"""megaresnorm drill from its command to its table."""

import json

import pytest
from launched import Launched

from megaresnorm.cli import main
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.drill_table import NOTICES, Notice
from megaresnorm.telemetry.incidents import read_incidents

MODEL = {"dim": 32, "num_blocks": 8, "num_heads": 4, "ffn_dim": 64, "seq_len": 32}


def drilled(tiny, tmp_path, *options: str) -> tuple[int, dict]:
    recipe = tiny(model=MODEL, train={"steps": 9, "global_batch": 8, "eval_every": 0})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["drill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "j")]
    code = main([*command, *options])
    return code, json.loads((tmp_path / "j").read_text())


@pytest.mark.slow
def test_a_soak_of_faults_is_noticed_named_and_ends_as_an_undisturbed_run(tiny, tmp_path, capfd):
    kinds = ["kill", "stop", "nan", "no_space", "io_error", "torn_write", "cut", "clock"]
    code, report = drilled(tiny, tmp_path, "--faults", ",".join(kinds), "--minutes", "1", "--seed", "3")
    out = capfd.readouterr().out
    assert code == 0 and report["passed"], out
    assert {row["kind"] for row in report["rows"]} == set(kinds) and report["exact"]
    assert all(row["injected"] and row["noticed"] and row["named"] is not False for row in report["rows"]), out
    assert report["differing"] == 0 and report["same_weights"] and report["starts"] == 1
    assert "named right" in out and "goodput" in out and 0 < report["goodput"] < 1


@pytest.mark.slow
def test_a_fault_that_nobody_notices_fails_a_drill(tiny, tmp_path, capfd, monkeypatch):
    """A NaN, of which no line is found."""
    monkeypatch.setitem(NOTICES, "nan", Notice("never"))
    code, report = drilled(tiny, tmp_path, "--faults", "nan", "--minutes", "0.1", "--no-compare")
    assert code == 1 and not report["passed"] and report["differing"] is None
    (row,) = report["rows"]
    assert row["injected"] and not row["noticed"] and "NOTHING" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_rank_is_named_where_the_ranks_are_started_again(tiny, tmp_path):
    """Also where another rank, which has lost it, is the first that torchrun looks at."""
    faults = [{"kind": "kill", "step": 5, "rank": 1}]
    recipe = tiny(model=MODEL, train={"steps": 9, "global_batch": 8}, checkpoint={"every": 3}, drill={"faults": faults})
    run = Launched(tmp_path / "job", recipe, 2, MEGARESNORM_DRILL="1")
    assert run.finish() == 0, run.text
    (line,) = [line for line in run.text.splitlines() if "started again" in line]
    assert ": rank 1 on " in line and "killed by SIGKILL" in line
    (died,) = [one for one in read_incidents(run.output) if one["kind"] == "died"]
    assert (died["rank"], died["step"], died["exit_code"]) == (1, 5, 137) and "killed by SIGKILL" in died["what"]
