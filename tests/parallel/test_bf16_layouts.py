"""Weights in BF16 in every layout: gradients in FP32, sums over copies of the model, updates, one digest."""

from pathlib import Path

import pytest
import torch
from cases import LAYOUTS, Outcome, batches, build, gradients, make_recipe, outcome, outcomes
from digests import engine_digest
from torch import Tensor

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.parallel import replicas
from megaresnorm.parallel.replicas import Replicas
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

BF16 = {"compute": "bf16", "weights": "bf16"}
VARIANTS = [("keel", "gpt"), ("gated", "llama")]
LAYOUT_NAMES = (
    "tp2 columns, merge", "dp2 ddp", "pp2 1f1b", "tp2 full", "tp2 tokens", "pp2 gpipe", "pp2 interleaved dp2",
    "tp2 pp2 dp2",
)  # fmt: skip


def cases_of(*quick: tuple[str, int]) -> list:
    """(layout, topology, variant) of all layouts; only some, with one of the two variants, are not slow."""
    every = [(name, number) for name in LAYOUT_NAMES for number in range(2)]
    return [pytest.param(n, *VARIANTS[i], marks=[] if (n, i) in quick else pytest.mark.slow) for n, i in every]


def recipe_of(layout: str, topology: str, variant: str, weights: str = "bf16") -> Recipe:
    parallel = LAYOUTS[layout][1] if layout in LAYOUTS else {}
    return make_recipe(topology, variant, parallel, num_blocks=4, precision=BF16 | {"weights": weights})


def of_same_values(rank: int, layout: str, topology: str, variant: str) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and whole gradients with weights in BF16, and with weights of the same values in FP32."""
    replicas.BUCKET = 1 << 10  # several messages, some of one gradient alone
    found = []
    for weights in ("bf16", "fp32"):
        recipe = recipe_of(layout, topology, variant, weights)
        assembled, engine = build(recipe)
        summed = [module for module in engine.modules.values() if isinstance(module, Replicas)]
        assert bool(summed) == (weights == "bf16" and engine.context.dp.size > 1)
        assert all(len(module._buckets) > 3 for module in summed)
        with torch.no_grad():
            for p in assembled.parameters().values():
                p.copy_(p.to(torch.bfloat16))
        engine.weights_changed()
        loss, _ = engine.gradients(batches(engine, recipe))
        found.append((loss, gradients(assembled)))
    return found


@pytest.mark.parametrize(
    ("layout", "topology", "variant"), cases_of(("tp2 columns, merge", 1), ("dp2 ddp", 0), ("pp2 1f1b", 0))
)
def test_gradients_of_a_layout_are_bit_for_bit_those_of_fp32_weights_of_the_same_values(
    layout: str, topology: str, variant: str
) -> None:
    """Partial sums over tp, tied embeddings over pp, copies over dp: nothing on the way is rounded to BF16."""
    (got, wanted), *_ = run_ranks(LAYOUTS[layout][0], of_same_values, layout, topology, variant)
    assert got[0] == wanted[0]
    for name, gradient in wanted[1].items():
        assert got[1][name].dtype == torch.float32 and torch.equal(got[1][name], gradient), name


def sent_in_backward(rank: int) -> tuple[list[bool], int]:
    """For every message of two steps whether it was sent while backward ran; gradients of one step that are views."""
    replicas.BUCKET = 1 << 10
    recipe = recipe_of("dp2 ddp", *VARIANTS[1])
    assembled, engine = build(recipe)
    real, within = replicas.dist.all_reduce, []

    def all_reduce(tensor: Tensor, **options):
        if tensor.dtype == torch.float32:  # losses and counts are FP64 and integers
            within.append(torch._C._current_graph_task_id() != -1)
        return real(tensor, **options)

    replicas.dist.all_reduce = all_reduce
    for seed in range(2):
        engine.gradients(batches(engine, recipe, seed))
    return within, sum(p.grad._is_view() for p in assembled.parameters().values())


def test_gradients_of_copies_are_sent_while_backward_runs_in_the_last_microbatch_alone() -> None:
    for within, views in run_ranks(2, sent_in_backward):
        assert len(within) > 10 and len(within) % 2 == 0 and all(within) and views > 10


@pytest.mark.parametrize(("layout", "topology", "variant"), cases_of(("pp2 1f1b", 1), ("dp2 ddp", 1)))
def test_three_steps_of_a_layout_are_those_of_one_process_but_for_a_few_roundings(
    layout: str, topology: str, variant: str
) -> None:
    """Gradients of BF16 products differ by their order of sums, so that some weights are rounded to the other side.

    Weights that no gradient reaches, of tokens that never occur, are equal to the last bit: only decay moves them.
    """
    options = {"optimizer": "adamw", "steps": 3}
    one = outcome(recipe_of("one", topology, variant), **options)
    found, *others = outcomes(LAYOUTS[layout][0], [recipe_of(layout, topology, variant)], options)
    (got,) = found
    assert isinstance(got, Outcome) and all(digest == [got.digest] for digest in others), "one model on all ranks"
    for (loss, norm), (wanted_loss, wanted_norm) in zip(got.steps, one.steps, strict=True):
        assert loss == pytest.approx(wanted_loss, abs=2e-3) and norm == pytest.approx(wanted_norm, rel=5e-3)
    differing = elements = 0
    for name, weight in one.weights.items():
        assert got.weights[name].dtype == weight.dtype
        if weight.dtype == torch.bfloat16:
            differing += int((got.weights[name] != weight).sum())
            elements += weight.numel()
    # The stages of a pipeline compute what one process does; only the norm of all gradients is summed otherwise.
    assert differing <= (0.002 if layout == "pp2 1f1b" else 0.25) * elements
    if variant == "llama":  # 37 tokens and three rows of padding
        assert torch.equal(got.weights["embedding.weight"][37:], one.weights["embedding.weight"][37:])


def resumed(rank: int, layout: str, folder: Path) -> tuple[str, str, str]:
    """Digests: after four steps, of a run that was resumed after two, and of what another layout has saved."""
    recipe = recipe_of(layout, *VARIANTS[1])
    (assembled, engine), (_, again) = build(recipe), build(recipe)
    control, state = assembled.context.control, EngineState(updates=2, clipper_steps=0)
    for seed in range(2):
        engine.step(batches(engine, recipe, seed), 1e-2)
    saved = save_checkpoint(folder / layout, 2, engine.tensors, {}, control=control)
    again.load(Checkpoint(saved, control), state)
    for seed in (2, 3):
        for each in (engine, again):
            each.step(batches(each, recipe, seed), 1e-2)
    digests = [engine_digest(each) for each in (engine, again)]
    again.load(Checkpoint(folder / "one" / "step-00000002", control), state)
    return digests[0], digests[1], engine_digest(again)


@pytest.mark.parametrize("layout", ["tp2 columns, merge", pytest.param("dp2 ddp", marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_equal_and_checkpoints_go_from_layout_to_layout(layout: str, tmp_path: Path) -> None:
    recipe = recipe_of("one", *VARIANTS[1])
    _, engine = build(recipe)
    for seed in range(2):
        engine.step(batches(engine, recipe, seed), 1e-2)
    save_checkpoint(tmp_path / "one", 2, engine.tensors, {})
    wanted = engine_digest(engine)
    for run, again, loaded in run_ranks(2, resumed, layout, tmp_path):
        assert run == again and loaded == wanted
