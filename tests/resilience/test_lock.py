"""One job per output folder: refused while the owner lives, taken over when it is dead, on this host or on another."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megaresnorm.errors import TrainingError
from megaresnorm.resilience import lock
from megaresnorm.resilience.lock import STALE, FolderLock


def test_the_owner_is_named_and_the_folder_free_after_release(tmp_path):
    held = FolderLock(tmp_path, "train.output=x")
    with pytest.raises(
        TrainingError, match=rf"train\.output=x is in use by pid {os.getpid()} of .* alive \d s ago; wait"
    ):
        FolderLock(tmp_path, "train.output=x")
    held.release()
    held.release()
    FolderLock(tmp_path, "x").release()


def test_of_twenty_that_start_together_one_wins(tmp_path):
    def attempt(_):
        try:
            return FolderLock(tmp_path, "x")
        except TrainingError:
            return None

    for _ in range(20):
        with ThreadPoolExecutor(20) as pool:
            winners = [one for one in pool.map(attempt, range(20)) if one is not None]
        assert len(winners) == 1
        winners[0].release()


def test_a_killed_owner_leaves_the_folder_free_at_once(tmp_path):
    script = f"""
import time
from pathlib import Path
from megaresnorm.resilience.lock import FolderLock
held = FolderLock(Path({str(tmp_path)!r}), "x")
print("held", flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(TrainingError, match=f"in use by pid {process.pid}"):
        FolderLock(tmp_path, "x")
    process.send_signal(signal.SIGKILL)
    process.wait()
    FolderLock(tmp_path, "x").release()


def on_another_host(folder, seconds_ago: float, **owner) -> None:
    """What a job elsewhere leaves behind, whose flock does not reach us."""
    path = folder / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "user": "ann", "since": "now"} | owner))
    os.utime(path, (time.time() - seconds_ago,) * 2)


def test_an_owner_on_another_host_is_told_by_its_heartbeat(tmp_path, monkeypatch):
    on_another_host(tmp_path, STALE - 20)
    for _ in range(2):  # asking does not keep it alive
        with pytest.raises(TrainingError, match=r"in use by pid 7 of ann on elsewhere since now, alive 4\d s ago"):
            FolderLock(tmp_path, "x")
    on_another_host(tmp_path, STALE + 1)
    FolderLock(tmp_path, "x").release()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-5")  # the same job, started again here
    on_another_host(tmp_path, 1, job="job-5")
    FolderLock(tmp_path, "x").release()
    on_another_host(tmp_path, 1, job="job-6")
    with pytest.raises(TrainingError, match="in use by pid 7"):
        FolderLock(tmp_path, "x")


def test_the_heart_beats_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    held = FolderLock(tmp_path, "x")
    os.utime(tmp_path / ".lock", (0, 0))
    end = time.monotonic() + 5
    while (tmp_path / ".lock").stat().st_mtime == 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    held.release()


def test_an_owner_that_was_taken_for_dead_finds_out_and_ends_its_run(tiny, tmp_path, monkeypatch):
    """Its process was asleep, say; another host has its folder now."""
    from megaresnorm.trainer import Run, train

    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    real, recipe = Run._step, tiny(train={"steps": 10**6, "eval_every": 0})

    def step(run):
        if run.steps_done == 5:
            on_another_host(run.output, 0)
        return real(run)

    monkeypatch.setattr(Run, "_step", step)
    with pytest.raises(TrainingError, match="another job has taken it over; nothing more is written"):
        train(recipe)
    assert "elsewhere" in (tmp_path / "run" / ".lock").read_text()


def test_without_flock_the_heartbeat_decides(tmp_path, monkeypatch, caplog):
    import errno

    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    held = FolderLock(tmp_path, "x")
    assert "this file system has no flock" in caplog.text
    with pytest.raises(TrainingError, match=f"in use by pid {os.getpid()}"):
        FolderLock(tmp_path, "x")
    held.release()
    FolderLock(tmp_path, "x").release()


def test_a_link_in_its_place_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(TrainingError, match="cannot be written"):
        FolderLock(tmp_path / "folder", "x")
    assert (tmp_path / "victim").read_text() == "precious"
