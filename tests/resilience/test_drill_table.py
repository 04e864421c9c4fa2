"""Which faults a drill plans, and what its table makes of what was injected and what noticed it."""

import json
import os
import signal
import sys
from itertools import pairwise
from json import loads
from pathlib import Path
from typing import get_args

import pytest

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError
from megaresnorm.launch import soak
from megaresnorm.launch.drill import DrillRun, Outcome
from megaresnorm.launch.soak import Soak
from megaresnorm.recipe import FaultRecipe
from megaresnorm.recipe.drill import PLACES, FaultKind, Place
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.resilience.drill_plan import KINDS, DrillPlan, kinds_of, plan_drill
from megaresnorm.resilience.drill_table import NOTICES, rows_of
from megaresnorm.resilience.signals import Terminated, undone_on_sigterm
from megaresnorm.resilience.spikes import NEEDED
from megaresnorm.text import say


def test_a_kind_of_fault_has_its_places_alone_and_each_can_be_made(tiny):
    """In one line that lists them, before anything starts."""
    assert set(PLACES) == set(get_args(FaultKind)) == set(KINDS)
    for kind, places in PLACES.items():
        assert set(KINDS[kind].places) <= {None, *places}
        for place in get_args(Place):
            if place in places:
                FaultRecipe(kind=kind, step=1, place=place)
                continue
            with pytest.raises(ConfigError) as refused:
                tiny(drill={"faults": [{"kind": kind, "step": 1, "place": place}]})
            assert f"place={place} is none of {kind}'s: {', '.join(places)}" in str(refused.value)
            assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "kill", "seconds": 3.0},
        {"kind": "nan", "seconds": 3.0},
        {"kind": "slow", "block": 0},
        {"kind": "flip", "place": "reduced_gradient", "block": 1},
    ],
    ids=str,
)
def test_a_setting_that_would_be_ignored_is_refused(fault, tiny):
    with pytest.raises(ConfigError, match=r"has no effect with (kind|place)=.*; remove it"):
        tiny(drill={"faults": [{"step": 1, **fault}]})


@pytest.mark.parametrize("seed", range(1, 30))
@pytest.mark.parametrize(("ranks", "seconds", "step_seconds"), [(1, 60, 0.02), (4, 1200, 0.02), (2, 1200, 5.0)])
def test_a_plan_has_every_kind_in_order_and_with_room_to_recover(seed, ranks, seconds, step_seconds):
    plan = plan_drill([*KINDS], seed=seed, ranks=ranks, seconds=seconds, step_seconds=step_seconds)
    faults = [FaultRecipe(**fault) for fault in plan.faults]
    assert {fault.kind for fault in faults} == set(KINDS) and not plan.exact
    assert all(fault.rank < ranks for fault in faults)
    steps = [fault.step for fault in faults]
    assert steps == sorted(steps) and plan.every < steps[0] and steps[-1] + plan.every < plan.steps
    for fault, following in pairwise(faults):
        paired = fault.kind == "torn_write"  # with what has somebody look at the file
        room = following.step - fault.step - (fault.times if fault.kind == "slow" else 0)
        assert 1 <= room < 2 * plan.every if paired else room > plan.every, (fault, following)
        assert not paired or following.kind == "kill"
    assert all(fault.rank > 0 for fault in faults if fault.kind == "clock" and ranks > 1)
    assert plan == plan_drill([*KINDS], seed=seed, ranks=ranks, seconds=seconds, step_seconds=step_seconds)


def test_a_longer_drill_has_more_faults_and_costs_a_tenth():
    long = plan_drill(["kill", "nan"], seed=1, ranks=2, seconds=7200, step_seconds=0.05)
    assert len(long.faults) == 72 and long.exact
    assert 0.85 < long.steps * 0.05 / 7200 < 0.95
    assert long.deadline == 8 and plan_drill(["kill"], seed=1, ranks=2, seconds=60, step_seconds=2.0).deadline == 40


def test_a_flipped_bit_is_planned_where_a_majority_can_name_it(tiny):
    assert "flip" in kinds_of(None, tiny(), 4) and "flip" not in kinds_of(None, tiny(), 2)
    assert "flip" not in kinds_of(None, tiny(parallel={"tp": 2}), 4)
    spikes = tiny(guard={"spike": "skip"})
    assert "spike" not in kinds_of(None, spikes, 4) and kinds_of(["spike"], spikes, 1) == ["spike"]
    with pytest.raises(ConfigError, match="--faults keel: wanted some of kill, stop"):
        kinds_of(["keel"], tiny(), 1)
    assert set(NOTICES) == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "ranks", "parallel", "says"),
    [
        ("flip", 1, {}, "flip: nobody would notice it: one rank has no second replica to compare with; possible here:"),
        ("flip", 2, {"tp": 2}, "2 ranks have no second replica"),
        ("cut", 1, {}, "one rank has no connections; possible here: kill, stop, hang, nan, torn_write,"),
        ("slow", 1, {}, "one rank has no others to be slower than"),
        ("spike", 4, {}, "guard.spike=none looks for none .add guard.spike=skip.; possible here: kill"),
    ],
)
def test_what_nobody_would_notice_is_refused_before_anything_runs(tiny, kind, ranks, parallel, says):
    recipe = tiny(parallel=parallel)
    with pytest.raises(ConfigError, match=says) as caught:
        kinds_of(["kill", kind], recipe, ranks)
    assert "\n" not in str(caught.value) and kind not in kinds_of(None, recipe, ranks)
    assert {"kill", "stop", "hang"} <= set(kinds_of(None, recipe, ranks))


def test_a_spike_comes_when_enough_steps_are_known_and_one_rank_meets_no_collective():
    for seed in range(20):
        plan = plan_drill(["spike", "kill", "hang"], seed=seed, ranks=1, seconds=60, step_seconds=0.02)
        assert plan.faults[0]["step"] > NEEDED and plan.faults[-1]["step"] + plan.every < plan.steps
        assert all(fault.get("place") != "collective" for fault in plan.faults)


def test_sigterm_ends_the_launcher_of_a_drill_in_order_and_then_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "say", lambda line: os.kill(os.getpid(), signal.SIGTERM))  # once it runs
    monkeypatch.setattr(soak, "PATIENCE", 0.3)
    for trap, last in (("echo saved; exit 143", "saved"), ("", "error: runs")):
        launcher = Soak(Path("recipe.yaml"), 1, tmp_path / "log", drill=True)
        launcher._command = ["sh", "-c", f"trap '{trap}' TERM; echo error: runs; while :; do sleep 0.05; done"]
        with undone_on_sigterm(), pytest.raises(Terminated):
            launcher.run()
        assert [text for _, text in launcher.lines][-1] == last


def test_the_launcher_of_a_drill_ends_with_it_and_hears_no_terminal(tmp_path):
    launcher = Soak(Path("recipe.yaml"), 1, tmp_path / "log", drill=False)
    assert "--attached" in launcher._command
    launcher._command = [
        sys.executable,
        "-c",
        "from megaresnorm.resilience import processes as p; print(p.launchers())",
    ]
    assert launcher.run() == 0 and [text for _, text in launcher.lines] == [f"({os.getpid()},)"]


@pytest.mark.parametrize("json", ["", "no/such", "-"])
def test_json_of_a_drill_is_tried_at_the_start_and_stands_alone(tiny, tmp_path, monkeypatch, capsys, json):
    outcome = Outcome(DrillPlan(9, 4, 8, []), [], 0, 1.0, 1, None)
    ran = []

    def run(drill, *arguments, **options) -> Outcome:
        ran.append(say("timing    40 steps"))
        return outcome

    monkeypatch.setattr(DrillRun, "run", run)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny()))
    file = json if json == "-" else str(tmp_path / json)
    code = main(["drill", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out"), "--json", file])
    said = capsys.readouterr()
    if json == "-":
        assert code == 0 and loads(said.out)["passed"] and said.err == "timing    40 steps\n"
    else:
        (line,) = said.err.splitlines()
        assert code == 2 and not ran and not said.out and f"--json {file}: cannot be written (" in line


def table(tmp_path: Path, faults, injected, events=(), lines=()):
    (tmp_path / "drill").mkdir()
    for number, (rank, step, when) in injected.items():
        about = {"fault": number, "kind": faults[number]["kind"], "step": step, "rank": rank, "time": when}
        with (tmp_path / "drill" / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(about) + "\n")
    text = "".join(json.dumps({"schema_version": 1, "rank": None, "what": "", **one}) + "\n" for one in events)
    (tmp_path / "events.jsonl").write_text(text)
    return rows_of(faults, tmp_path, list(lines))


def test_each_fault_has_its_notice_and_the_steps_that_it_cost(tmp_path):
    faults = [
        {"kind": "kill", "step": 25, "rank": 1}, {"kind": "nan", "step": 40, "rank": 0, "place": "gradient"},
        {"kind": "stop", "step": 60, "rank": 1}, {"kind": "no_space", "step": 70, "rank": 0},
        {"kind": "torn_write", "step": 80, "rank": 1}, {"kind": "cut", "step": 90, "rank": 0},
        {"kind": "clock", "step": 95, "rank": 1}, {"kind": "flip", "step": 101, "rank": 2, "place": "weight"},
    ]  # fmt: skip
    injected = {0: (1, 25, 100.0), 1: (0, 40, 120.0), 2: (1, 60, 130.0), 3: (0, 70, 150.0), 4: (1, 80, 160.0),
                5: (0, 90, 180.0), 6: (1, 95, 200.0), 7: (2, 101, 210.0)}  # fmt: skip
    events = [
        {"kind": "start", "step": 1, "time": 90.0}, {"kind": "start", "step": 21, "time": 108.0},
        {"kind": "nonfinite", "step": 40, "time": 120.5}, {"kind": "hang", "step": 60, "time": 138.0, "rank": 1},
        {"kind": "start", "step": 51, "time": 146.0}, {"kind": "start", "step": 81, "time": 190.0},
        {"kind": "corruption", "step": 110, "time": 212.0, "rank": 2},
        {"kind": "rollback", "step": 110, "time": 212.1, "to_step": 100},
    ]  # fmt: skip
    lines = [
        (100.2, "megaresnorm: error: rank 0: another rank is gone (Connection reset by peer); start again"),
        (101.0, "megaresnorm: ranks are started again (1 of at most 9): rank 1 on vm: killed by SIGKILL; was its"),
        (152.0, "warning: run/checkpoints/step-00000080: no space: need 1 MB, have 2 GB; training goes on"),
        (
            170.0,
            "warning: run/checkpoints/step-00000084/weights-00001-00001.safetensors: has 9 bytes; going back to st",
        ),
        (180.1, "megaresnorm: error: another rank is gone (Connection closed by peer); start again"),
    ]
    rows = table(tmp_path, faults, injected, events, lines)
    assert all(row.right for row in rows), rows
    assert [row.named for row in rows] == [True, True, True, None, True, None, None, True]
    assert [row.after and round(row.after, 1) for row in rows] == [1.0, 0.5, 8.0, 2.0, 10.0, 0.1, None, 2.0]
    assert [row.lost for row in rows] == [4, 0, 9, 0, 0, 9, 0, 10]


def test_a_slow_rank_is_not_noticed_by_what_was_said_before_it_can_show(tmp_path):
    faults = [{"kind": "slow", "step": 30, "rank": 1, "times": 50}]
    early = {"kind": "straggler", "step": 30, "time": 50.2, "rank": 1}
    (row,) = table(tmp_path, faults, {0: (1, 30, 50.0)}, [early])
    assert not row.noticed
    (tmp_path / "events.jsonl").open("a").write(json.dumps(early | {"step": 50, "time": 52.0, "what": ""}) + "\n")
    (row,) = rows_of(faults, tmp_path, [])
    assert row.right and row.named and row.after == 2.0


def test_what_is_not_injected_noticed_or_named_rightly_does_not_pass(tmp_path):
    faults = [{"kind": "kill", "step": 5, "rank": 1}, {"kind": "hang", "step": 9, "rank": 0},
              {"kind": "nan", "step": 20, "rank": 1}]  # fmt: skip
    events = [{"kind": "hang", "step": 9, "time": 60.0, "rank": 1}, {"kind": "nonfinite", "step": 19, "time": 4.0}]
    rows = table(tmp_path, faults, {1: (0, 9, 50.0), 2: (1, 20, 70.0)}, events)
    assert [row.injected for row in rows] == [False, True, True]
    assert [row.noticed for row in rows] == ["", "events.jsonl", ""], "an event before a fault is none of its"
    assert rows[1].named is False and not any(row.right for row in rows)


def test_bad_arguments_of_a_drill_are_one_line(tiny, tmp_path, capsys):
    recipe, drilled = tmp_path / "recipe.yaml", tmp_path / "drilled.yaml"
    recipe.write_text(dump_recipe(tiny()))
    drilled.write_text(dump_recipe(tiny(drill={"faults": [{"kind": "kill", "step": 1}]})))
    for arguments, words in (
        ([str(recipe), "--faults", "kill,nap"], "--faults nap: wanted some of"),
        ([str(recipe), "--minutes", "0"], "is not a number of minutes"),
        ([str(recipe), "--ranks", "0"], "'0' is not a whole number"),
        ([str(recipe), "--out", str(tmp_path)], "it has something in it"),
        ([str(drilled)], "has a drill of its own"),
        ([str(tmp_path / "no.yaml")], "cannot be read"),
    ):
        assert main(["drill", *arguments]) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("megaresnorm: error: ") and words in line, line
