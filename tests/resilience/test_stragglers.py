"""A slow rank is named, with what it is slow at; ranks that scatter are not."""

import random
from pathlib import Path

import pytest
from launched import be_rank, train_on_rank

from megaresnorm.engines.rank_times import EVERY, IN_A_ROW, Judge, Times
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.run import Run
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import Trainer

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
    assert [[one.rank for one in look] for look in looks] == [[]] * (IN_A_ROW - 1) + [[2]] + [[]] * (5 - IN_A_ROW)


@pytest.mark.parametrize(("hosts", "slow"), [(4, [1]), (8, [2, 5]), (2, [0])], ids=["4 of 16", "8 of 32", "4 of 8"])
def test_a_slow_host_is_named_once_and_at_the_second_look(hosts, slow):
    """Not its ranks, of which each look has another as the slowest."""
    chance = random.Random(3)
    judge = Judge([0] * 4 * hosts, [f"host{rank // 4}" for rank in range(4 * hosts)])
    assert not any(judge.look(sums(chance, [0.1] * 4 * hosts, 0.02)) for _ in range(20))
    means = [0.15 if rank // 4 in slow else 0.1 for rank in range(4 * hosts)]
    looks = [judge.look(sums(chance, means, 0.02)) for _ in range(20)]
    assert [n for n, look in enumerate(looks) if look] == [1]
    assert [(one.host, one.ranks) for one in looks[1]] == [
        (f"host{host}", tuple(range(4 * host, 4 * host + 4))) for host in slow
    ]
    assert str(looks[1][0]).startswith(f"all 4 ranks on host{slow[0]} are slow: rank ")


def test_some_ranks_of_a_host_are_named_one_by_one_and_again_when_they_have_been_well():
    judge, well = Judge([0] * 8, ["a"] * 4 + ["b"] * 4), [Times(0.2, 0.0, 0.1)] * 8
    bad = [Times(0.2, 0.0, 0.15 if rank in (1, 6) else 0.1) for rank in range(8)]
    looks = [judge.look(means) for means in (bad, bad, bad, well, bad, bad)]
    assert [[(one.rank, one.ranks) for one in look] for look in looks] == [[], [(1, ()), (6, ())], [], [], [],
                                                                         [(1, ()), (6, ())]]  # fmt: skip


def test_a_run_that_becomes_slower_as_a_whole_names_nobody():
    chance, judge = random.Random(2), Judge([0, 1])
    for factor in (1.0, 1.0, 1.0, 1.0, 3.0, 3.0, 3.0):
        assert not judge.look(sums(chance, [factor, 2 * factor], 0.1))


def test_a_difference_that_hardly_costs_anything_is_no_straggler():
    judge = Judge([0, 0])
    assert not any(judge.look([Times(1.0, 0.0, 0.02), Times(1.0, 0.0, 0.01)]) for _ in range(5))


def test_milliseconds_are_no_straggler_and_a_few_take_a_look_more():
    """What else a host does takes as much from a rank, of steps of milliseconds for several looks."""
    for own, at in ((0.008, None), (0.018, IN_A_ROW), (0.15, IN_A_ROW - 1)):
        other = own / 2 if own < 0.1 else 0.1
        judge = Judge([0, 0])
        looks = [judge.look([Times(own, 0.0, own), Times(own, 0.0, other)]) for _ in range(9)]
        assert [n for n, look in enumerate(looks) if look] == ([] if at is None else [at]), own


def test_what_watches_backward_goes_with_the_training_that_it_watched(tiny, tmp_path):
    """So that another trainer of the run does not watch it twice."""
    assert run_ranks(2, wrapped_in_training, tiny(train={"steps": 3, "eval_every": 0})) == [[True, False]] * 2


def wrapped_in_training(rank: int, recipe) -> list[bool]:
    """Whether a method of the engine is another in ``train``, and after it, than before."""
    be_rank(rank, 2)
    with Run(recipe) as run, StopSignals() as stop:
        trainer, seen = Trainer(run), []
        made = trainer.step

        def step():
            seen.append(run.engine.policy.sum_up)
            return made()

        trainer.step = step
        before = run.engine.policy.sum_up
        trainer.train(stop)
        return [seen[0] != before, run.engine.policy.sum_up != before]
