"""kill -9 of a rank at any moment: started again, the run ends with the losses and weights of one left alone."""

import os
import random
import signal
import time

import pytest
from launched import INTERVAL, LAYOUTS, STEPS, Launched, losses


def kill_and_compare(long_run, undisturbed, tmp_path, layout: str, seed: int, during_save: bool) -> tuple[int, float]:
    """Steps that were lost, and the seconds from the kill to the first step after it."""
    ranks, recipe = long_run(layout, f"{layout}-{seed}".replace(" ", "-"))
    want_losses, want_digest = undisturbed(recipe, ranks)
    chance = random.Random(f"{layout} {seed}")
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(chance.randrange(INTERVAL + 2, STEPS - INTERVAL))
    if during_save:
        root = run.output / "checkpoints"
        run.wait_for(lambda: any(name.startswith(".tmp-") for name in os.listdir(root)), "save", poll=0.0005)
    else:
        time.sleep(chance.uniform(0, 0.05))
    victim = run.ranks()[chance.randrange(ranks)]
    os.kill(victim, signal.SIGKILL)
    killed, done = time.monotonic(), len(losses(run.output))
    assert run.finish() == 0, run.text
    assert "resumed   " in run.text, run.text
    first_at, first = next((at, step) for at, step in run.steps if at > killed + 1)
    assert losses(run.output) == want_losses and run.digest == want_digest
    return done - (first - 1), first_at - killed


@pytest.mark.parametrize(
    ("layout", "during_save"), [("dp2", True), pytest.param("tp2 dp2", False, marks=pytest.mark.slow)]
)
def test_a_killed_rank_loses_at_most_an_interval(long_run, undisturbed, tmp_path, layout, during_save):
    lost, seconds = kill_and_compare(long_run, undisturbed, tmp_path, layout, 0, during_save)
    assert 0 <= lost <= INTERVAL + during_save and seconds < 40


@pytest.mark.slow
def test_twenty_kills(long_run, undisturbed, tmp_path):
    """Five for each layout, every second one during a save; the figures are printed with pytest -s."""
    figures = []
    for layout in LAYOUTS:
        for seed in range(1, 6):
            lost, seconds = kill_and_compare(long_run, undisturbed, tmp_path, layout, seed, during_save=seed % 2 == 0)
            figures.append((layout, seed, lost, seconds))
            print(f"{layout:8} kill {seed}: {lost:3d} steps lost, {seconds:5.1f} s to the next step", flush=True)
    assert all(0 <= lost <= INTERVAL + (seed % 2 == 0) for _, seed, lost, _ in figures)
    assert sorted(seconds for *_, seconds in figures)[len(figures) // 2] <= 15


@pytest.mark.slow
def test_a_job_may_lose_more_ranks_than_max_restarts_as_long_as_it_makes_progress(long_run, tmp_path):
    """Three kills with a checkpoint between them under MAX_RESTARTS=1, then two without one: the job ends with 6."""
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks, MAX_RESTARTS="1")
    for number in range(1, 4):
        run.wait_for_step(2 * INTERVAL * number)
        os.kill(run.ranks()[0], signal.SIGKILL)
        run.wait_for(lambda number=number: run.text.count("resumed   ") == number, "next start")
    for _ in range(2):
        count = run.text.count("resumed   ")
        os.kill(run.ranks()[1], signal.SIGKILL)
        run.wait_for(
            lambda count=count: (
                run.process.poll() is not None or run.text.count("resumed   ") > count or "died" in run.text
            ),
            "next start or end",
        )
    assert run.finish(60) == 6 and "died 2 times without a new checkpoint (MAX_RESTARTS=1)" in run.text


def test_ranks_that_die_at_their_start_are_not_started_for_ever(tiny, tmp_path):
    """Before they could count how often: a library that crashes when it is loaded."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\nif os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run = Launched(tmp_path, tiny(), 2, MAX_RESTARTS="1", PYTHONPATH=path)
    assert run.finish(60) == 6 and "ranks were started 5 times and died" in run.text
    assert run.text.splitlines()[-1].endswith(": killed by SIGSEGV") and "rank 1 on " in run.text.splitlines()[-1]
