"""A full, read-only or forbidden disk is found before step 0, or one warning: training goes on, whole files stay."""

import errno
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from launched import losses

from megaresnorm.checkpoint import writer
from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.checkpoint.inspect import verify
from megaresnorm.errors import TrainingError
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer, train

SIZE = 3 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk needs the right to mount a small one ({mounted.stderr.strip()})")
    yield folder
    for _ in range(50):  # a thread that lets go of a file may be late on a busy machine
        if subprocess.run(["umount", str(folder)]).returncode == 0:
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} stays in use")


def fill(folder: Path, leave: int) -> None:
    """All but ``leave`` bytes."""
    descriptor = os.open(folder / "filler", os.O_WRONLY | os.O_CREAT)
    try:
        while (free := os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize) > leave:
            os.write(descriptor, bytes(min(free - leave, 2**16)))
    except OSError as e:
        assert e.errno == errno.ENOSPC
    finally:
        os.close(descriptor)


def at_steps(monkeypatch, actions: dict) -> None:
    """Do something before a step of the run."""
    real = Trainer.step

    def step(trainer):
        run = trainer.run
        if run.steps_done in actions:
            run.saver.wait()  # for a checkpoint that is still being written, which may make room when it is done
            actions[run.steps_done]()
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.parametrize("case", range(20))
def test_a_full_disk_costs_checkpoints_and_nothing_else(tiny, disk, tmp_path, monkeypatch, caplog, case):
    """Full from step 14 to 26 of 36, with more or less left; in every second case found in the middle of a write."""
    chance = random.Random(case)
    common = {"steps": 36, "eval_every": 0, "loggers": ["tensorboard"]}
    recipe = tiny(train=common | {"output": str(disk / "run")}, checkpoint={"every": 4, "max_failures": 4})
    want = train(tiny(train=common | {"output": str(tmp_path / "plain")}))
    if case % 2:
        monkeypatch.setattr(writer, "free_bytes", lambda root: 10**12)
    root = disk / "run" / "checkpoints"

    def full():
        fill(disk, chance.choice([0, 0, 5_000, 100_000, 190_000]))

    def still_whole():
        assert [step for step, _ in list_checkpoints(root)] == [8, 12]
        assert all(verify(path) == [] for _, path in list_checkpoints(root))
        (disk / "filler").unlink()

    at_steps(monkeypatch, {14: full, 26: still_whole})
    got = train(recipe)
    assert got.weights_digest == want.weights_digest
    assert losses(disk / "run") == losses(tmp_path / "plain") and len(losses(disk / "run")) == 36
    failures = [
        r.getMessage() for r in caplog.records if "training goes on, the newest is step-00000012" in r.getMessage()
    ]
    assert len(failures) == 3 and all("no space: need 20" in f and "have " in f and str(root) in f for f in failures), (
        failures
    )
    assert [step for step, _ in list_checkpoints(root)] == [32, 36]
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(disk / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 37))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_some_failures_in_a_row_end_the_run(tiny, disk, monkeypatch, asynchronous):
    recipe = tiny(
        train={"steps": 60, "eval_every": 0, "output": str(disk / "run")},
        checkpoint={"every": 4, "max_failures": 3, "asynchronous": asynchronous},
    )
    at_steps(monkeypatch, {10: lambda: fill(disk, 0)})
    with pytest.raises(
        TrainingError, match=r"3 checkpoints in a row could not be written to .*; the newest is step-00000008"
    ):
        train(recipe)
    (disk / "filler").unlink()
    monkeypatch.undo()
    assert train(recipe).steps == 60


def test_a_disk_that_is_too_small_is_found_before_step_0(tiny, disk):
    (disk / "run").mkdir()
    fill(disk, 100_000)
    with pytest.raises(
        TrainingError, match=r"no space: need 20\d\.\d kB for a checkpoint, have \d+\.\d kB in .*; make room"
    ):
        train(tiny(train={"output": str(disk / "run")}))
    assert not losses(disk / "run")


def test_what_a_killed_save_left_is_no_reason_to_end(tiny, disk):
    """It is removed before the room is measured: a run that is started again must find the room that it had."""
    left = disk / "run" / "checkpoints" / ".tmp-step-00000004"
    left.mkdir(parents=True)
    fill(left, 450_000)
    fill(disk, 100_000)
    with Run(tiny(train={"output": str(disk / "run")})):
        assert not left.exists()


def test_a_disk_with_room_for_one_checkpoint_alone_is_told(tiny, disk, caplog):
    (disk / "run").mkdir()
    fill(disk, 450_000)
    with Run(tiny(train={"output": str(disk / "run")})):
        assert "and there will be 3 at times (checkpoint.keep=2 and a new one)" in caplog.text


def test_a_read_only_disk_is_found_before_step_0_and_survived_later(tiny, disk, monkeypatch, caplog):
    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how},size={SIZE}", str(disk)], check=True)

    remount("ro")
    with pytest.raises(TrainingError, match=r"cannot be written .*Read-only file system"):
        train(tiny(train={"output": str(disk / "run")}))
    remount("rw")
    recipe = tiny(
        train={"steps": 20, "eval_every": 0, "output": str(disk / "run")},
        checkpoint={"every": 4, "asynchronous": False},
    )
    real = writer.save_checkpoint

    def read_only_meanwhile(root, step, *arguments, **options):
        """An open file keeps a file system from being made read-only; so the calls that change it say that it is."""
        if step not in (8, 12):
            return real(root, step, *arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", refuse)
            return real(root, step, *arguments, **options)

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("megaresnorm.checkpoint.saver.save_checkpoint", read_only_meanwhile)
    assert train(recipe).steps == 20
    assert (
        caplog.text.count("cannot be written (Read-only file system") == 2
        and "(2 of 3 failures in a row)" in caplog.text
    )


def test_a_folder_in_the_way_is_never_written_over(tiny, monkeypatch, caplog):
    recipe = tiny(checkpoint={"every": 2})
    strange = Path(recipe.train.output) / "checkpoints" / "step-00000004"

    def appears():
        strange.mkdir()
        (strange / "mine.txt").write_text("precious")

    at_steps(monkeypatch, {1: appears})
    assert train(recipe).steps == 6
    assert (strange / "mine.txt").read_text() == "precious"
    assert "step-00000004: cannot be written (it exists already; checkpoints are never written over)" in caplog.text


def test_prune_works_on_a_full_disk(tiny, disk, capsys):
    """That is when it is wanted: no room to name the owner of the lock is no reason to refuse."""
    from megaresnorm.cli import main

    train(tiny(train={"output": str(disk / "run")}, checkpoint={"every": 2, "keep": 3}))
    fill(disk, 0)
    assert main(["checkpoint", "prune", str(disk / "run")]) == 0
    assert [step for step, _ in list_checkpoints(disk / "run" / "checkpoints")] == [4, 6]
