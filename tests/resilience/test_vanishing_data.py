"""Data that vanishes under a job of two ranks: one line with the file, the exit code of data errors, no restarts."""

import errno
import os
import shutil
import time

import pytest
from launched import Launched, train_on_rank

from megaresnorm.errors import UserError
from megaresnorm.evaluation import Evaluation
from megaresnorm.recipe import Recipe
from megaresnorm.run import Run
from megaresnorm.testing import run_ranks


@pytest.fixture
def job(long_run, byte_data, tmp_path):
    """A recipe of long steps of two samples, on a copy of the data, so that one rank alone meets what is gone."""

    def make(layout: str) -> tuple[int, Recipe]:
        folder = tmp_path / "data"
        shutil.copytree(byte_data, folder)
        ranks, recipe = long_run(layout, steps=5000, global_batch=2, micro_batch=1)
        return ranks, recipe.model_copy(update={"data": recipe.data.model_copy(update={"path": str(folder)})})

    return make


def ended(job, layout: str, tmp_path, disturb) -> Launched:
    ranks, recipe = job(layout)
    run = Launched(tmp_path / "job", recipe, ranks)
    run.wait_for_step(20)
    disturb(tmp_path / "data" / "tokens.bin")
    start = time.monotonic()
    assert run.finish(timeout=90) == 3, run.text
    assert time.monotonic() - start < 40
    assert "Traceback" not in run.text and "SIGBUS" not in run.text
    assert "started again" not in run.text, run.text
    assert sum("tokens.bin" in line for line in run.text.splitlines()) == 1
    return run


def cut(path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 8 * 8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_a_cut_file_ends_the_job_with_one_line_and_the_exit_code_of_data_errors(job, layout, tmp_path):
    run = ended(job, layout, tmp_path, cut)
    (line,) = [line for line in run.text.splitlines() if "tokens.bin" in line]
    assert line.startswith(f"megaresnorm: error: {tmp_path / 'data' / 'tokens.bin'}: ") and "in use" in line


def meets_an_error(rank: int, recipe: Recipe, when: str) -> list:
    """What ``train`` raises where rank 1 alone cannot read after step 3, or in an evaluation."""
    real, broken = os.pread, [False]

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if broken[0] and rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, size, offset)

    steps, evaluate = Run.step_is_done, Run.evaluate

    def step_is_done(run: Run) -> None:
        steps(run)
        broken[0] |= when == "training" and run.steps_done == 3

    def breaking(run: Run) -> Evaluation | None:
        broken[0] |= when == "evaluation"
        return evaluate(run)

    os.pread, Run.step_is_done, Run.evaluate = pread, step_is_done, breaking
    try:
        train_on_rank(rank, 2, recipe)
    except UserError as error:
        return [type(error).__name__, error.exit_code, error.agreed, str(error)]
    return []


@pytest.mark.parametrize(
    ("when", "parallel"),
    [
        ("training", {"tp": 2}),
        pytest.param("training", {}, marks=pytest.mark.slow),
        pytest.param("training", {"pp": 2}, marks=pytest.mark.slow),
        ("evaluation", {}),
    ],
)
def test_what_one_rank_alone_cannot_read_ends_all_ranks_with_the_same_line(when, parallel, tiny, byte_data):
    """Rank 1 may be the one whose count of tokens nobody needs, since another has the same samples."""
    eval_every = 4 if when == "evaluation" else 0
    recipe = tiny(train={"steps": 12, "eval_every": eval_every}, checkpoint={"every": 2}, parallel=parallel)
    first, second = run_ranks(2, meets_an_error, recipe, when)
    assert first == second
    assert first[:3] == ["DataError", 3, True]
    assert first[3].startswith(f"{byte_data / 'tokens.bin'}: byte ") and "Input/output error" in first[3]


@pytest.mark.slow
def test_an_unlinked_file_is_trained_on_to_the_end(job, tmp_path):
    ranks, recipe = job("dp2")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 200})})
    run = Launched(tmp_path / "job", recipe, ranks)
    run.wait_for_step(20)
    (tmp_path / "data" / "tokens.bin").unlink()
    assert run.finish(timeout=90) == 0, run.text
