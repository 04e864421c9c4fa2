"""Layers that are watched: the same bits, and in every layout and policy the elements that one process counts."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
from cases import LAYOUTS, batches, build, make_recipe
from digests import engine_digest

from megaresnorm.precision.counting import CLASSES
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.numbers import Numbers
from megaresnorm.testing import run_ranks

RECIPES: dict[str, dict] = {  # of precision.fp8
    "rowwise": {"recipe": "rowwise"},
    "block": {"recipe": "block"},
    "mxfp8": {"recipe": "mxfp8"},
    "tensorwise, E4M3": {"recipe": "tensorwise", "backward": "e4m3"},
    "delayed": {"recipe": "tensorwise", "scaling": "delayed", "history": 2},
    "rowwise, all FP8": {"recipe": "rowwise", "weight_grad": "fp8"},
    "rowwise, BF16 backward": {"recipe": "rowwise", "backward": "bf16"},
}
WIDTHS = {"dim": 64, "ffn_dim": 96}


def recipe_of(
    topology: str, fp8: str, place: str = "", *, policy: str = "none", stream: str = "fp32", variant: str = "llama"
) -> Recipe:
    """Three blocks, of which the first is in BF16; for fp8 = bf16 or fp16 all are in that type."""
    precision: dict = {"compute": fp8, "residual_dtype": stream}
    if fp8 not in ("bf16", "fp16"):
        precision |= {"compute": "fp8", "fp8": RECIPES[fp8] | {"bf16_first_blocks": 1, "bf16_last_blocks": 0}}
    recompute = {"policy": policy} | ({"every": 2} if policy == "every" else {})
    return make_recipe(
        topology, variant, LAYOUTS[place][1] if place else {}, num_blocks=3, model=WIDTHS, precision=precision,
        recompute=recompute, telemetry={"every": 2},
    )  # fmt: skip


def found_in(rank: int, recipes: list[Recipe]) -> list[dict]:
    """What the second step of a run is seen to read, and whether it ends as one that nobody watches."""
    return [found(recipe) for recipe in recipes]


def found(recipe: Recipe) -> dict:
    ends = []
    for watched in (False, True):
        _, engine = build(recipe)
        numbers = Numbers(recipe, engine.assembled, engine.tensors["weights"])
        engine.step(batches(engine, recipe), 1e-3)
        with numbers._watch.watching() if watched else nullcontext() as tally:
            stats = engine.step(batches(engine, recipe, seed=4), 1e-3)
        ends.append((stats, engine_digest(engine)))
    seen = tally.over_ranks(engine.context)
    return {"seen": [dict(each) for each in seen], "elements": tally._elements, "same": ends[0] == ends[1]}


def check(alone: dict, ranks: list[dict], case: tuple[str, ...], replicas: int = 1) -> None:
    """Every element is counted once, and as many are lost, but for what rounding does.

    In FP16 a gradient that cancels is zero or a rounding, which attention makes differently of other numbers of heads.
    """
    off = 1e-2 if "fp16" in case else 2e-3
    assert alone["same"] and all(all(of) for of in alone["elements"]), case
    for rank in ranks:
        assert rank["same"], (case, "watching changes bits")
        for got, wanted, at_most in zip(rank["seen"], alone["seen"], (0.0, off, off), strict=True):
            for name in CLASSES:
                assert got[name] == pytest.approx(wanted[name], rel=0.1, abs=at_most), (case, name)
    total, wanted = torch.tensor([rank["elements"] for rank in ranks]).sum(0), torch.tensor(alone["elements"])
    wanted[:, CLASSES.index("weight")] *= replicas
    assert torch.equal(total, wanted), case


@cache
def alone(topology: str, fp8: str, stream: str = "fp32") -> dict:
    return found(recipe_of(topology, fp8, stream=stream))


IN_CI = {  # one case each: topology, format, policy of recomputation
    "tp2 tokens": ("gated", "rowwise", "branch"),
    "pp2 1f1b": ("pre", "tensorwise, E4M3", "none"),
    "fsdp2": ("pre", "tensorwise, E4M3", "block"),
}
OTHERS = ("tp2 full", "tp2 columns, merge", "tp2 columns, gather", "dp2 ddp", "fsdp2 gradients", "pp2 gpipe")
MORE = [
    ("pre", "tensorwise, E4M3", "branch"), ("gated", "rowwise", "none"), ("deepnorm", "delayed", "none"),
    ("keel", "block", "norm"), ("pre", "bf16", "branch"), ("pre", "fp16", "block"),
]  # fmt: skip
PLACES = [(place, [case]) for place, case in IN_CI.items()]
PLACES += [pytest.param(place, MORE, marks=pytest.mark.slow) for place in (*IN_CI, *OTHERS)]


@pytest.mark.parametrize(("place", "cases"), PLACES)
def test_layouts_see_what_one_process_sees_and_change_no_bit(place, cases):
    stream = "bf16" if place == "tp2 columns, gather" else "fp32"
    cases = [case for case in cases if stream == "fp32" or case[1] != "fp16"]
    recipes = [recipe_of(topology, fp8, place, policy=policy, stream=stream) for topology, fp8, policy in cases]
    everywhere = run_ranks(2, found_in, recipes)
    for i, (topology, fp8, policy) in enumerate(cases):
        replicas = 2 if place == "dp2 ddp" else 1
        ranks = [rank[i] for rank in everywhere]
        check(alone(topology, fp8, stream), ranks, (place, topology, fp8, policy), replicas)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hsdp", "pp2 fsdp2 unsharded", "tp2 pp2 fsdp2"])
def test_layouts_of_several_axes_see_what_one_process_sees(place):
    everywhere = run_ranks(LAYOUTS[place][0], found_in, [recipe_of("pre", "tensorwise, E4M3", place)])
    ranks = [rank[0] for rank in everywhere]
    check(alone("pre", "tensorwise, E4M3"), ranks, (place,), replicas=2 if place == "hsdp" else 1)


ALL = [(("pre", "deepnorm", "keel", "gated")[i % 4], fp8) for i, fp8 in enumerate([*RECIPES, "bf16", "fp16"])]
POLICIES = ("norm", "attention", "ffn", "branch", "block", "every")


@pytest.mark.parametrize(
    ("cases", "policies"),
    [([("gated", "delayed")], ("block",)), pytest.param(ALL, POLICIES, marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_a_second_run_of_a_branch_or_block_counts_nothing_again(cases, policies):
    """And watching changes no bit, as in every other test here."""
    for topology, fp8 in cases:
        for policy in policies:
            other = found(recipe_of(topology, fp8, policy=policy))
            assert other == alone(topology, fp8) and other["same"], (topology, fp8, policy)
