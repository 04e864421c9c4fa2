"""Depth of a step that DeepSpeed makes is that of the native engine's, under every stage of ZeRO."""

import json

import pytest
from cases import batches, build
from test_zero_layouts import STAGES, TENSOR, recipe_of, zero

from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.depth.watch import DepthWatch
from megaresnorm.testing import run_ranks

pytestmark = pytest.mark.deepspeed


def watched(rank: int, recipes: list[Recipe]) -> list[list[dict]]:
    """Figures of the second step, and the losses and norms of two steps seen and unseen."""
    found = []
    for recipe in recipes:
        steps = []
        for seen in (False, True):
            assembled, engine = build(recipe)
            watch = DepthWatch(recipe.model, assembled, TensorNorms(engine, recipe.optim))
            for step in range(2):
                part = batches(engine, recipe, seed=step)
                if seen:
                    with watch.watching(1e-2):
                        stats = engine.step(part, 1e-2)
                else:
                    stats = engine.step(part, 1e-2)
                steps.append((stats.loss, stats.gradient_norm))
        assert steps[:2] == steps[2:], "watching changes no bit"
        figures = watch.figures
        found.append(json.loads(json.dumps([figures.by_sublayer, figures.by_block, figures.whole])))
    return found


def near(number: float):
    """FP32, sums in other orders, and the second update of gradients that are almost 0."""
    return pytest.approx(number, rel=2e-4, abs=2e-4)


def check(num_ranks: int, parallel: dict, native: dict, topology: str, stages: list[int] | range) -> None:
    recipes = [recipe_of(topology, parallel | native, "fp32")]
    recipes += [recipe_of(topology, parallel, "fp32", engine=zero(stage)) for stage in stages]
    for wanted, *found in run_ranks(num_ranks, watched, recipes):
        for stage, got in zip(stages, found, strict=True):
            for ours, theirs in zip(got, wanted, strict=True):
                assert ours.keys() == theirs.keys()
                for name, numbers in theirs.items():
                    for a, b in zip(
                        *(one if isinstance(one, list) else [one] for one in (ours[name], numbers)), strict=True
                    ):
                        assert (a is None) == (b is None) and (b is None or a == near(b)), (stage, name, a, b)


def test_figures_under_zero_3_are_those_of_the_native_engine():
    check(2, {}, {}, "deepnorm", [3])


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(TENSOR))
@pytest.mark.parametrize("topology", ["pre", "keel"])
def test_figures_of_all_stages_and_layouts_are_those_of_the_native_engine(topology, layout):
    ranks, parallel = TENSOR[layout]
    check(ranks, parallel, {"dp_shard": 2} if ranks > parallel.get("tp", 1) else {}, topology, list(STAGES))
