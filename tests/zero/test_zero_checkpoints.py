"""Checkpoints of ZeRO's shards: a run goes on from them exactly, and so do other stages and the native engine."""

from pathlib import Path

import pytest
from cases import batches, build
from test_zero_layouts import FP32, STAGES, TENSOR, recipe_of, zero

from megaresnorm.checkpoint.inspect import verify
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

pytestmark = pytest.mark.deepspeed

BEFORE, AFTER = 3, 3


def steps(engine, recipe: Recipe, first: int, last: int) -> list[tuple[float, float]]:
    done = [engine.step(batches(engine, recipe, seed=step), 1e-2) for step in range(first, last)]
    return [(stats.loss, stats.gradient_norm) for stats in done]


def saved(rank: int, recipes: list[Recipe], root: str) -> list[list]:
    """Steps, a checkpoint, and the steps after it, of each recipe."""
    found = []
    for number, recipe in enumerate(recipes):
        _, engine = build(recipe)
        steps(engine, recipe, 0, BEFORE)
        state = {"engine": engine.state().model_dump()}
        save_checkpoint(Path(root) / str(number), BEFORE, engine.tensors, state, control=engine.context.control)
        found.append(steps(engine, recipe, BEFORE, BEFORE + AFTER))
    return found


def resumed(rank: int, recipes: list[Recipe], root: str) -> list[list[list]]:
    """The steps after each checkpoint, as each recipe goes on with it."""
    found = []
    for number in range(len(list(Path(root).iterdir()))):
        found.append([])
        for recipe in recipes:
            _, engine = build(recipe)
            checkpoint = Checkpoint(Path(root) / str(number) / f"step-{BEFORE:08d}", engine.context.control)
            engine.load(checkpoint, EngineState.model_validate(checkpoint.state["engine"]))
            engine.check_finite("")
            found[-1].append(steps(engine, recipe, BEFORE, BEFORE + AFTER))
    return found


def everyone(parallel: dict, stages: tuple[int, ...] = STAGES, **sections: dict) -> list[Recipe]:
    """The native engine, then every stage."""
    zeros = [recipe_of("keel", parallel, engine=zero(stage), **sections) for stage in stages]
    return [recipe_of("keel", parallel, **sections), *zeros]


def distance(one: list, other: list) -> float:
    return max(abs(a - b) / abs(b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("layout", "stages"), [("tp1", (2, 3)), *(pytest.param(name, STAGES, marks=pytest.mark.slow) for name in TENSOR)]
)
def test_any_engine_goes_on_with_the_checkpoint_of_any_other(tmp_path, layout, stages):
    """Each with its own to the bit; moments of AdaGC's averages included."""
    ranks, parallel = TENSOR[layout]
    recipes = everyone(parallel, stages, optim={"clip": "adagc", "adagc_warmup": 2})
    straight = run_ranks(ranks, saved, recipes, str(tmp_path))[0]
    for number in range(len(recipes)):
        assert verify(tmp_path / str(number) / f"step-{BEFORE:08d}") == []
    for number, going_on in enumerate(run_ranks(ranks, resumed, recipes, str(tmp_path))[0]):
        assert going_on[number] == straight[number], number
        assert max(distance(one, straight[number]) for one in going_on) <= FP32, number


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(tmp_path):
    """From 4 ranks of each stage to 2 with another tensor layout, and from there to one process."""
    recipes = [recipe_of("keel", {}, engine=zero(stage)) for stage in STAGES]
    straight = run_ranks(4, saved, recipes, str(tmp_path))[0]
    fewer = everyone({"tp": 2, "tensor_layout": "columns"})
    for want, going_on in zip(straight, run_ranks(2, resumed, fewer, str(tmp_path))[0], strict=True):
        assert max(distance(one, want) for one in going_on) <= FP32
    for want, going_on in zip(straight, run_ranks(1, resumed, everyone({}), str(tmp_path))[0], strict=True):
        assert max(distance(one, want) for one in going_on) <= FP32


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_weights_alone_are_taken_over(tmp_path, stage):
    """As train.initial_weights does it: every weight, and nothing else, is that of the checkpoint."""
    native = recipe_of("keel", {})
    run_ranks(2, saved, [native], str(tmp_path))
    (wanted, got), _ = run_ranks(2, with_weights, [native, recipe_of("keel", {}, engine=zero(stage))], str(tmp_path))
    assert distance(got, wanted) <= FP32


def with_weights(rank: int, recipes: list[Recipe], root: str) -> list[list]:
    found = []
    for recipe in recipes:
        _, engine = build(recipe)
        engine.load_weights(Checkpoint(Path(root) / "0" / f"step-{BEFORE:08d}", engine.context.control))
        found.append(steps(engine, recipe, 0, 2))
    return found
