"""A slow rank is named, with what it is slow at; ranks that scatter are not."""

import random
from pathlib import Path

import pytest
from launched import train_on_rank

from megaresnorm.engines.rank_times import EVERY, IN_A_ROW, Judge, Times
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.testing import run_ranks

LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "fsdp2": (2, {"dp_shard": 2}),
    "tp2 dp2": (4, {"tp": 2}),
}


def named(tiny, monkeypatch, tmp_path, layout: str, place: str | None, rank: int) -> list[dict]:
    """Of a run whose steps 41 to 60 take twice as long on a rank, or ``place`` in them."""
    monkeypatch.setenv("MEGARESNORM_DRILL", "1")
    ranks, parallel = LAYOUTS[layout]
    fault = {"kind": "slow", "step": 41, "times": 20, "rank": rank, "seconds": 0.08}
    recipe = tiny(
        train={"steps": 70, "eval_every": 0, "output": str(tmp_path / layout), "global_batch": 8},
        parallel=parallel,
        drill={"faults": [fault | ({} if place is None else {"place": place})]},
    )
    run_ranks(ranks, train_on_rank, ranks, recipe)
    return [one for one in read_incidents(Path(recipe.train.output)) if one["kind"] == "straggler"]


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("dp2", None),  # which is forward
        *(pytest.param(name, "forward", marks=pytest.mark.slow) for name in ("tp2", "pp2", "tp2 dp2")),
        *(pytest.param(name, "loader", marks=pytest.mark.slow) for name in ("dp2", "pp2", "fsdp2")),
    ],
)
def test_a_slow_rank_is_named_within_twenty_steps(tiny, monkeypatch, tmp_path, layout, place):
    found = named(tiny, monkeypatch, tmp_path, layout, place, rank=1)
    assert [one["rank"] for one in found][:1] == [1] and 40 < found[0]["step"] <= 60
    assert ("read its samples" in found[0]["what"]) == (place == "loader")


def sums(chance: random.Random, means: list[float], noise: float) -> list[Times]:
    """Means of ten steps that scatter."""
    found = []
    for mean in means:
        steps = [mean * (1 + chance.uniform(-noise, noise)) for _ in range(EVERY)]
        found.append(Times(2 * max(means), 0.0, sum(steps) / EVERY))
    return found


@pytest.mark.parametrize("stages", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 2, 3]])
def test_noise_names_nobody_and_half_as_long_again_is_found(stages):
    """A thousand sums that scatter by a fifth; stages may differ by any factor."""
    chance, judge = random.Random(1), Judge(stages)
    usual = [1.0 + 0.7 * stage for stage in stages]
    assert not [found for _ in range(1000) if (found := judge.look(sums(chance, usual, 0.2)))]
    slow = [*usual[:2], 1.5 * usual[2], usual[3]]
    looks = [judge.look(sums(chance, slow, 0.2)) for _ in range(5)]
    assert looks.index(next(filter(None, looks))) == IN_A_ROW - 1 and next(filter(None, looks)).rank == 2
    assert sum(look is not None for look in looks) == 1, "it is said once"


def test_a_run_that_becomes_slower_as_a_whole_names_nobody():
    chance, judge = random.Random(2), Judge([0, 1])
    for factor in (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0):
        assert judge.look(sums(chance, [factor, 2 * factor], 0.1)) is None


def test_a_difference_that_hardly_costs_anything_is_no_straggler():
    judge = Judge([0, 0])
    assert all(judge.look([Times(1.0, 0.0, 0.02), Times(1.0, 0.0, 0.01)]) is None for _ in range(5))
