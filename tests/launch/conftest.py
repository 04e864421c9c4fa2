"""What the tests of launchers share; hosts.py and submitted.py beside them make hosts and submit jobs."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def alone(byte_data, tmp_path_factory):
    """A function from a recipe to the losses and the digest of its run on two ranks of this host, by torchrun."""
    from launched import Launched, losses

    known: dict[str, tuple[dict[int, str], str]] = {}

    def outcome(recipe) -> tuple[dict[int, str], str]:
        folder = tmp_path_factory.mktemp("alone")
        train = recipe.train.model_copy(update={"output": str(folder / "run")})
        apart = recipe.model_copy(update={"train": train})
        key = repr((recipe.model, recipe.parallel, recipe.train.model_copy(update={"output": ""})))
        if key not in known:
            run = Launched(folder, apart, 2)
            assert run.finish() == 0, run.text
            known[key] = losses(Path(train.output)), run.digest
        return known[key]

    return outcome


@pytest.fixture
def long_recipe(tiny):
    """A function from settings of ``train`` to a recipe that takes some seconds on two ranks."""
    from submitted import INTERVAL, STEPS

    def make(**train):
        return tiny(
            model={"dim": 32, "num_blocks": 8, "num_heads": 4, "dropout": 0.1, "ffn_dim": 64, "seq_len": 32},
            train={"steps": STEPS, "global_batch": 8, "eval_every": 0} | train,
            checkpoint={"every": INTERVAL},
        )

    return make


@pytest.fixture(autouse=True)
def no_job_outlives_its_test():
    yield
    from launched import STARTED

    for run in STARTED:
        run.kill_all() if hasattr(run, "kill_all") else run.end()
    STARTED.clear()
