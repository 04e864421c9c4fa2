"""Under ZeRO what ranks hold alike is compared, and partitions are not: it follows from the slices that they hold."""

import random

import pytest
from cases import batches, build
from test_zero_layouts import STAGES, TENSOR, recipe_of, zero

from megaresnorm.engines.digests import ReplicaDigests
from megaresnorm.resilience.bad_numbers import spoil
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]


def checked(rank: int, recipes: list) -> list[dict]:
    results = []
    for recipe in recipes:
        _, engine = build(recipe)
        digests = ReplicaDigests(engine, engine.context)
        for step in range(5):
            engine.step(batches(engine, recipe, seed=step), 1e-3)
        clean = not digests.check()
        name = "blocks.1.ffn.norm_in.weight" if "blocks.1.ffn.norm_in.weight" in engine.tensors["weights"] else None
        if rank == engine.context.world.size - 1 and name is not None:
            spoil(engine.tensors["weights"][name].local, "flip", random.Random(1))
        counts = [digests.num_compared(axis) for axis in ("dp_replicate", "tp")]
        weights = len(engine.tensors["weights"])
        results.append({"clean": clean, "counts": counts, "weights": weights, "all": len(digests._names)})
        results[-1]["found"] = [[one.axis, list(one.members), list(one.tensors)] for one in digests.check()]
    return results


def test_copies_of_whole_weights_are_compared_and_partitions_are_not():
    recipes = [recipe_of("pre", {}, engine=zero(stage)) for stage in STAGES]
    for of_rank in run_ranks(2, checked, recipes):
        assert all(one["clean"] for one in of_rank)
        assert [one["counts"][0] for one in of_rank] == [
            of_rank[0]["all"], of_rank[1]["weights"], of_rank[2]["weights"], 0
        ]  # fmt: skip
        want = [["dp_replicate", [0, 1], ["weights blocks.1.ffn.norm_in.weight"]]]
        assert [one["found"] for one in of_rank] == [want, want, want, []]


@pytest.mark.parametrize("layout", ["tp2 full", "tp2 tokens", "tp2 columns"])
def test_what_is_whole_over_tensor_parallel_ranks_is_compared_under_every_stage(layout):
    ranks, parallel = TENSOR[layout]
    recipes = [recipe_of("deepnorm", parallel, engine=zero(stage)) for stage in STAGES]
    for of_rank in run_ranks(ranks, checked, recipes):
        assert all(one["clean"] for one in of_rank)
        assert all((one["counts"][1] > 0) == (layout != "tp2 columns") for one in of_rank)
