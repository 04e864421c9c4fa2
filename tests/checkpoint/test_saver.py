"""Saving while training goes on: of the moment it was asked for, in order, and never in the way for long."""

import os
import threading
import time

import pytest
import torch

from megaresnorm.checkpoint import host_memory
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
    (first,) = saver._memory.tensors
    saver.save(2, {}, {})
    saver.wait()
    assert saver._memory.tensors == [first] and first.data_ptr() != live.data_ptr()


def test_a_rank_that_writes_nothing_has_nothing_to_copy(tmp_path, live):
    groups = {"weights": {"a": TensorSlices(tuple(live.shape), live.dtype, live, (((0, 200), (0, 300)),), owned=False)}}
    options = {"retention": Retention(), "asynchronous": True, "skip_when_busy": False, "max_failures": 1}
    saver = Saver(tmp_path, groups, Axis("control"), lambda flag: flag, **options)
    saver.save(1, {}, {})
    saver.wait()
    assert saver.newest[0] == 1 and not list((tmp_path / "step-00000001").glob("*.safetensors"))


def test_host_copies_have_the_shapes_and_types_of_what_they_are_copies_of(monkeypatch):
    """Many in one piece of memory, each aligned; what is larger than a piece has one of its own."""
    monkeypatch.setattr(host_memory, "ARENA", 4096)
    kinds = [
        ((3, 5), torch.float32),
        ((7,), torch.bfloat16),
        ((), torch.float64),
        ((2000,), torch.float32),
        ((0, 4), torch.float32),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape, dtype in kinds * 3]
    copies = host_memory.HostCopies(tensors).tensors
    torch._foreach_copy_(copies, tensors)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)
        assert copy.is_contiguous() and (copy.storage_offset() * copy.element_size()) % host_memory.ALIGNMENT == 0
    pieces = {copy.untyped_storage().data_ptr(): copy.untyped_storage().nbytes() for copy in copies}
    assert len(pieces) == 6 and all(size <= 4096 or size == 8192 for size in pieces.values())


def test_memory_for_a_gpu_is_pinned_in_large_pieces_and_released_with_the_copies(monkeypatch):
    """With a runtime that only notes what it is asked."""
    registered = {}

    class Runtime:
        cudaHostRegister = staticmethod(lambda address, size, flags: registered.update({address: size}) or 0)
        cudaHostUnregister = staticmethod(registered.pop)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    monkeypatch.setattr(host_memory, "_on_gpu", lambda tensor: True)
    copies = host_memory.HostCopies([torch.zeros(1000), torch.zeros(24)])
    assert list(registered) == [copies.tensors[0].data_ptr()] and list(registered.values()) == [4096 + 256]
    del copies
    assert not registered


@pytest.mark.gpu
def test_copies_of_a_gpus_tensors_are_pinned():
    tensors = [torch.randn(1000, device="cuda"), torch.randn(24, device="cuda")]
    memory = host_memory.HostCopies(tensors)
    copies = memory.tensors
    assert all(copy.is_pinned() for copy in copies)
    torch._foreach_copy_(copies, tensors, non_blocking=True)
    torch.cuda.synchronize()
    assert all(torch.equal(copy, tensor.cpu()) for copy, tensor in zip(copies, tensors, strict=True))
