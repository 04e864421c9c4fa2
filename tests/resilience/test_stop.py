"""SIGTERM to one rank, to all of them or to the launcher: one step more at most, one checkpoint, one exit code, resumed exactly."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from launched import INTERVAL, LAYOUTS, STEPS, Launched, losses

from megaresnorm.checkpoint.format import list_checkpoints

TARGETS = ("one rank", "all ranks", "the launcher", "the whole job")


def stop_and_resume(
    long_run, undisturbed, tmp_path, layout: str, target: str, step: int, number=signal.SIGTERM
) -> None:
    ranks, recipe = long_run(layout, f"{layout}-{step}".replace(" ", "-"))
    want_losses, want_digest = undisturbed(recipe, ranks)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(step)
    before = run.steps[-1][1]
    pids = {
        "the launcher": [run.process.pid],
        "all ranks": run.ranks(),
        "one rank": [random.Random(step).choice(run.ranks())],
        "the whole job": [run.process.pid, run.torchrun, *run.ranks()],  # as a batch system ends one
    }[target]
    for pid in pids:
        os.kill(pid, number)
    assert run.finish(60) == 128 + number, run.text
    done = len(losses(run.output))
    # Signals come while the line of a step is on its way to us: the step at hand may be two further than what we have read.
    assert before <= done <= before + 3, run.text
    newest, path = list_checkpoints(run.output / "checkpoints")[-1]
    assert newest == done and f"saved step {done} of {STEPS}" in run.text
    assert "Traceback" not in run.text and not list(path.parent.glob(".tmp-*"))
    again = Launched(tmp_path, recipe, ranks)
    assert again.finish() == 0 and f"step {done} of {STEPS}" in again.text
    assert losses(run.output) == want_losses and again.digest == want_digest


@pytest.mark.parametrize(("layout", "target"), [("tp2", "one rank"), ("dp2", "the whole job")])
def test_a_signal_stops_all_ranks_at_one_step(long_run, undisturbed, tmp_path, layout, target):
    stop_and_resume(long_run, undisturbed, tmp_path, layout, target, step=23)


@pytest.mark.slow
def test_signals_at_ten_random_steps(long_run, undisturbed, tmp_path):
    chance = random.Random(7)
    for i in range(10):
        layout, target = list(LAYOUTS)[(i + i // 4) % 4], TARGETS[i % 4 if i < 8 else i - 8]
        step = chance.randrange(1, STEPS - INTERVAL)
        stop_and_resume(long_run, undisturbed, tmp_path, layout, target, step, (signal.SIGTERM, signal.SIGUSR1)[i == 5])
        print(f"{layout:8} {target} at step {step}: stopped and resumed", flush=True)


def test_a_signal_before_the_first_step_is_not_lost(long_run, tmp_path):
    """Ranks that are only starting are started again by torchrun, hear of it, and end."""
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for(lambda: "using" in run.text and _started(run), "start of the ranks")
    time.sleep(0.3)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.finish(60) == 143, run.text


def _started(run: Launched) -> bool:
    try:
        return len(run.ranks()) == run.num_ranks
    except (ValueError, FileNotFoundError):
        return False


def test_a_second_signal_ends_at_once_and_tears_nothing(long_run, undisturbed, tmp_path):
    """A rank that is stopped by SIGSTOP keeps the others from ever saving; the second signal ends them all the same."""
    ranks, recipe = long_run("dp2")
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(INTERVAL + 3)
    first, second = run.ranks()
    os.kill(second, signal.SIGSTOP)
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(1)
    assert run.process.poll() is None
    start = time.monotonic()
    os.kill(run.process.pid, signal.SIGTERM)
    while alive(first):
        assert time.monotonic() - start < 3
        time.sleep(0.01)
    os.kill(second, signal.SIGCONT)
    assert run.finish(60) == 143 and "a second signal: ended at once" in run.text
    again = Launched(tmp_path, recipe, ranks)
    assert again.finish() == 0
    assert losses(run.output) == undisturbed(recipe, ranks)[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_bad_recipe_is_not_started_again(long_run, tmp_path):
    """One line, the exit code of the error, and no restart by torchrun."""
    ranks, recipe = long_run("tp2")
    run = Launched(
        tmp_path, recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"tp": 4})}), ranks
    )
    assert run.finish() == 2
    assert run.text.count("megaresnorm: error:") == 1 and "Traceback" not in run.text


def test_a_second_job_in_the_same_folder_is_refused(long_run, tmp_path):
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(3)
    other = Launched(tmp_path, recipe, ranks)
    assert other.finish() == 5
    assert f"train.output={run.output} is in use by pid {run.ranks()[0]} of" in other.text
    os.kill(run.process.pid, signal.SIGINT)
    assert run.finish() == 130 and len(losses(run.output)) == run.steps[-1][1]
