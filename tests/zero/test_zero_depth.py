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


def numbers(figures: list[dict]) -> dict[tuple, float | None]:
    """Every number by its place."""
    parts = ((k, name, part) for k, each in enumerate(figures) for name, part in each.items())
    return {
        (k, name, index): number
        for k, name, part in parts
        for index, number in enumerate(part if isinstance(part, list) else [part])
    }


def check(num_ranks: int, parallel: dict, native: dict, topology: str, stages: list[int] | range) -> None:
    recipes = [recipe_of(topology, parallel | native, "fp32")]
    recipes += [recipe_of(topology, parallel, "fp32", engine=zero(stage)) for stage in stages]
    for wanted, *found in run_ranks(num_ranks, watched, recipes):
        for stage, got in zip(stages, found, strict=True):
            ours, theirs = numbers(got), numbers(wanted)
            assert ours.keys() == theirs.keys() and len(ours) > 80
            for path, number in theirs.items():
                if number is None or ours[path] is None:
                    assert ours[path] is number, (stage, path)
                else:  # FP32, sums in other orders, and the second update of gradients that are almost 0
                    assert ours[path] == pytest.approx(number, rel=2e-4, abs=2e-4), (stage, path)


def test_figures_under_zero_3_are_those_of_the_native_engine():
    check(2, {}, {}, "deepnorm", [3])


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(TENSOR))
@pytest.mark.parametrize("topology", ["pre", "keel"])
def test_figures_of_all_stages_and_layouts_are_those_of_the_native_engine(topology, layout):
    ranks, parallel = TENSOR[layout]
    check(ranks, parallel, {"dp_shard": 2} if ranks > parallel.get("tp", 1) else {}, topology, list(STAGES))
