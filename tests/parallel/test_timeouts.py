"""The time-outs of process groups end ranks behind the watchdog, where nobody else has; the line names the setting."""

import time
from pathlib import Path

import pytest
import torch
from launched import be_rank

from megaresnorm import job as job_module
from megaresnorm import run as run_module
from megaresnorm.checkpoint import saver
from megaresnorm.errors import LostRankError
from megaresnorm.job import run_job
from megaresnorm.opening import open_recipe
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.resilience import following
from megaresnorm.resilience.watcher import Watcher
from megaresnorm.run import Run
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

STEP, START, BEHIND = 2, 30, 1  # seconds
LONGEST = 25.0  # that the silent rank waits for the other to have ended


def waits_before(steps: dict[int, float], heard: Path) -> None:
    """Let this rank be silent before the batches of some steps, but no longer than until ``heard`` is there."""
    real = Run.next_batch

    def next_batch(run: Run):
        end = time.monotonic() + steps.get(run.steps_done + 1, 0.0)
        while time.monotonic() < end and not heard.exists():
            time.sleep(0.02)
        return real(run)

    Run.next_batch = next_batch


def noted_steps() -> list[float]:
    """When this rank begins each of its steps."""
    real, began = Run.next_batch, []

    def next_batch(run: Run):
        began.append(time.monotonic())
        return real(run)

    Run.next_batch = next_batch
    return began


def without_watchers() -> None:
    """Let nothing end this rank but the time-outs of its groups, which come a little sooner than they would."""
    Watcher.start = lambda self: None
    run_module.BACKUP = job_module.BACKUP = following.BACKUP = float(BEHIND)


def ends_in(rank: int, path: Path, silences: dict[int, float]) -> tuple[int, float, int, str]:
    """Steps that a rank has begun, the seconds of its last one, and the exit code and line with which it ends."""
    be_rank(rank, 2)
    without_watchers()
    heard, began = path.parent / "heard", noted_steps()
    if rank == 1:
        waits_before(silences, heard)
    try:
        run_job(str(path))
    except LostRankError as e:
        ended = time.monotonic()
        heard.touch()
        return len(began), ended - began[-1], e.exit_code, str(e)
    raise AssertionError("it went on")


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_a_rank_is_waited_for_longer_at_the_start_than_in_a_step(layout, tiny, tmp_path):
    """It is silent for longer than watchdog.step before step 1, which is no error, and in step 3, which is one."""
    parallel = {"tp": 2} if layout == "tp2" else {}
    recipe = tiny(parallel=parallel, watchdog={"start": START, "step": STEP, "checkpoint": 50})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    first, second = run_ranks(2, ends_in, path, {1: STEP + BEHIND + 0.5, 3: LONGEST}, timeout=60)
    steps, seconds, code, line = first
    assert steps == 3 and code == 6 and STEP + BEHIND - 0.1 < seconds < STEP + BEHIND + 3, first
    assert line == (
        f"another rank was silent for {STEP + BEHIND} s (watchdog.step={STEP}); "
        "start again to go on from the newest checkpoint"
    )
    assert second[0] == 3 and "is gone (" in second[3]  # the silent rank finds the other one gone


def saves(rank: int, path: Path) -> tuple[list[float], str]:
    """Seconds of this rank in each checkpoint, and its last line. Rank 1 is slow in the first, silent in the second."""
    be_rank(rank, 2)
    without_watchers()
    heard, slow, saved, real = path.parent / "heard", [STEP + BEHIND + 0.5, LONGEST], [], saver.save_checkpoint

    def save_checkpoint(*arguments, **options):
        end = time.monotonic() + (slow.pop(0) if rank else 0.0)
        while time.monotonic() < end and not heard.exists():
            time.sleep(0.02)
        began = time.monotonic()
        try:
            return real(*arguments, **options)
        finally:
            saved.append(time.monotonic() - began)

    saver.save_checkpoint = save_checkpoint
    try:
        run_job(str(path))
    except LostRankError as e:
        heard.touch()
        return saved, str(e)
    raise AssertionError("it went on")


def test_the_slowest_to_write_a_checkpoint_is_waited_for_longer_than_in_a_step(tiny, tmp_path):
    settings = {"every": 1, "asynchronous": False}
    recipe = tiny(checkpoint=settings, watchdog={"start": START, "step": STEP, "checkpoint": STEP + 2})
    waits = STEP + 2 + BEHIND
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    (saved, line), _ = run_ranks(2, saves, path, timeout=60)
    assert len(saved) == 2 and STEP + BEHIND < saved[0] < waits <= saved[1] + 0.1 < waits + 3, saved
    assert line.startswith(f"another rank was silent for {waits} s (watchdog.checkpoint={STEP + 2}); ")


def meets(rank: int, values: dict, folder: Path) -> tuple[float, str]:
    be_rank(rank, 2)
    began = time.monotonic()
    if rank == 1:  # never comes
        while not (folder / "heard").exists() and time.monotonic() < began + LONGEST:
            time.sleep(0.02)
        return 0.0, ""
    try:
        open_recipe(lambda: build_recipe(values))
    except LostRankError as e:
        (folder / "heard").touch()
        return time.monotonic() - began, str(e)
    raise AssertionError("it went on")


def test_a_rank_that_never_comes_is_waited_for_as_long_as_a_start_may_take(tiny, tmp_path):
    values = tiny(watchdog={"start": 2}).model_dump(exclude_none=True)
    (seconds, line), _ = run_ranks(2, meets, values, tmp_path, timeout=30)
    assert line == "rank 1 did not come within 2 s (watchdog.start); start again to go on"
    assert 1.9 < seconds < 5


def seconds_of_groups(rank: int, sizes: Sizes) -> tuple[dict[str, float], dict[str, float]]:
    """The time-out of each axis's group when it has been made, and after ``set_timeouts``."""
    context = ParallelContext.create(sizes, "cpu", 40)

    def look() -> dict[str, float]:
        groups = {name: axis.group for name, axis in vars(context).items() if getattr(axis, "group", None) is not None}
        backends = {name: group._get_backend(torch.device("cpu")) for name, group in groups.items()}
        return {name: backend.options._timeout.total_seconds() for name, backend in backends.items()}

    made = look()
    context.set_timeouts(5, 70)
    return made, look()


def test_every_group_of_every_axis_has_the_time_outs_that_it_is_given():
    sizes = Sizes(pp=2, dp_shard=2, tp=1)
    for made, later in run_ranks(4, seconds_of_groups, sizes):
        assert {"pp", "dp_shard", "dp", "model_shards", "world", "embedding", "control"} == set(made) == set(later)
        assert set(made.values()) == {40}
        assert later == {name: 70 if name == "control" else 5 for name in later}


def test_how_long_ranks_wait_may_differ_when_a_run_is_resumed(tiny, caplog):
    train(tiny(train={"steps": 2}))
    summary = train(tiny(train={"steps": 3}, watchdog={"start": 60, "step": 61, "checkpoint": 62}))
    assert summary.steps == 3 and "watchdog.step was null up to step 2 and is 61 from now on" in caplog.text
