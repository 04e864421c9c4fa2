"""What ranks hold alike is compared: layouts are clean, and a flipped bit is found, named and repaired."""

import random
from pathlib import Path

import pytest
import torch
from cases import SAMPLES, batches, build, make_recipe

from megaresnorm.engines.digests import ReplicaDigests, Sentry, groups
from megaresnorm.errors import CorruptionError
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.recipe import DrillRecipe, FaultRecipe
from megaresnorm.resilience.bad_numbers import spoil
from megaresnorm.resilience.faults import Drill, Subject
from megaresnorm.testing import run_ranks

TRAIN = {"output": "none", "steps": 1000, "global_batch": SAMPLES, "micro_batch": 2}
ADAGC = {"optim": {"clip": "adagc"}}
BF16_WEIGHTS = {"precision": {"compute": "bf16", "residual_dtype": "bf16", "weights": "bf16"}}
LAYOUTS: dict[str, tuple[int, dict]] = {
    "dp2": (2, {}),
    "dp3": (3, {}),
    "tp2 full": (2, {"tp": 2}),
    "tp2 tokens": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2 columns": (2, {"tp": 2, "tensor_layout": "columns"}),
    "pp2": (2, {"pp": 2}),
    "tp2 dp2": (4, {"tp": 2, "tensor_layout": "tokens"}),
    "hsdp": (4, {"dp_shard": 2, "dp_replicate": 2}),
}


def of(topology: str, layout: str, variant: str = "llama", compute: str = "fp32", **sections: dict):
    ranks, parallel = LAYOUTS[layout]
    train = TRAIN | ({"global_batch": 9, "micro_batch": 1} if ranks == 3 else {})
    return make_recipe(topology, variant, parallel, compute, num_blocks=2, **({"train": train} | sections))


def steps(engine, recipe, number: int, first: int = 0) -> None:
    for step in range(first, first + number):
        engine.step(batches(engine, recipe, seed=step), 1e-3)


def flip(engine, group: str, name: str, seed: int) -> None:
    spoil(engine.tensors[group][name].local, "flip", random.Random(seed))


def clean(rank: int, recipes: list) -> list[dict]:
    results = []
    for recipe in recipes:
        _, engine = build(recipe)
        digests = ReplicaDigests(engine, engine.context)
        at_start = len(digests.check())
        steps(engine, recipe, 10)
        counts = {axis: digests.num_compared(axis) for axis in ("dp_replicate", "dp_shard", "tp", "embedding")}
        results.append({"odd": at_start + len(digests.check()), "all": len(digests._names), **counts})
    return results


def assert_clean(ranks: int, recipes: list) -> list[list[dict]]:
    found = run_ranks(ranks, clean, recipes)
    for of_rank in found:
        assert [one["odd"] for one in of_rank] == [0] * len(recipes)
    return found


def test_data_parallel_copies_are_alike_after_ten_steps_whatever_the_topology_and_clipping():
    recipes = [of("deepnorm", "dp2"), of("pre", "dp2", "gpt", **ADAGC), of("pre", "dp2", **BF16_WEIGHTS)]
    for of_rank in assert_clean(2, recipes):
        assert all(one["dp_replicate"] == one["all"] > 30 and not one["tp"] for one in of_rank)


def assert_compared_over_tp(recipes: list) -> None:
    for of_rank in assert_clean(2, recipes):
        for recipe, one in zip(recipes, of_rank, strict=True):
            if recipe.parallel.tensor_layout == "columns":  # shards norms as well: AdaGC's averages are left
                assert one["tp"] == (one["all"] // 4 if recipe.optim.clip == "adagc" else 0)
            else:
                assert one["all"] // 4 < one["tp"] < one["all"]


def test_what_is_whole_over_tensor_parallel_ranks_is_alike_and_compared_in_every_layout():
    assert_compared_over_tp(
        [of("deepnorm", "tp2 full", "gpt"), of("pre", "tp2 tokens", "gpt"), of("deepnorm", "tp2 columns", **ADAGC)]
    )


@pytest.mark.slow
def test_what_is_whole_over_tensor_parallel_ranks_is_alike_in_more_layouts():
    gather = {"tp": 2, "tensor_layout": "columns", "columns_norm": "gather"}
    layouts = ("tp2 full", "tp2 tokens", "tp2 columns")
    recipes = [of(topology, layout, "gpt", **ADAGC) for layout in layouts for topology in ("deepnorm", "pre")]
    recipes += [of("pre", "tp2 tokens", "llama", **BF16_WEIGHTS)]
    assert_compared_over_tp([*recipes, make_recipe("deepnorm", "gpt", gather, "bf16 stream", 2, train=TRAIN)])


def test_a_tied_embedding_is_alike_on_the_first_and_last_stage_with_its_moments():
    for of_rank in assert_clean(2, [of("deepnorm", "pp2", "gpt", **ADAGC), of("pre", "pp2")]):
        assert [one["embedding"] for one in of_rank] == [4, 0]


def found_by_dp3(rank: int, recipe) -> list[dict]:
    _, engine = build(recipe)
    digests, chance, results = ReplicaDigests(engine, engine.context), random.Random(5), []
    for case in range(9):
        steps(engine, recipe, 1, case)
        group = ("weights", "optimizer", "clipper")[case % 3]
        name, odd = chance.choice(sorted(engine.tensors[group])), chance.randrange(3)
        if rank == odd:
            flip(engine, group, name, case)
        found = digests.check()
        restored, after = digests.restore(found), digests.check()
        one = {"want": [[odd], [f"{group} {name}"]], "got": [[list(o.odd), list(o.tensors)] for o in found]}
        results.append(one | {"line": found[0].line, "restored": restored, "after": len(after)})
    return results


def test_a_flipped_bit_of_one_of_three_copies_names_rank_and_tensor_and_is_restored():
    everyone = run_ranks(3, found_by_dp3, of("deepnorm", "dp3", **ADAGC))
    assert everyone[0] == everyone[1] == everyone[2]
    for one in everyone[0]:
        assert one["got"] == [one["want"]]
        assert one["restored"] and not one["after"]
        assert f"rank {one['want'][0][0]} on " in one["line"] and one["line"].endswith("is the odd one of 3")


def found_without_majority(rank: int, recipe) -> dict:
    _, engine = build(recipe)
    digests, sentry = ReplicaDigests(engine, engine.context), Sentry(engine, engine.context, 5)
    steps(engine, recipe, 2)
    if rank == 1:
        for name in ("blocks.0.attention.norm_in.weight", "blocks.1.ffn.norm_in.weight"):
            flip(engine, "optimizer", f"exp_avg.{name}", 4)
    found = digests.check()
    try:
        sentry.check(10)
        line = ""
    except CorruptionError as error:
        line = str(error)
    due = [step for step in range(1, 12) if sentry.due(step)]
    return {
        "odd": [[list(o.members), list(o.odd), o.axis, len(o.tensors)] for o in found], "line": line, "due": due,
        "restored": digests.restore(found), "after": len(digests.check()),
    }  # fmt: skip


@pytest.mark.parametrize(("layout", "axis"), [("dp2", "dp_replicate"), ("tp2 tokens", "tp")])
def test_two_copies_that_differ_are_both_named_and_neither_is_overwritten(layout, axis):
    first, second = run_ranks(2, found_without_majority, of("pre", layout))
    assert first == second
    assert first["odd"] == [[[0, 1], [], axis, 2]]
    assert not first["restored"] and first["after"] == 1 and first["due"] == [5, 10]
    start = (
        f"step 10: optimizer exp_avg.blocks.0.attention.norm_in.weight and 1 more differ between ranks 0 and 1 ({axis})"
    )
    assert first["line"].startswith(start) and "\n" not in first["line"]


def test_groups_of_ranks_are_those_of_the_mesh():
    def on_rank(rank: int) -> dict:
        context = ParallelContext.create(Sizes(pp=2, dp_replicate=2, tp=2), "cpu")
        got = {name: groups(context, name) for name in ("dp_replicate", "dp_shard", "tp", "embedding")}
        mine = torch.tensor([rank])
        seen = {}
        for name in ("dp_replicate", "tp", "embedding"):
            axis = getattr(context, name)
            everyone = [torch.empty_like(mine) for _ in range(axis.size)]
            torch.distributed.all_gather(everyone, mine, group=axis.group)
            seen[name] = [int(one) for one in everyone]
        return {"got": got, "seen": seen}

    everyone = run_ranks(8, on_rank)
    assert everyone[0]["got"]["dp_shard"] == []
    for rank, one in enumerate(everyone):
        for name, members in one["seen"].items():
            assert [group for group in one["got"][name] if rank in group] == [members]


def really_different(engine) -> list[str]:
    """What differs between the ranks of a job of copies, byte by byte and without digests."""
    found = []
    for group, members in engine.tensors.items():
        for name, slices in members.items():
            mine = slices.local.clone().reshape(-1).view(torch.uint8)
            everyone = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather(everyone, mine)
            found += [] if all(torch.equal(one, mine) for one in everyone) else [f"{group} {name}"]
    return found


def drilled(rank: int, recipe, cases: list[tuple[str, int]], output: str) -> list[dict]:
    """One fault every third step; checked after each step, and all copied from a sound rank where one is found."""
    _, engine = build(recipe)
    faults = [
        FaultRecipe(kind="flip", place=place, rank=odd, step=3 * case + 2) for case, (place, odd) in enumerate(cases)
    ]
    subject = Subject(engine.context, engine, None, None, recipe.model.vocab_size)
    drill = Drill(DrillRecipe(faults=faults), Path(output), subject)
    digests, results = ReplicaDigests(engine, engine.context), []
    for step in range(1, 3 * len(cases) + 1):
        with drill.seen_in(step):
            steps(engine, recipe, 1, step)
        found, truth = digests.check(), really_different(engine)
        _, odd = cases[(step - 1) // 3]
        named = [list(one.odd) for one in found] == ([[odd]] if engine.context.world.size > 2 else [[]])
        right = named and list(found[0].tensors) == truth if truth else not found
        results.append({"step": step, "differ": len(truth), "right": right})
        if found:
            for members in engine.tensors.values():
                for slices in members.values():
                    torch.distributed.broadcast(slices.local, 1 if odd == 0 else 0)
            assert not digests.check()
    return results


def assert_found(ranks: int, recipe, cases: list[tuple[str, int]], output: Path, least: int) -> None:
    """A flip of a gradient's lowest bits may be rounded away in the update: then there is nothing to find."""
    everyone = run_ranks(ranks, drilled, recipe, cases, str(output))
    assert all(of_rank == everyone[0] for of_rank in everyone)
    assert [one for one in everyone[0] if not one["right"]] == []
    assert sum(one["differ"] > 0 for one in everyone[0]) >= least
    assert all(one["step"] % 3 == 2 for one in everyone[0] if one["differ"])


def test_bits_flipped_in_training_by_a_drill_are_found_after_their_step(tmp_path):
    cases = [("weight", 2), ("moment", 0), ("reduced_gradient", 1), ("weight", 1)]
    assert_found(3, of("deepnorm", "dp3"), cases, tmp_path, least=4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "dp3"])
def test_thirty_bits_flipped_in_training_are_found_at_the_next_check(layout, tmp_path):
    ranks, chance = LAYOUTS[layout][0], random.Random(layout)
    cases = [(place, chance.randrange(ranks)) for place in ["weight", "moment", "reduced_gradient"] * 11]
    assert_found(ranks, of("deepnorm" if ranks == 2 else "pre", layout), cases, tmp_path, least=30)


def many_checks(rank: int, recipe, number: int) -> int:
    _, engine = build(recipe)
    digests, odd = ReplicaDigests(engine, engine.context), 0
    for step in range(number):
        steps(engine, recipe, 1, step % 50)
        odd += len(digests.check())
    return odd


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2 tokens", "tp2 dp2", "hsdp"])
def test_a_thousand_checks_of_sound_ranks_raise_no_alarm(layout):
    recipe = of("deepnorm", layout, "gpt", **ADAGC)
    assert run_ranks(LAYOUTS[layout][0], many_checks, recipe, 250) == [0] * LAYOUTS[layout][0]
