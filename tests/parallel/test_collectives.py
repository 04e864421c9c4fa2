"""Sums and gathers between ranks, through the memory of their host and without it."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megaresnorm.parallel import collectives, shared_memory
from megaresnorm.parallel.mesh import Axis, ParallelContext, Sizes
from megaresnorm.parallel.transport import Gloo, OneHost
from megaresnorm.testing import run_ranks

SHAPES = [(1,), (3, 5), (4, 8, 6), (0, 4), ()]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]


def tp_axis() -> Axis:
    return ParallelContext.create(Sizes(tp=dist.get_world_size()), "cpu").tp


def of_rank(rank: int, shape: tuple[int, ...], dtype: torch.dtype, turn: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * turn + rank)
    return (100 * torch.randn(shape, generator=generator)).to(dtype)


def wrong_results(rank: int, capacity: int) -> list[str]:
    """Of a hundred turns of all kinds against what is computed here from every rank's numbers."""
    shared_memory.CAPACITY = capacity
    axis, wrong = tp_axis(), []
    assert isinstance(axis.transport, OneHost) == (capacity > 0)
    for turn in range(100):
        dtype, shape = DTYPES[turn % 4], SHAPES[turn % 5]
        close = {"rtol": 0.02, "atol": 2.0} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-3}
        everyone = torch.stack([of_rank(r, shape, dtype, turn) for r in range(axis.size)])
        mine = everyone[rank].clone()
        if not torch.equal(collectives.all_gather_blocks(mine, axis), everyone):
            wrong.append(f"all_gather of {dtype} {shape}")
        summed = collectives.all_reduce(mine.clone(), axis)
        if not torch.allclose(summed.double(), everyone.double().sum(0), **close):
            wrong.append(f"all_reduce of {dtype} {shape}")
        if not (collectives.all_gather_blocks(summed, axis) == summed).all():
            wrong.append(f"ranks have different sums of {dtype} {shape}")
        blocks = torch.stack([of_rank(r, shape, dtype, turn + 1000 * rank) for r in range(axis.size)])
        wanted = sum(of_rank(rank, shape, dtype, turn + 1000 * r).double() for r in range(axis.size))
        got = collectives.reduce_scatter_blocks(blocks, axis)
        if not torch.allclose(got.double(), wanted, **close):
            wrong.append(f"reduce_scatter of {dtype} {shape}")
    return wrong


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("capacity", [shared_memory.CAPACITY, 64])
def test_sums_and_gathers(num_ranks, capacity):
    """With 64 bytes a turn most tensors go through the process group."""
    assert run_ranks(num_ranks, wrong_results, capacity) == [[]] * num_ranks


def no_space(*arguments: int) -> None:
    raise OSError(28, "No space left on device")


def without_memory(rank: int, why: str) -> bool:
    if why == "no folder" and rank == 1:
        shared_memory.FOLDER = Path("/nowhere")  # a container of its own
    if why == "no space":
        os.posix_fallocate = no_space
    axis = tp_axis()
    total = collectives.all_reduce(torch.ones(3), axis)
    return isinstance(axis.transport, Gloo) and total.tolist() == [2.0] * 3


@pytest.mark.parametrize("why", ["no folder", "no space"])
def test_without_common_memory_ranks_use_the_process_group(why):
    assert run_ranks(2, without_memory, why) == [True, True]


def leftovers(rank: int, folder: Path) -> list[str]:
    shared_memory.FOLDER = folder
    axis = tp_axis()
    assert isinstance(axis.transport, OneHost)
    return [path.name for path in folder.iterdir()]


def test_nothing_is_left_in_the_folder(tmp_path):
    assert run_ranks(2, leftovers, tmp_path) == [[], []]


def slot_after_the_next_turn_has_begun(rank: int) -> list[float]:
    """Rank 0 reads late, when rank 1 has long written for the next turn."""
    memory = tp_axis().transport.memory
    seen = memory.start(torch.full((4,), 1.0 + rank))()
    if rank == 1:
        memory.start(torch.full((4,), 8.0))()
        return []
    time.sleep(0.3)
    read = seen.clone()
    memory.start(torch.full((4,), 9.0))()
    return read[:, 0].tolist()


def test_a_slot_is_not_overwritten_before_it_is_read():
    assert run_ranks(2, slot_after_the_next_turn_has_begun)[0] == [1.0, 2.0]


def two_at_a_time(rank: int) -> str:
    memory = tp_axis().transport.memory
    first = memory.start(torch.ones(3))
    try:
        memory.start(torch.ones(3))
    except AssertionError as e:
        first()
        return str(e)
    return ""


def test_a_second_handover_must_wait_for_the_first():
    assert run_ranks(2, two_at_a_time) == ["one handover at a time: start, wait and read before the next"] * 2
