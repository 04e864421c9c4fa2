"""What these tests share; launched.py above them starts jobs."""

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "parallel")]


@pytest.fixture(autouse=True)
def no_job_outlives_its_test():
    yield
    from launched import STARTED

    for run in STARTED:
        run.end()
    STARTED.clear()


@pytest.fixture
def long_run(tiny, tmp_path):
    """A function from the name of a layout to its number of ranks and a recipe that takes a few seconds."""

    from launched import INTERVAL, LAYOUTS, STEPS

    def make(layout: str, name: str = "run", **train):
        ranks, parallel = LAYOUTS[layout]
        recipe = tiny(
            model={"dim": 32, "num_blocks": 8, "num_heads": 4, "dropout": 0.1, "ffn_dim": 64, "seq_len": 32},
            train={"steps": STEPS, "global_batch": 8, "eval_every": 0, "output": str(tmp_path / name)} | train,
            checkpoint={"every": INTERVAL},
            parallel=parallel,
        )
        return ranks, recipe

    return make


@pytest.fixture(scope="session")
def undisturbed():
    """A function from a recipe to the losses and the digest of its run without disturbance, kept by layout."""
    from launched import losses, train_on_rank

    from megaresnorm.testing import run_ranks

    known: dict[str, tuple[dict, str]] = {}

    def outcome(recipe, num_ranks: int) -> tuple[dict, str]:
        key = repr((num_ranks, recipe.parallel, recipe.engine, recipe.train.steps))
        if key not in known:
            output = Path(f"{recipe.train.output}-undisturbed")
            apart = recipe.model_copy(update={"train": recipe.train.model_copy(update={"output": str(output)})})
            digest = run_ranks(num_ranks, train_on_rank, num_ranks, apart)[0]
            known[key] = losses(output), digest
        return known[key]

    return outcome
