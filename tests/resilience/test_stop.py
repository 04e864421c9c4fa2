"""SIGTERM to one rank, all or the launcher: at most one more step, one checkpoint, one exit code, an exact resume."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launched import INTERVAL, LAYOUTS, STEPS, Launched, alive, losses

from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.resilience.hearing import REPEATS

TARGETS = ("one rank", "all ranks", "the launcher", "torchrun", "the whole job")


def targets(run: Launched, target: str, chance: random.Random) -> list[int]:
    """Process ids that a signal is sent to; ``the whole job`` is what batch systems do."""
    return {
        "the launcher": lambda: [run.process.pid],
        "torchrun": lambda: [run.torchrun],
        "all ranks": run.ranks,
        "one rank": lambda: [chance.choice(run.ranks())],
        "the whole job": run.everybody,
    }[target]()


def stop_and_resume(
    long_run, undisturbed, tmp_path, layout: str, target: str, step: int, number=signal.SIGTERM
) -> None:
    ranks, recipe = long_run(layout, f"{layout}-{step}".replace(" ", "-"))
    want_losses, want_digest = undisturbed(recipe, ranks)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(step)
    before = run.steps[-1][1]
    for pid in targets(run, target, random.Random(step)):
        os.kill(pid, number)
    assert run.finish(60) == 128 + number, run.text
    done = len(losses(run.output))
    # Signals come while the line of a step is on its way to us: the run may be two steps further than we have read.
    assert before <= done <= before + 3, run.text
    newest, path = list_checkpoints(run.output / "checkpoints")[-1]
    assert newest == done and f"saved step {done} of {STEPS}" in run.text
    assert "Traceback" not in run.text and not list(path.parent.glob(".tmp-*"))
    again = Launched(tmp_path, recipe, ranks)
    assert again.finish() == 0 and f"step {done} of {STEPS}" in again.text
    assert losses(run.output) == want_losses and again.digest == want_digest


@pytest.mark.parametrize(
    ("layout", "target"), [("tp2", "one rank"), pytest.param("dp2", "the whole job", marks=pytest.mark.slow)]
)
def test_a_signal_stops_all_ranks_at_one_step(long_run, undisturbed, tmp_path, layout, target):
    stop_and_resume(long_run, undisturbed, tmp_path, layout, target, step=23)


@pytest.mark.slow
def test_signals_at_ten_random_steps(long_run, undisturbed, tmp_path):
    chance = random.Random(7)
    for i in range(10):
        layout, target = list(LAYOUTS)[(i + i // 4) % 4], TARGETS[i % 5]
        step = chance.randrange(1, STEPS - INTERVAL)
        stop_and_resume(long_run, undisturbed, tmp_path, layout, target, step, (signal.SIGTERM, signal.SIGUSR1)[i == 5])
        print(f"{layout:8} {target} at step {step}: stopped and resumed", flush=True)


FIRST_TARGETS = ("one rank", "the whole job")


@pytest.mark.parametrize(
    "target", [t if t in FIRST_TARGETS else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
)
def test_a_signal_before_the_first_step_ends_all_at_once(long_run, tmp_path, target):
    """Ranks that are only importing torch; there is nothing to save, and nothing of the job is left."""
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for(lambda: _started(run), "start of the ranks")
    everybody, start = run.everybody(), time.monotonic()
    for pid in targets(run, target, random.Random(target)):
        os.kill(pid, signal.SIGTERM)
    assert run.finish(30) == 143, run.text
    assert time.monotonic() - start < 10 and not any(map(alive, everybody))
    assert not run.steps and "Traceback" not in run.text


def _started(run: Launched) -> bool:
    return len(run.everybody()) == run.num_ranks + 2


def test_usr1_leaves_the_file_by_which_a_batch_job_is_queued_again(long_run, tmp_path):
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks, arguments=("--saved", str(tmp_path / "saved")))
    run.wait_for_step(3)
    assert not (tmp_path / "saved").exists()
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.finish(60) == 138 and (tmp_path / "saved").exists(), run.text


def test_a_second_signal_ends_at_once_and_tears_nothing(long_run, undisturbed, tmp_path):
    """A rank that is stopped by SIGSTOP keeps the others from ever saving; the second signal ends them all the same."""
    ranks, recipe = long_run("dp2")
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(INTERVAL + 3)
    first, second = run.ranks()
    os.kill(second, signal.SIGSTOP)
    os.kill(run.process.pid, signal.SIGTERM)
    time.sleep(2 * REPEATS)  # what comes sooner counts as the same signal
    assert run.process.poll() is None
    start = time.monotonic()
    os.kill(run.process.pid, signal.SIGTERM)
    while alive(first):
        assert time.monotonic() - start < 3
        time.sleep(0.01)
    assert run.finish(60) == 143 and "a second signal: ended at once" in run.text
    again = Launched(tmp_path, recipe, ranks)
    assert again.finish() == 0
    assert losses(run.output) == undisturbed(recipe, ranks)[0]


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


def test_a_job_started_with_signals_ignored_hears_them(long_run, tmp_path):
    """As nohup, cron and shell scripts start jobs in the background: bash could not trap what is ignored on entry."""
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks, ignored=(signal.SIGINT, signal.SIGHUP, signal.SIGTERM))
    run.wait_for_step(3)
    os.kill(run.process.pid, signal.SIGHUP)  # which nohup means to be ignored
    time.sleep(1)
    run.wait_for_step(run.steps[-1][1] + 1)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.finish(60) == 130 and f"saved step {len(losses(run.output))} of" in run.text


def test_a_signal_while_it_is_found_out_how_many_ranks_there_are(long_run, tmp_path):
    _, recipe = long_run("dp2")
    run = Launched(tmp_path, recipe, 2, ignored=(signal.SIGINT,), RANKS_PER_NODE="")
    run.wait_for(lambda: any("device_count" in command(pid) for pid in run.everybody()), "question for GPUs")
    os.kill(run.process.pid, signal.SIGINT)
    assert run.finish(30) == 130 and "Traceback" not in run.text and not run.steps


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.parametrize("victim", ["the script", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_nothing_outlives_a_killed_script_or_torchrun(long_run, tmp_path, victim):
    """kill -9: the ranks see that nobody would end them any more, end, and leave the folder to the next job."""
    ranks, recipe = long_run("dp2", steps=10**6)
    run = Launched(tmp_path, recipe, ranks)
    run.wait_for_step(2)
    everybody, start = run.everybody(), time.monotonic()
    os.kill(run.process.pid if victim == "the script" else run.torchrun, signal.SIGKILL)
    assert len(everybody) == ranks + 2
    while any(map(alive, everybody)):
        assert time.monotonic() - start < 10, [pid for pid in everybody if alive(pid)]
        run.process.poll()
        time.sleep(0.05)
    assert run.finish(10) == (-signal.SIGKILL if victim == "the script" else 1)
    again = Launched(tmp_path, recipe, ranks)
    again.wait_for_step(3)


STOPS = 2  # in CI; 200 with the slow tests


@pytest.mark.parametrize("count", [STOPS, pytest.param(200, marks=pytest.mark.slow)])
def test_stops_at_random_moments_are_obeyed(long_run, tmp_path, count):
    """INT, TERM or USR1 to the script, torchrun, one rank or the whole job, from its start on, in three layouts.

    Some are beside a job that is being refused, every fourth is under load. All are out within 30 seconds, with the
    signal's exit code and all steps that were done saved.
    """
    chance, slowest = random.Random(count), 0.0
    for i in range(count):
        layout, target = ("dp2", "tp2", "pp2")[i % 3], ("the launcher", "torchrun", "one rank", "the whole job")[i % 4]
        number = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)[(i // 3) % 3]
        ranks, recipe = long_run(layout, f"{layout}-stopped", steps=10**6)
        run = Launched(tmp_path / str(i % 2), recipe, ranks)
        refused = None
        load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (i % 4 == 3))]
        try:
            run.wait_for(lambda run=run: _started(run), "start of the ranks")
            if chance.random() < 0.6:
                run.wait_for_step(1)
                refused = Launched(tmp_path / "refused", recipe, ranks) if i % 3 == 2 else None
            time.sleep(chance.uniform(0, 1.5))
            pids, start = targets(run, target, chance), time.monotonic()
            for pid in pids:
                os.kill(pid, number)
            code = run.finish(60)
            seconds = time.monotonic() - start
        finally:
            for process in load:
                process.kill()
                process.wait()
        where = f"stop {i}: {number.name} to {target}, {layout}\n{run.text}"
        assert code == 128 + number and seconds < 30 and "Traceback" not in run.text, where
        saved = [step for step, _ in list_checkpoints(run.output / "checkpoints")]
        assert max(saved, default=0) == len(losses(run.output)), where
        if refused is not None:
            end = time.monotonic() + 60  # it trains where the other had left the folder before it asked for it
            while refused.process.poll() is None and not refused.steps:
                assert time.monotonic() < end, refused.text
                time.sleep(0.05)
            assert refused.steps or refused.process.returncode in (5, code), refused.text
            refused.end()
        slowest = max(slowest, seconds)
    print(f"{count} stops obeyed, the slowest within {slowest:.1f} s", flush=True)
