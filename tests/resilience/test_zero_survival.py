"""ZeRO's runs survive what native ones do: kill -9, SIGTERM, a full disk."""

import logging
from pathlib import Path

import pytest
from launched import INTERVAL, be_rank, losses
from test_disk import at_steps, disk, fill  # noqa: F401 - a fixture
from test_kill import kill_and_compare
from test_stop import stop_and_resume

from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.checkpoint.inspect import verify
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

STAGES = (0, 1, 2, 3)
# Tensors of fewer than 100,000 elements are not kept sharded by default: these models have no others.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def with_zero(recipe, stage: int):
    engine = {"name": "deepspeed", "zero_stage": stage} | ({"deepspeed": SHARDED} if stage == 3 else {})
    return build_recipe(recipe.model_dump(exclude_none=True, exclude_defaults=True) | {"engine": engine})


@pytest.fixture
def zero_run(long_run):
    """As ``long_run``, with a stage."""

    def of_stage(stage: int):
        def make(*arguments, **options):
            ranks, recipe = long_run(*arguments, **options)
            return ranks, with_zero(recipe, stage)

        return make

    return of_stage


@pytest.mark.parametrize(("layout", "stage"), [("dp2", 1), ("dp2", 3), ("tp2 dp2", 2)])
def test_a_killed_rank_loses_at_most_an_interval(zero_run, undisturbed, tmp_path, layout, stage):
    lost, seconds = kill_and_compare(zero_run(stage), undisturbed, tmp_path, layout, 0, during_save=stage == 1)
    assert 0 <= lost <= INTERVAL + 1 and seconds < 60


@pytest.mark.parametrize(("layout", "target", "stage"), [("dp2", "the whole job", 2), ("dp2", "one rank", 3)])
def test_a_signal_stops_all_ranks_at_one_step(zero_run, undisturbed, tmp_path, layout, target, stage):
    stop_and_resume(zero_run(stage), undisturbed, tmp_path, layout, target, step=23)


def trained(rank: int, recipe, fills: str) -> tuple[str, list[str]]:
    """The digest of a run, and what was warned of; with a folder whose disk is full from step 14 to 26."""
    be_rank(rank, 2)
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megaresnorm").addHandler(handler)
    if fills and rank == 0:
        at_steps(pytest.MonkeyPatch(), {14: lambda: fill(Path(fills), 0), 26: (Path(fills) / "filler").unlink})
    return train(recipe).weights_digest, warned


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_costs_checkpoints_and_nothing_else(tiny, disk, tmp_path, stage):  # noqa: F811
    common = {"steps": 36, "eval_every": 0, "loggers": []}
    saving = {"every": 4, "max_failures": 4, "asynchronous": False}
    full = with_zero(tiny(train=common | {"output": str(disk / "run")}, checkpoint=saving), stage)
    plain = with_zero(tiny(train=common | {"output": str(tmp_path / "plain")}), stage)
    (want, _), _ = run_ranks(2, trained, plain, "")
    (digest, warned), _ = run_ranks(2, trained, full, str(disk))
    assert digest == want and losses(disk / "run") == losses(tmp_path / "plain")
    root = disk / "run" / "checkpoints"
    failures = [line for line in warned if "training goes on, the newest is step-00000012" in line]
    assert len(failures) == 3 and all("no space: need" in line for line in failures), warned
    assert [step for step, _ in list_checkpoints(root)] == [32, 36]
    assert all(verify(path) == [] for _, path in list_checkpoints(root))
