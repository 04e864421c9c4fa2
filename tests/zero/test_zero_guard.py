"""Under ZeRO a step with NaN is refused, made again and named as under the native engine; a run goes back likewise."""

from pathlib import Path

import pytest
from launched import losses, train_on_rank

from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


def curve(tiny, monkeypatch, tmp_path, stage: int, name: str, fault: dict | None, **sections) -> tuple[dict, list]:
    recipe = tiny(
        engine={"name": "deepspeed", "zero_stage": stage},
        train={"output": str(tmp_path / name), "steps": 8, "micro_batch": 2, "global_batch": 8, "eval_every": 0},
        checkpoint={"every": 2},
        **sections,
        **({} if fault is None else {"drill": {"faults": [fault]}}),
    )
    monkeypatch.setenv("MEGARESNORM_DRILL", "0" if fault is None else "1")
    run_ranks(2, train_on_rank, 2, recipe)
    return losses(Path(recipe.train.output)), list(read_incidents(Path(recipe.train.output)))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_transient_nan_leaves_no_trace_in_the_curve(tiny, monkeypatch, tmp_path, stage):
    fault = {"kind": "nan", "place": "activation", "step": 5, "rank": 1, "block": 1}
    found, events = curve(tiny, monkeypatch, tmp_path, stage, "drill", fault)
    assert found == curve(tiny, monkeypatch, tmp_path, stage, "undisturbed", None)[0]
    assert [one["kind"] for one in events if one.get("transient")] == ["nonfinite"]


@pytest.mark.parametrize("stage", [1, 3])
def test_nan_that_stays_is_named_and_the_run_goes_back(tiny, monkeypatch, tmp_path, stage):
    fault = {"kind": "nan", "place": "activation", "step": 5, "rank": 1, "block": 1, "times": 2}
    guard = {"guard": {"nonfinite": "rollback"}}
    found, events = curve(tiny, monkeypatch, tmp_path, stage, "drill", fault, **guard)
    (refused,) = [one for one in events if one["kind"] == "nonfinite"]
    (back,) = [one for one in events if one["kind"] == "rollback"]
    assert (refused["rank"], refused["block"], back["to_step"], back["passed"]) == (1, 1, 4, [32, 8])
    assert sorted(found) == list(range(1, 9))
