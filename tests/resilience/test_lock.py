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
from megaresnorm.parallel.control import ALONE
from megaresnorm.resilience import lock
from megaresnorm.resilience.lock import STALE, FolderLock
from megaresnorm.resilience.output import OutputFolder


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
    on_another_host(tmp_path, 1, job="job-5")
    FolderLock(tmp_path, "x", job="job-5").release()  # the same job, started again here
    on_another_host(tmp_path, 1, job="job-6")
    with pytest.raises(TrainingError, match="in use by pid 7"):
        FolderLock(tmp_path, "x", job="job-5")


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
    from megaresnorm.trainer import Trainer, train

    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    real, recipe = Trainer.step, tiny(train={"steps": 10**6, "eval_every": 0})

    def step(trainer):
        run = trainer.run
        if run.steps_done == 5:
            on_another_host(run.output, 0)
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", step)
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


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_that_was_removed_is_lost_and_the_second_job_keeps_its_own(tmp_path, monkeypatch, replaced):
    held = FolderLock(tmp_path, "x")
    (tmp_path / ".lock").unlink()
    other = FolderLock(tmp_path, "y") if replaced else None
    assert held.lost  # at once, as before the commit of a checkpoint, and not at the next beat only
    held.release()
    if other is not None:
        assert not other.lost and json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        other.release()
        assert not other.lost


def test_the_heart_notices_that_its_file_is_gone_and_beats_no_longer(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    held = FolderLock(tmp_path, "x")
    (tmp_path / ".lock").rename(tmp_path / "aside")
    end = time.monotonic() + 5
    while not held._lost:
        assert time.monotonic() < end
        time.sleep(0.01)
    held.release()


def test_a_folder_or_lock_that_is_gone_is_not_called_another_jobs(tmp_path):
    for gone, says in ((".lock", "its .lock was removed"), ("", "the folder was removed")):
        folder = OutputFolder(tmp_path / "run", ALONE, None)
        folder.check()
        (tmp_path / "run" / gone).rename(tmp_path / f"aside{gone}")
        with pytest.raises(TrainingError, match=f"{says}; nothing more is written"):
            folder.check()
        folder.release()


def test_a_run_whose_lock_was_removed_saves_nothing_more(tiny, tmp_path, monkeypatch):
    from megaresnorm.checkpoint.format import list_checkpoints
    from megaresnorm.trainer import Trainer, train

    real, recipe = Trainer.step, tiny(checkpoint={"every": 2, "asynchronous": False})

    def step(trainer):
        run = trainer.run
        if run.steps_done == 3:
            (run.output / ".lock").unlink()
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(TrainingError, match="nothing more is written"):
        train(recipe)
    assert [step for step, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2]


@pytest.mark.parametrize("content", ["[" * 4000, '{"a":' * 800, "\udcff", "[]", "null", "\x00" * 4096])
def test_a_lock_of_anything_is_nobodys(tmp_path, content):
    (tmp_path / ".lock").write_text(content, errors="surrogateescape")
    FolderLock(tmp_path, "x").release()


def test_a_pipe_or_a_folder_in_its_place_is_refused_and_not_waited_for(tmp_path):
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        (tmp_path / name).mkdir()
        make(tmp_path / name / ".lock")
        with pytest.raises(TrainingError, match="cannot be written"):
            FolderLock(tmp_path / name, "x")


def test_a_stamp_of_the_future_is_watched_until_it_moves(tmp_path, monkeypatch):
    """The file server's clock went back an hour: an owner that lives touches its lock again, a dead one never."""
    monkeypatch.setattr(lock, "HEARTBEAT", 0.02)
    monkeypatch.setattr(lock, "STALE", 0.3)
    on_another_host(tmp_path, -3600)
    FolderLock(tmp_path, "x").release()
    on_another_host(tmp_path, -3600)
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        waiting = pool.submit(FolderLock, tmp_path, "x")
        time.sleep(0.1)
        os.utime(tmp_path / ".lock")
        with pytest.raises(TrainingError, match="in use by pid 7 of ann on elsewhere"):
            waiting.result()
    assert time.monotonic() - start < 5


def test_a_user_without_a_name_has_a_number(tmp_path, monkeypatch):
    for error in (KeyError("uid not found"), OSError("No username set"), ImportError("pwd")):

        def nobody(error=error):
            raise error

        monkeypatch.setattr(lock.getpass, "getuser", nobody)
        held = FolderLock(tmp_path, "x")
        assert json.loads((tmp_path / ".lock").read_text())["user"] == str(os.getuid())
        held.release()
