"""Offloaded tensors: what is copied, in which order, and what is left when they are gone."""

import gc
from weakref import ref

import pytest
import torch
from late_copies import LateCopies
from torch import nn

from megaresnorm.errors import ConfigError
from megaresnorm.offload import PAGE, CudaCopies, Offload, PlainCopies

SHAPE = (64, 32)  # two pages of FP32
BYTES = 4 * 64 * 32


def tensor(number):
    return torch.full(SHAPE, float(number))


class Pass:
    """The forward pass of a stage with some spans, each of which keeps a tensor of its number twice."""

    def __init__(self, offload, numbers):
        self.fetches, self.alive = [], []
        for place, number in enumerate(numbers):
            group, kept = offload.begin(first=place == 0), tensor(number)
            self.fetches.append((number, group.keep(kept), group.keep(kept.detach())))
            self.alive.append(ref(kept.untyped_storage()))

    def on_device(self):
        """The numbers whose tensors of the forward pass are in memory."""
        return [number for (number, *_), storage in zip(self.fetches, self.alive, strict=True) if storage() is not None]

    def backward(self, spans=None):
        """Ask for the tensors of the last spans, which are used and dropped; all of them for None."""
        for _ in range(len(self.fetches) if spans is None else spans):
            number, *fetches = self.fetches.pop()
            self.alive.pop()
            found = [fetch() for fetch in fetches]
            assert found[0].data_ptr() == found[1].data_ptr(), "one tensor, however often it was kept"
            assert torch.equal(found[0], tensor(number))


@pytest.fixture
def copies():
    return LateCopies()


@pytest.fixture
def offload(copies):
    return Offload(copies, least=BYTES)


def test_tensors_leave_when_the_next_span_begins_and_return_while_the_span_behind_is_used(copies, offload):
    forward = Pass(offload, range(5))
    # A span later the current stream waits for a copy, and the device's tensor is dropped.
    assert copies.log == [
        ("out", 0), ("made", 0), ("out", 1), ("made", 1), ("out", 2), ("made", 2), ("out", 3),
    ]  # fmt: skip
    assert forward.on_device() == [3, 4]
    copies.log.clear()
    forward.backward(1)
    assert copies.log == [], "the last is on the device, and so is the one before it"
    forward.backward(1)
    assert copies.log == [("back", 2), ("made", 3)], "the next is on its way before this one is waited for"
    forward.backward()
    assert copies.log[2:] == [("back", 1), ("made", 2), ("back", 0), ("made", 1), ("made", 0)]


def test_the_device_has_two_tensors_besides_those_of_the_span_that_computes(offload):
    for count in range(1, 9):
        forward = Pass(offload, range(count))
        assert forward.on_device() == list(range(count))[-2:]


def test_memory_of_the_host_is_taken_once(copies, offload):
    for round in range(3):
        Pass(offload, range(6)).backward()
        assert copies.sizes == [2 * PAGE] * 5, round
    Pass(offload, range(3)).backward()
    assert len(copies.sizes) == 5


def test_microbatches_under_way_are_chains_of_their_own(copies, offload):
    """As a stage of a pipeline has them, in the order of 1F1B."""
    first, second = Pass(offload, range(4)), Pass(offload, range(10, 14))
    first.backward(2)
    assert [entry for entry in copies.log if entry[0] == "back"] == [("back", 3), ("back", 2), ("back", 1)]
    first.backward()
    third = Pass(offload, range(20, 24))
    copies.log.clear()
    second.backward()
    back = [number for what, number in copies.log if what == "back"]
    assert back == [13, 12, 11, 10]
    third.backward()
    used = len(copies.sizes)
    assert used <= 8
    first, second = Pass(offload, range(4)), Pass(offload, range(10, 14))
    first.backward()
    second.backward()
    assert len(copies.sizes) == used


def test_weights_and_small_tensors_stay(copies, offload):
    """A keeper gives back the very object."""
    large = [nn.Parameter(torch.ones(SHAPE)), torch.ones(64 * 32), torch.ones(64, 32, dtype=torch.int64)]
    others = [torch.ones(63, 32), torch.ones(32, 64).t(), torch.ones(2, 64, 32), torch.ones(64, 64)[:, :32]]
    group = offload.begin(first=True)
    fetches = [group.keep(one) for one in large + others]
    offload.begin(first=False)
    assert not copies.sent
    assert all(fetch() is one for fetch, one in zip(fetches, large + others, strict=True))


def test_several_tensors_of_a_span_leave_and_return_together(copies, offload):
    group = offload.begin(first=True)
    fetches = [group.keep(tensor(number)) for number in range(3)]
    fetches.append(group.keep(torch.full((128, 32), 3.0, dtype=torch.bfloat16)))
    rest = [offload.begin(first=False).keep(tensor(9)) for _ in range(3)]
    assert [size for size, _ in copies.sent] == 6 * [BYTES]
    assert [fetch()[0, 0].item() for fetch in (fetches[2], *fetches)] == [2, 0, 1, 2, 3]
    assert fetches[3]().dtype == torch.bfloat16 and fetches[3]().shape == (128, 32)
    assert [entry for entry in copies.log if entry[0] == "back"] == [("back", 0)] and len(rest) == 3


@pytest.mark.parametrize("asked", range(4))
def test_a_pass_that_ends_early_leaves_nothing_without_a_garbage_collection(copies, offload, asked):
    """Copies under way are waited for before memory is used again: else the fake fails in the next pass."""
    gc.disable()
    try:
        forward = Pass(offload, range(6))
        forward.backward(asked)
        alive = list(forward.alive)
        del forward
        assert not any(storage() is not None for storage in alive)
    finally:
        gc.enable()
    Pass(offload, range(6)).backward()
    assert len(copies.sizes) == 5, "all memory of the host had been given back"


def test_a_tensor_that_backward_has_asked_for_stays(copies, offload):
    """A second backward pass of the same graph finds it."""
    forward = Pass(offload, range(3))
    fetches = [fetch for _, fetch, _ in forward.fetches]
    for _ in range(2):
        assert [fetch()[0, 0].item() for fetch in reversed(fetches)] == [2, 1, 0]
    Pass(offload, range(3)).backward()
    assert [fetch()[0, 0].item() for fetch in fetches] == [0, 1, 2]
    assert sum(what == "out" for what, _ in copies.log) == 4


def test_plain_copies_are_copies():
    offload = Offload(PlainCopies(), least=BYTES)
    forward = Pass(offload, range(6))
    assert forward.on_device() == [4, 5]
    forward.backward()


class Runtime:
    """Notes what it is asked."""

    def __init__(self, error=0):
        self.registered, self.error = {}, error

    def cudaHostRegister(self, address, size, flags):
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return runtime


def test_memory_for_a_gpu_is_pinned_in_whole_pages_until_the_copies_go(runtime):
    offload = Offload.of_device(torch.device("cuda", 0))
    memory, _ = offload.pool.take(3 * PAGE + 1)
    assert runtime.registered == {memory.data_ptr(): 4 * PAGE}
    assert memory.data_ptr() % PAGE == 0 and memory.nbytes == 4 * PAGE
    offload.pool.give_back(memory, None)
    assert offload.pool.take(4 * PAGE)[0] is memory
    del offload, memory
    assert not runtime.registered


def test_a_host_without_pinned_memory_is_one_line_that_says_what_to_do(runtime, monkeypatch):
    copies = CudaCopies(torch.device("cuda", 0))
    copies.allocate(1 << 20)
    runtime.error = 2
    with pytest.raises(ConfigError) as raised:
        copies.allocate(64 << 20)
    text = str(raised.value)
    assert text.startswith(
        "recompute.offload=true: the host does not give this rank 64 MiB of pinned memory beside 0.0"
    )
    for wanted in ("error 2", "train.micro_batch", "recompute.every", "ulimit -l", "recompute.offload=false"):
        assert wanted in text
    assert "\n" not in text

    def fail(*arguments, **options):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ConfigError, match="out of memory"):
        copies.allocate(64 << 20)


@pytest.mark.gpu
def test_values_are_the_same_while_a_gpu_uses_the_memory_again():
    """Large tensors whose memory is overwritten as soon as it is free, on both sides, over several passes."""
    device, shape = torch.device("cuda"), (4096, 2048)
    offload = Offload.of_device(device)
    numbers = torch.arange(shape[1], device=device, dtype=torch.float32)
    for round in range(3):
        fetches = []
        for number in range(12):
            group = offload.begin(first=number == 0)
            fetches.append(group.keep((numbers * (number + 12 * round)).expand(shape).contiguous()))
            for _ in range(3):
                torch.full(shape, float("nan"), device=device).cos_()
        while fetches:
            found, number = fetches.pop()(), len(fetches)
            scratch = torch.full(shape, float("nan"), device=device)
            assert torch.equal(found, (numbers * (number + 12 * round)).expand(shape)), (round, number)
            del found, scratch


@pytest.mark.gpu
def test_a_gpu_has_the_memory_of_three_tensors_at_once():
    device, shape = torch.device("cuda"), (8192, 1024)
    size, offload = 4 * shape[0] * shape[1], Offload.of_device(device)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before, fetches = torch.cuda.memory_allocated(), []
        for number in range(16):
            group = offload.begin(first=number == 0)
            fetches.append(group.keep(torch.empty(shape, device=device)))
        assert torch.cuda.memory_allocated() - before == 2 * size
        while fetches:
            fetches.pop()()
        assert torch.cuda.max_memory_allocated() - before <= 3 * size
        assert torch.cuda.memory_allocated() == before
