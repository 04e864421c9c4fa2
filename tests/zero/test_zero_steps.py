"""A step that must change nothing changes nothing under ZeRO either, and is counted as under the native engine."""

from typing import Any, NamedTuple

import pytest
import torch
from cases import batches, build
from test_fp16 import Overflowing, state_digest
from test_zero_layouts import STAGES, TENSOR, recipe_of, zero

from megaresnorm.data.loader import StepBatch
from megaresnorm.parallel.linear import Linear
from megaresnorm.precision.loss_scale import START
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

pytestmark = pytest.mark.deepspeed

SKIPPED, STEPS = 2, 5


class Found(NamedTuple):
    steps: list
    kept: list[bool]
    digest: str
    state: dict


def poisoned(rank: int, recipes: list[Recipe], kind: str) -> list[dict]:
    """Steps, of which one has a gradient or a loss that is not finite, on one rank alone."""
    found = []
    for recipe in recipes:
        assembled, engine = build(recipe)
        layer = next(module for module in assembled.model.modules() if isinstance(module, Linear))
        overflowing = layer.kernel = Overflowing(layer.kernel)
        real = engine.passes.train
        steps, kept = [], []
        for step in range(STEPS):
            bad = step == SKIPPED and rank == engine.context.world.size - 1
            overflowing.armed = bad and kind == "gradient"
            if kind == "loss":
                engine.passes.train = infinite(real) if bad else real
            before = state_digest(engine)
            stats = engine.step(batches(engine, recipe, seed=step), 1e-2)
            steps.append((stats.loss, stats.gradient_norm, stats.applied, stats.loss_scale, stats.lowered_to))
            kept.append(before == state_digest(engine))
        found.append(Found(steps, kept, state_digest(engine), engine.state().model_dump())._asdict())
    return found


def infinite(train: Any) -> Any:
    """A loss that is infinite while its gradients are not."""

    def run(*arguments):
        nll, objective = train(*arguments)
        return nll * torch.inf, objective

    return run


def run(num_ranks: int, recipes: list[Recipe], kind: str) -> list[Found]:
    return [Found(**one) for one in run_ranks(num_ranks, poisoned, recipes, kind)[0]]


@pytest.mark.slow
@pytest.mark.parametrize("clip", [{"clip": "global"}, {"clip": "adagc", "adagc_warmup": 1}], ids=["global", "adagc"])
@pytest.mark.parametrize("layout", ["tp1", "tp2 tokens"])
@pytest.mark.parametrize("compute", ["fp16", "fp32", "bf16"])
def test_an_overflow_skips_the_same_step_with_the_same_counts(layout, compute, clip):
    """Weights, moments and averages stay, to the bit; FP16 halves its scale; the steps after it go on alike."""
    ranks, parallel = TENSOR[layout]
    native = recipe_of("deepnorm", parallel | {"dp_shard": 2}, compute, optim=clip)
    zeros = [recipe_of("deepnorm", parallel, compute, optim=clip, engine=zero(stage)) for stage in STAGES]
    want, *found = run(ranks, [native, *zeros], "gradient")
    assert want.kept == [step == SKIPPED for step in range(STEPS)]
    if compute == "fp16":
        assert want.steps[SKIPPED][2:] == (False, START, START / 2)
    for stage, got in zip(STAGES, found, strict=True):
        assert got.kept == want.kept, stage
        assert [step[2:] for step in got.steps] == [step[2:] for step in want.steps], stage
        assert got.state == want.state, stage
        for mine, theirs in zip(got.steps, want.steps, strict=True):
            assert mine[0] == pytest.approx(theirs[0], rel=1e-4), stage
            assert (mine[1] == pytest.approx(theirs[1], rel=1e-3)) or not theirs[2], stage


@pytest.mark.parametrize("kind", ["loss", pytest.param("gradient", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_is_refused_whatever_its_gradients(kind):
    """Where DeepSpeed, which sees gradients alone, would make the update."""
    found = run(2, [recipe_of("deepnorm", {}, engine=zero(stage)) for stage in STAGES], kind)
    for stage, got in zip(STAGES, found, strict=True):
        assert got.kept == [step == SKIPPED for step in range(STEPS)], stage
        assert got.state["updates"] == STEPS - 1


def without_labels(rank: int, recipes: list[Recipe]) -> list[tuple[bool, list, list]]:
    """A step without any label between two others, and a whole step of one rank without any."""
    found = []
    for recipe in recipes:
        _, engine = build(recipe)
        first = engine.step(batches(engine, recipe, seed=0), 1e-2)
        before = state_digest(engine)
        none = engine.step(unlabelled(batches(engine, recipe, seed=1)), 1e-2)
        same = before == state_digest(engine)
        batch = batches(engine, recipe, seed=2)
        last = engine.step(unlabelled(batch) if rank == 0 else batch, 1e-2)
        numbers = [first.loss, first.gradient_norm, last.loss, last.gradient_norm]
        found.append((same, [none.loss, none.tokens, none.applied], numbers))
    return found


def unlabelled(batch: StepBatch) -> StepBatch:
    parts = [part._replace(labels=torch.full_like(part.labels, -1)) for part in batch.microbatches]
    return StepBatch.of(parts)


@pytest.mark.slow
def test_steps_and_ranks_without_labels():
    recipes = [recipe_of("pre", {}), *(recipe_of("pre", {}, engine=zero(stage)) for stage in STAGES)]
    want, *found = run_ranks(2, without_labels, recipes)[0]
    assert want[1] == [None, 0, False]
    for stage, (same, none, numbers) in zip(STAGES, found, strict=True):
        assert same and none == want[1], stage
        assert numbers == pytest.approx(want[2], rel=2e-6), stage
