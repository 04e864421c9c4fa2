"""Runs in which ranks hang: found in time, named, ended and started again; and slow ones in which none does."""

import json
import random
import re
import signal
import time
from pathlib import Path

import pytest
from launched import Launched, alive, be_rank

from megaresnorm.resilience.hang_report import EXIT_CODE
from megaresnorm.run import Run
from megaresnorm.testing import run_ranks

LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2}), "tp2 pp2": (4, {"tp": 2, "pp": 2})}
SAVES = 3  # steps between two checkpoints
PHASES = {  # place of a fault -> what is said of its rank
    "stop": r"hangs .* for [0-9.]+ s, stopped by a signal \(watchdog\.",
    "collective": r"hangs in step \d+ in the (forward pass, microbatch 0(, block \d)?|update) for",
    "loader": r"hangs in step \d+ while reading samples for",
    "save": r"hangs while saving step \d+ for",
    "interpreter": r"hangs in step \d+ before its samples are read for",
}


def hanging(tiny, tmp_path, layout: str, faults: list[tuple[str, int, int]], deadline: int, **variables: str):
    """A run with faults: (place, or stop; rank; step)."""
    ranks, parallel = LAYOUTS[layout]
    listed = [
        {"kind": "stop" if place == "stop" else "hang", "place": "step" if place == "stop" else place}
        | {"rank": rank, "step": step}
        for place, rank, step in faults
    ]
    recipe = tiny(
        model={"num_blocks": 4},
        train={"steps": faults[-1][2] + 2 * SAVES, "eval_every": 0},
        checkpoint={"every": SAVES},
        parallel=parallel,
        watchdog={"start": 120, "step": deadline, "checkpoint": deadline},
        drill={"faults": listed},
    )
    return Launched(tmp_path, recipe, ranks, MEGARESNORM_DRILL="1", **variables)


def noted_in(output: Path) -> list[dict]:
    path = output / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events_of(run: Launched) -> list[dict]:
    return [event for event in noted_in(run.output) if event["kind"] == "hang"]


def injected(run: Launched) -> dict[int, dict]:
    """By number of the fault."""
    lines = [line for path in (run.output / "drill").glob("*.jsonl") for line in path.read_text().splitlines()]
    return {fault["fault"]: fault for fault in map(json.loads, lines)}


def check(run: Launched, faults: list[tuple[str, int, int]], deadline: int) -> list[float]:
    """Seconds from each fault to its report; whether rank, phase and step are named is asserted."""
    events, done, seconds = events_of(run), injected(run), []
    assert len(events) == len(done) == len(faults), run.text
    for number, ((place, rank, step), event) in enumerate(zip(faults, events, strict=True)):
        report = (run.output / event["report"]).read_text()
        seconds.append(event["time"] - done[number]["time"])
        assert event["ranks"] == [event["rank"]] == [rank], report
        # What is read in a step are the samples of the next; a checkpoint is one of the steps that follow.
        if place == "save":
            assert step <= event["step"] <= step + SAVES and event["step"] % SAVES == 0, report
        else:
            assert event["step"] == done[number]["step"] and step - 1 <= event["step"] <= step, report
        assert re.match(PHASES[place], event["what"]), report
        assert f"rank {rank} on {event['host']}: {event['what']}; stacks: " in run.text
        assert seconds[-1] <= deadline + 2, report
        others = [r for r in range(run.num_ranks) if r != rank]
        assert all(f"--- stacks of rank {r}," in report for r in others), report
        assert (f"--- stacks of rank {rank}," in report) == (place != "stop"), report
    return seconds


@pytest.mark.parametrize(
    ("layout", "faults"),
    [
        ("tp2", [("stop", 1, 4), ("interpreter", 0, 10), ("collective", 1, 16)]),
        pytest.param("pp2", [("loader", 1, 4), ("save", 0, 10), ("stop", 0, 16)], marks=pytest.mark.slow),
        pytest.param("dp2", [("collective", 0, 4), ("save", 1, 10)], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_hang_are_named_ended_and_started_again(tiny, tmp_path, layout, faults):
    run = hanging(tiny, tmp_path, layout, faults, 2)
    everybody = run.everybody()
    assert run.finish() == 0, run.text
    check(run, faults, 2)
    starts = sum(line.startswith("model     ") for _, line in run.lines)
    assert starts == len(faults) + 1 and not any(map(alive, everybody))


@pytest.mark.slow
def test_a_job_that_was_asked_to_stop_ends_with_its_hang(tiny, tmp_path):
    run = hanging(tiny, tmp_path, "dp2", [("stop", 1, 7)], 4)
    run.wait_for(lambda: injected(run), "a stopped rank")
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 143, run.text
    assert [event["rank"] for event in events_of(run)] == [1], run.text
    assert run.lines[-1][1] == "megaresnorm: SIGTERM: ended without saving, since rank 1 hung", run.text
    assert "before the first step" not in run.text and "started again" not in run.text


@pytest.mark.slow
def test_a_hang_that_is_not_to_be_started_again_is_the_jobs_last_word(tiny, tmp_path):
    faults = [("interpreter", 1, 4)]
    run = hanging(tiny, tmp_path, "dp2", faults, 2, MAX_RESTARTS="0")
    run.wait_for(lambda: "ranks     2 =" in run.text, "ranks")
    everybody = run.everybody()
    assert run.finish() == EXIT_CODE, run.text
    check(run, faults, 2)
    assert re.match(r"megaresnorm: error: rank 1 on \S+: hangs in step 4 ", run.lines[-1][1]), run.text
    assert not any(map(alive, everybody))


@pytest.mark.slow
@pytest.mark.parametrize("place", PHASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_hundred_hangs(tiny, tmp_path, layout, place):
    """Five for each layout and place, of random ranks, in one run; the figures are printed with pytest -s."""
    chance = random.Random(f"{layout} {place}")
    faults = [(place, chance.randrange(LAYOUTS[layout][0]), 4 + 6 * number) for number in range(5)]
    run = hanging(tiny, tmp_path, layout, faults, 10)
    assert run.finish(600) == 0, run.text
    seconds = check(run, faults, 10)
    print(f"\nfound {layout} {place}: {', '.join(f'{one:.2f}' for one in seconds)} s, 5 of 5 named", flush=True)


def takes_its_time(rank: int, recipe, seconds: float) -> int:
    """Slow, on one rank or the other, in the first step, evaluations, saves and loggers; returns the steps done."""
    from megaresnorm.checkpoint import saver
    from megaresnorm.telemetry.metrics import MetricsWriter
    from megaresnorm.trainer import train

    be_rank(rank, 2)
    next_batch, evaluate, save = Run.next_batch, Run.evaluate, saver.save_checkpoint

    def slow(method, only):
        def call(*arguments, **options):
            time.sleep(seconds if rank == only else 0.0)
            return method(*arguments, **options)

        return call

    def slow_at_first(run):
        time.sleep(seconds if rank and run.steps_done == 0 else 0.0)
        return next_batch(run)

    MetricsWriter.close = slow(MetricsWriter.close, 0)
    Run.next_batch, Run.evaluate, saver.save_checkpoint = slow_at_first, slow(evaluate, 0), slow(save, 1)
    return train(recipe).steps


@pytest.mark.parametrize(("seconds", "steps", "every"), [(1.8, 2, 1), pytest.param(20, 60, 2, marks=pytest.mark.slow)])
def test_what_takes_its_time_is_no_hang(tiny, tmp_path, seconds, steps, every):
    """First steps, evaluations, saves, loggers that take longer than a step may; the long form takes twenty minutes."""
    recipe = tiny(
        train={"steps": steps, "eval_every": every},
        checkpoint={"every": every, "asynchronous": False},
        watchdog={"start": 120, "step": 1, "evaluation": 60, "checkpoint": 60},
    )
    assert run_ranks(2, takes_its_time, recipe, seconds, timeout=3000) == [steps, steps]
    assert not [event for event in noted_in(tmp_path / "run") if event["kind"] == "hang"]


def test_a_run_without_a_supervisor_is_watched_by_its_first_rank(tiny, tmp_path):
    """The other rank hangs, holding its interpreter; both are gone, and the report says why."""
    import ctypes

    recipe = tiny(watchdog={"start": 60, "step": 1})

    def rank_of(rank: int, recipe) -> int:
        from megaresnorm.trainer import train

        be_rank(rank, 2)
        real = Run.next_batch

        def next_batch(run):
            while rank and run.steps_done == 2:
                ctypes.PyDLL(None).sleep(100)
            return real(run)

        Run.next_batch = next_batch
        return train(recipe).steps

    with pytest.raises(Exception, match=r"\[6, -9\]"):  # exit codes
        run_ranks(2, rank_of, recipe, timeout=60)
    (report,) = (tmp_path / "run").glob("hang-3-*.txt")
    assert "hangs in step 3 while reading samples for" in report.read_text()
