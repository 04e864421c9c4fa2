"""FP16 on several ranks: an overflow anywhere skips one step everywhere, and unscaled gradients follow FP32."""

import hashlib
from typing import Any, NamedTuple

import pytest
import torch
from cases import LAYOUTS, batches, build, errors, gradients, make_recipe
from torch import Tensor

from megaresnorm.engines.native import NativeEngine
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.linear_kernel import LinearKernel
from megaresnorm.precision.loss_scale import SMALLEST, START, LossScaleState
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

# One option for each way in which gradients come together; z-loss, dropout and tied embeddings are gpt's.
RUNS = {
    "dp2 ddp": ("llama", {"clip": "adagc", "adagc_warmup": 1}),
    "tp2 full": ("gpt", {"clip": "global", "clip_norm": 0.1}),
    "pp2 1f1b": ("gpt", {"clip": "adagc", "adagc_warmup": 1}),
    "fsdp2": ("llama", {"clip": "global", "clip_norm": 0.1}),
}
SKIPPED = 2  # of STEPS; that of which a gradient overflows
STEPS = 5


class Overflowing:
    """The products of one layer, of which the next weight's gradient has an infinite element."""

    def __init__(self, kernel: LinearKernel) -> None:
        self._kernel, self.armed = kernel, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        gradient = self._kernel.weight_grad(dy, x, dtype)
        if self.armed:
            gradient[0, 0], self.armed = torch.inf, False
        return gradient


def state_digest(engine: NativeEngine) -> str:
    """Of this rank's weights, moments and averages of clipping, bit for bit."""
    digest = hashlib.sha256()
    for members in engine.tensors.values():
        for name, slices in members.items():
            digest.update(name.encode())
            if slices.local is not None:
                digest.update(slices.local.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Found(NamedTuple):
    steps: list
    unchanged: bool
    digest: str
    state: dict


def run_with(rank: int, recipe: Recipe, overflows: bool) -> Found:
    """Steps, of which one overflows on the last rank; or the same without that step's batch, at its scale after it."""
    assembled, engine = build(recipe)
    layer = next(m for m in assembled.model.modules() if isinstance(m, Linear))
    poisoned = layer.kernel = Overflowing(layer.kernel)
    steps, unchanged = [], True
    for step in range(STEPS):
        if step == SKIPPED and not overflows:
            engine.policy.loss_scale.update(overflowed=True)
            continue
        before = state_digest(engine)
        poisoned.armed = step == SKIPPED and rank == engine.context.world.size - 1
        stats = engine.step(batches(engine, recipe, seed=step), 1e-2)
        assert not poisoned.armed
        steps.append((stats.loss, stats.gradient_norm, stats.applied, stats.loss_scale, stats.lowered_to))
        unchanged &= (before == state_digest(engine)) == (step == SKIPPED)
    return Found(steps, unchanged, state_digest(engine), engine.state().model_dump())._asdict()


@pytest.mark.parametrize("layout", RUNS)
def test_an_overflow_on_one_rank_skips_one_step_on_all_and_nothing_else(layout):
    """Weights and moments stay, the scale is halved, and the run goes on as if the step's batch had not been there."""
    variant, clipping = RUNS[layout]
    recipe = make_recipe("deepnorm", variant, LAYOUTS[layout][1], "fp16", num_blocks=2, optim=clipping)
    got, wanted = ([Found(**one) for one in run_ranks(2, run_with, recipe, flag)] for flag in (True, False))
    for mine, without in zip(got, wanted, strict=True):
        assert mine.unchanged and mine.steps == got[0].steps and mine.state == got[0].state
        loss, norm, applied, scale, lowered_to = mine.steps[SKIPPED]
        assert abs(loss) < 100.0 and not norm < torch.inf and not applied
        assert (scale, lowered_to) == (START, START / 2)
        others = mine.steps[:SKIPPED] + mine.steps[SKIPPED + 1 :]
        assert all(applied for _, _, applied, _, _ in others)
        assert [scale for *_, scale, _ in others] == [START] * SKIPPED + [START / 2] * (STEPS - SKIPPED - 1)
        assert others == without.steps and mine.digest == without.digest
        assert mine.state["updates"] == STEPS - 1 and mine.state["loss_scale"]["skipped"] == 1


def overflow_at_the_end(rank: int, recipe: Recipe) -> list:
    """Two steps that overflow at the scale of the recipe, or the smallest one."""
    assembled, engine = build(recipe)
    engine.policy.loss_scale.load(LossScaleState(value=SMALLEST))
    layer = next(m for m in assembled.model.modules() if isinstance(m, Linear))
    poisoned = layer.kernel = Overflowing(layer.kernel)
    found = []
    for step in range(2):
        poisoned.armed = rank == 1
        stats = engine.step(batches(engine, recipe, seed=step), 1e-2)
        found.append((stats.applied, stats.loss_scale, stats.lowered_to))
    return found


def test_an_overflow_at_the_smallest_or_a_static_scale_is_refused_like_any_other():
    for scale, value in (("dynamic", SMALLEST), (256.0, 256.0)):
        precision = {"compute": "fp16", "loss_scale": scale}
        recipe = make_recipe("deepnorm", "llama", {}, num_blocks=2, precision=precision)
        assert run_ranks(2, overflow_at_the_end, recipe) == [[(False, value, None)] * 2] * 2


def gradients_of(topology: str, compute: str) -> tuple[float, dict[str, Tensor]]:
    recipe = make_recipe(topology, "llama", {}, compute, num_blocks=4)
    assembled, engine = build(recipe)
    with torch.no_grad():  # gates that start at 0 would hide the branches
        for name, parameter in assembled.parameters().items():
            if name.endswith("gate"):
                parameter.fill_(0.3)
    engine.weights_changed()
    loss, _ = engine.gradients(batches(engine, recipe))
    return loss, gradients(assembled)


@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel", "rezero"])
def test_unscaled_gradients_follow_fp32(topology):
    """Accumulated over microbatches; at most 5e-3 of a tensor's largest element apart.

    FP16 has 11 bits, 5e-4, of which products over dozens of numbers behind eight sub-layers lose some. A gate's
    gradient is one sum, of which most cancels.
    """
    (exact_loss, exact), (loss, got) = (gradients_of(topology, compute) for compute in ("fp32", "fp16"))
    assert loss == pytest.approx(exact_loss, rel=5e-4)
    found = errors(got, exact)
    assert max(error for name, error in found.items() if not name.endswith("gate")) < 5e-3
    assert max(found.values()) < 2e-2
    assert all(gradient.dtype == torch.float32 for gradient in got.values())


def norm_at(topology: str, scale: float) -> float:
    precision = {"compute": "fp16", "loss_scale": scale}
    recipe = make_recipe(topology, "llama", {}, num_blocks=4, precision=precision)
    _, engine = build(recipe)
    return engine.step(batches(engine, recipe), 1e-3).gradient_norm


@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel"])
def test_the_norm_is_the_same_bit_for_bit_at_any_scale_at_which_all_fits(topology):
    """Powers of two change no rounding of FP16's normal numbers, from 6e-5 to 65504; below there are fewer bits."""
    assert norm_at(topology, 2.0**12) == norm_at(topology, 2.0**16)
    assert norm_at(topology, 2.0**-10) != norm_at(topology, 2.0**12) and norm_at(topology, 2.0**-20) == 0.0
