"""Several ranks save together: where one fails all count it, none waits for ever, and the next checkpoint is whole."""

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from megaresnorm.checkpoint.format import TensorSlices, list_checkpoints
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.saver import Saver
from megaresnorm.errors import CheckpointError, ConfigError, LostRankError, UserError
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.control import all_gather_json, all_or_raise, run_on_all_ranks
from megaresnorm.parallel.mesh import Axis, ParallelContext, Sizes
from megaresnorm.testing import run_ranks

RANKS = 3


def make_saver(rank: int, root: Path, **options) -> tuple[Saver, torch.Tensor, Axis]:
    """Ranks 0 and 1 write a half each, rank 2 nothing; the main threads meet in another group than the saving ones."""
    context = ParallelContext.create(Sizes(dp_replicate=RANKS), "cpu")
    half = torch.full((4, 3), float(rank))
    held = (((4 * rank, 4 * rank + 4), (0, 3)),) if rank < 2 else ()
    groups = {"weights": {"a": TensorSlices((8, 3), torch.float32, half if held else None, held, owned=bool(held))}}
    settings = {"retention": Retention(9), "asynchronous": True, "skip_when_busy": False, "max_failures": 3} | options

    def any_rank(flag: bool) -> bool:
        return bool(all_gather_blocks(torch.tensor([int(flag)]), context.world).max())

    return Saver(root, groups, context.control, any_rank, **settings), half, context.control


def fail_on_one(rank: int, root: Path, culprit: int, asynchronous: bool) -> list[int]:
    """Failures in a row as this rank counts them, after each of five saves; the second and third fail on one rank."""
    saver, half, control = make_saver(rank, root, asynchronous=asynchronous)
    real, counts = os.write, []

    def full(descriptor, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in range(5):
        os.write = full if step in (1, 2) and rank == culprit else real
        half.fill_(10.0 * step + rank)
        saver.save(step, {}, {})
        saver.wait()
        counts.append(saver.failures)
    os.write = real
    checkpoint = Checkpoint(root / "step-00000004", control)
    assert torch.equal(checkpoint.read("weights", "a")[::4, 0], torch.tensor([40.0, 41.0]))
    return counts


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_of_one_rank_is_one_of_all(tmp_path, culprit, asynchronous):
    assert run_ranks(RANKS, fail_on_one, tmp_path, culprit, asynchronous) == [[0, 1, 2, 0, 0]] * RANKS
    assert [step for step, _ in list_checkpoints(tmp_path)] == [0, 3, 4]
    assert not list(tmp_path.glob(".tmp-*"))


def skip_on_all(rank: int, root: Path) -> int:
    """Rank 1 has a slow disk; whether a checkpoint is left out is the same everywhere."""
    saver, _, _ = make_saver(rank, root, skip_when_busy=True)
    real = os.write

    def slow(descriptor, content):
        time.sleep(0.3)
        return real(descriptor, content)

    if rank == 1:
        os.write = slow
    for step in range(4):
        saver.save(step, {}, {})
        time.sleep(0.05)
    saver.wait()
    os.write = real
    return saver.newest[0]


def test_a_checkpoint_is_left_out_by_all_or_none(tmp_path):
    (newest,) = set(run_ranks(RANKS, skip_on_all, tmp_path))
    assert newest == 0 and [step for step, _ in list_checkpoints(tmp_path)] == [0]


def other_group(rank: int, root: Path) -> float:
    """The main threads exchange tensors all the while that the saving ones do."""
    saver, _, _ = make_saver(rank, root)
    world = Axis("world", RANKS, rank, torch.distributed.group.WORLD)
    total = 0.0
    for step in range(6):
        saver.save(step, {}, {})
        for _ in range(200):
            total += all_gather_blocks(torch.tensor([float(rank)]), world).sum().item()
    saver.wait()
    return total


def test_saving_never_comes_between_the_collectives_of_a_step(tmp_path):
    assert run_ranks(RANKS, other_group, tmp_path) == [6 * 200 * 3.0] * RANKS
    assert [step for step, _ in list_checkpoints(tmp_path)] == list(range(6))


def errors_of_one(rank: int) -> list[str]:
    control = ParallelContext.create(Sizes(dp_replicate=RANKS), "cpu").control
    assert all_gather_json({"rank": rank}, control) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert run_on_all_ranks(lambda: rank, control) == [0, 1, 2] and all_or_raise(lambda: control, control) is control

    def bad(error: Exception):
        def work() -> None:
            if rank == 1:
                raise error

        return work

    said = []
    for error in (CheckpointError("torn"), ConfigError("misspelt"), ZeroDivisionError("ours")):
        try:
            all_or_raise(bad(error), control)
        except UserError as e:
            said.append(f"{type(e).__name__} {e.exit_code} {e.agreed} {e}")
        except ZeroDivisionError as e:
            said.append(str(e))
    return said


def test_an_error_of_one_rank_is_raised_by_all_with_its_code():
    first, second, third = run_ranks(RANKS, errors_of_one)
    assert first == third
    assert first[:2] == second[:2] == ["CheckpointError 4 True torn", "ConfigError 2 True misspelt"]
    assert second[2] == "ours"
    assert first[2] == f"LostRankError {LostRankError.exit_code} True rank 1 failed: ZeroDivisionError: ours"
