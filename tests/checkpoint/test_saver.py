"""Saving while training goes on: of the moment it was asked for, in order, and never in the way for long."""

import os
import threading
import time

import pytest
import torch

from megaresnorm.checkpoint.format import TensorSlices, list_checkpoints
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.saver import Saver
from megaresnorm.parallel.mesh import Axis


@pytest.fixture
def live():
    return torch.zeros(200, 300)


@pytest.fixture
def make(tmp_path, live):
    def saver(**options) -> Saver:
        settings = {
            "retention": Retention(9),
            "asynchronous": True,
            "skip_when_busy": False,
            "max_failures": 3,
        } | options
        groups = {"weights": {"a": TensorSlices.of_whole(live)}}
        return Saver(tmp_path, groups, Axis("control"), lambda flag: flag, **settings)

    return saver


@pytest.fixture
def slow_disk(monkeypatch):
    """Every write waits until it is let go; a list of what was let go."""
    gate, real = threading.Event(), os.write

    def write(descriptor, content):
        assert gate.wait(10)
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    return gate


def test_a_checkpoint_holds_what_the_tensors_were_when_it_was_asked_for(make, live, slow_disk, tmp_path):
    saver = make()
    for step in range(3):
        live.fill_(step)
        slow_disk.clear()
        saver.save(step, {}, {})
        assert saver.busy and not list_checkpoints(tmp_path)[step:]  # nothing is written yet
        live.fill_(-1.0)  # the run goes on
        slow_disk.set()
        saver.wait()
        assert not saver.busy
        assert (Checkpoint(tmp_path / f"step-0000000{step}").read("weights", "a") == step).all()


def test_without_a_thread_it_is_on_disk_when_save_returns(make, tmp_path):
    make(asynchronous=False).save(5, {}, {})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [5]


def test_a_second_one_waits_for_the_first(make, slow_disk, tmp_path):
    saver = make()
    saver.save(1, {}, {})
    threading.Timer(0.3, slow_disk.set).start()
    start = time.monotonic()
    saver.save(2, {}, {})
    assert time.monotonic() - start > 0.25 and [step for step, _ in list_checkpoints(tmp_path)] == [1]
    saver.wait()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2] and saver.newest[0] == 2


def test_or_is_left_out(make, slow_disk, tmp_path, caplog):
    saver = make(skip_when_busy=True)
    saver.save(1, {}, {})
    saver.save(2, {}, {})
    assert "step 2 is not saved: the checkpoint before is still being written" in caplog.text
    slow_disk.set()
    saver.wait()
    saver.save(3, {}, {})
    saver.wait()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3]


def test_a_mistake_in_the_thread_ends_the_run(make, monkeypatch):
    saver = make()
    monkeypatch.setattr("megaresnorm.checkpoint.writer.encode_manifest", lambda manifest: 1 / 0)
    saver.save(1, {}, {})
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_host_memory_is_taken_once(make, live):
    saver = make()
    saver.save(1, {}, {})
    saver.wait()
    (first,) = saver._targets
    saver.save(2, {}, {})
    saver.wait()
    assert saver._targets == [first] and first.data_ptr() != live.data_ptr()


def test_a_rank_that_writes_nothing_has_nothing_to_copy(tmp_path, live):
    groups = {"weights": {"a": TensorSlices(tuple(live.shape), live.dtype, live, (((0, 200), (0, 300)),), owned=False)}}
    options = {"retention": Retention(), "asynchronous": True, "skip_when_busy": False, "max_failures": 1}
    saver = Saver(tmp_path, groups, Axis("control"), lambda flag: flag, **options)
    saver.save(1, {}, {})
    saver.wait()
    assert saver.newest[0] == 1 and not list((tmp_path / "step-00000001").glob("*.safetensors"))
