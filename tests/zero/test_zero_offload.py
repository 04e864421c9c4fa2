"""DeepSpeed's ZeRO with its optimizer, and its weights, on the host: the steps of the native engine."""

import importlib
import json
import os
from math import isfinite
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import batches, make_recipe
from launched import train_on_rank
from test_fp16 import Overflowing, state_digest

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.engines import make_engine
from megaresnorm.engines.engine import Engine
from megaresnorm.layout import check_layout
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

TP2_DP2 = {"tp": 2, "tensor_layout": "columns"}
OFFLOADS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
ADAGC = {"clip": "adagc", "adagc_warmup": 2}
STEPS = 10
FP32 = 1e-5  # of losses and norms; 1e-6 was measured


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """DeepSpeed, imported and compiled once for all ranks, which are forked."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = importlib.import_module("deepspeed")
    builders = importlib.import_module("deepspeed.ops.op_builder")
    from megaresnorm.engines.extensions import load_extension

    load_extension(builders.CPUAdamBuilder(), deepspeed.__version__)
    yield
    patch.undo()


def with_engines(offloads: list[tuple[int, str]], *arguments, **sections) -> list[Recipe]:
    """One recipe for the native engine, and for DeepSpeed's with each offload."""
    engines = [{"name": "deepspeed", "zero_stage": stage, "offload": offload} for stage, offload in offloads]
    return [make_recipe(*arguments, num_blocks=4, **sections, engine=engine) for engine in ({}, *engines)]


def engine_of(recipe: Recipe) -> Engine:
    context = ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu")
    return make_engine(recipe, context, torch.device("cpu"))


def steps_of(engine: Engine, recipe: Recipe, first: int, last: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each; a batch has two microbatches."""
    stats = [engine.step(batches(engine, recipe, seed=step), 1e-2) for step in range(first, last)]
    return [(one.loss, one.gradient_norm) for one in stats]


def difference(found, wanted) -> float:
    """The largest, relative; what is not finite must be so in both."""
    pairs = [(a, b) for one, other in zip(found, wanted, strict=True) for a, b in zip(one, other, strict=True)]
    assert all(isfinite(a) == isfinite(b) for a, b in pairs)
    return max(abs(a - b) / abs(b) for a, b in pairs if isfinite(b))


def train_with(rank: int, recipes: list[Recipe]) -> list:
    found = []
    for recipe in recipes:
        engine = engine_of(recipe)
        moments = engine.tensors["optimizer"].values()
        assert all(slices.local is None or not slices.local.any() for slices in moments)  # before the first step
        steps = steps_of(engine, recipe, 0, STEPS // 2)
        steps.append((engine.evaluate(batches(engine, recipe, seed=99)), 1.0))
        found.append(steps + steps_of(engine, recipe, STEPS // 2, STEPS))
        assert all(slices.local is None or slices.local.device.type == "cpu" for slices in moments)
        assert any(slices.local is not None and slices.local.any() for slices in moments)
    return found


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "topology", "variant", "optim"),
    [
        (2, {}, "keel", "gpt", {"clip": "global", "clip_norm": 0.5}),
        (2, {}, "pre", "llama", ADAGC),
        (4, TP2_DP2, "deepnorm", "gpt", ADAGC),
    ],
)
def test_losses_and_gradient_norms_are_those_of_the_native_engine(num_ranks, parallel, topology, variant, optim):
    recipes = with_engines(OFFLOADS, topology, variant, parallel, "fp32", optim=optim)
    for native, *others in run_ranks(num_ranks, train_with, recipes):
        assert [difference(found, native) < FP32 for found in others] == [True] * len(OFFLOADS)


def test_in_bf16_they_are_close():
    """A weight that differs in its last place may be rounded to another BF16 number."""
    recipes = with_engines(OFFLOADS, "keel", "llama", TP2_DP2, "bf16")
    for native, *others in run_ranks(4, train_with, recipes):
        for found in others:
            assert difference(found[:3], native[:3]) < FP32 and difference(found, native) < 5e-3


def refuse_one(rank: int, recipes: list[Recipe], poison: str) -> list:
    """Steps of which the third has a gradient with an infinity on the last rank, or a loss that is NaN on the first."""
    found = []
    for recipe in recipes:
        engine, steps = engine_of(recipe), []
        layer = next(m for m in engine.model.modules() if isinstance(m, Linear))
        poisoned = layer.kernel = Overflowing(layer.kernel)
        factor, backward = 1.0, engine.backward
        engine.backward = lambda *arguments: backward(*arguments) * factor  # noqa: B023 - of this round
        for step in range(5):
            before = state_digest(engine)
            poisoned.armed = step == 2 and poison == "gradient" and rank == dist.get_world_size() - 1
            factor = float("nan") if step == 2 and poison == "loss" and rank == 0 else 1.0
            stats = engine.step(batches(engine, recipe, seed=step), 1e-2)
            assert stats.applied == (step != 2) == (before != state_digest(engine))
            steps.append((stats.loss, 1.0 if step == 2 else stats.gradient_norm))  # inf or NaN, as elements were added
        found.append([steps, engine.state().model_dump()])
    return found


@pytest.mark.parametrize(
    ("poison", "parallel", "compute", "optim"),
    [("gradient", {}, "fp32", ADAGC), ("loss", {}, "fp32", ADAGC), ("gradient", {"tp": 2}, "fp16", {})],
)
def test_a_step_that_is_not_finite_changes_nothing_and_counts_as_with_the_native_engine(
    poison, parallel, compute, optim
):
    recipes = with_engines(OFFLOADS, "keel", "gpt", parallel, compute, optim=optim)
    for (native, state), *others in run_ranks(2, refuse_one, recipes, poison):
        for steps, counts in others:
            assert counts == state and counts["updates"] == 4
            assert difference(steps, native) < (FP32 if compute == "fp32" else 1e-3)


def save_and_load(rank: int, recipes: list[Recipe], root: str) -> list:
    """Of every recipe: the steps that follow its checkpoint, and those of all the others that go on from it."""
    found = []
    for number, recipe in enumerate(recipes):
        engine = engine_of(recipe)
        steps_of(engine, recipe, 0, 3)
        state = {"engine": engine.state().model_dump()}
        folder = save_checkpoint(Path(root) / str(number), 3, engine.tensors, state, control=engine.context.control)
        straight = steps_of(engine, recipe, 3, 6)
        others = []
        for other in recipes:
            fresh = engine_of(other)
            load(fresh, folder)
            others.append(steps_of(fresh, other, 3, 6))
        load(engine, folder)
        evaluated = engine.evaluate(batches(engine, recipe, seed=99))
        fresh = engine_of(recipe)
        load(fresh, folder)
        assert evaluated == fresh.evaluate(batches(fresh, recipe, seed=99))
        found.append([straight, others, steps_of(engine, recipe, 3, 6)])
    return found


def load(engine: Engine, folder: Path) -> None:
    checkpoint = Checkpoint(folder, engine.context.control)
    engine.load(checkpoint, EngineState.model_validate(checkpoint.state["engine"]))


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "offloads"),
    [(2, {}, [(1, "optimizer"), (3, "parameters"), (3, "none")]), (4, TP2_DP2, [(2, "optimizer"), (3, "optimizer")])],
)
def test_runs_go_on_from_a_checkpoint_with_the_same_bits_and_under_other_engines(
    num_ranks, parallel, offloads, tmp_path
):
    """Also in an engine that has made other steps since."""
    recipes = with_engines(offloads, "keel", "gpt", parallel, "fp32", optim=ADAGC)
    for each in run_ranks(num_ranks, save_and_load, recipes, str(tmp_path)):
        for number, (straight, others, rolled_back) in enumerate(each):
            assert others[number] == straight == rolled_back
            assert all(difference(found, straight) < FP32 for found in others)


def test_a_whole_run_offloads_and_prints_nothing_of_what_was_compiled(tiny, tmp_path, capfd):
    losses = {}
    for name, engine in (("native", {}), ("offloaded", {"name": "deepspeed", "zero_stage": 2, "offload": "optimizer"})):
        recipe = tiny(engine=engine, precision={"compute": "fp32"}, train={"output": str(tmp_path / name)})
        run_ranks(2, train_on_rank, 2, recipe)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [(record["loss"],) for record in map(json.loads, lines) if "loss" in record]
    assert len(losses["native"]) >= 6 and difference(losses["offloaded"], losses["native"]) < FP32
    assert "Time to load" not in (said := capfd.readouterr().out) and "ninja" not in said
    assert os.environ["DS_ACCELERATOR"] == "cpu"
