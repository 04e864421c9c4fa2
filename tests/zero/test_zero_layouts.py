"""ZeRO 0 to 3 under every tensor layout: the losses and gradient norms of the native engine, step by step."""

from typing import NamedTuple

import pytest
from cases import batches, build, make_recipe

from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

pytestmark = pytest.mark.deepspeed

STAGES = (0, 1, 2, 3)
TENSOR: dict[str, tuple[int, dict]] = {
    "tp1": (2, {}),
    "tp2 full": (4, {"tp": 2}),
    "tp2 tokens": (4, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2 columns": (4, {"tp": 2, "tensor_layout": "columns"}),
}
MODELS = {"pre": "gpt", "deepnorm": "llama", "keel": "llama"}  # gpt: z-loss, document masks, dropout, tied embeddings
# At its defaults ZeRO-3 shards no tensor of fewer than 100,000 elements for long, which these models have none of.
SHARDED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 1}
FP32 = 2e-6  # relative: sums of FP32 numbers in another order, carried on through ten steps
CLIPPED = 1e-5  # of norms; clipping carries their rounding on: the native engine's own layouts differ by 4.6e-6
BF16 = 0.05  # at most; the bound is what the native engine's own layouts differ by


class Done(NamedTuple):
    """Loss and gradient norm of every step, and the loss of an evaluation at the end."""

    steps: list[tuple[float, float]]
    loss: float


def zero(stage: int) -> dict:
    """The recipe's section for a stage."""
    more = {"zero_optimization": SHARDED} if stage == 3 else {}
    return {"name": "deepspeed", "zero_stage": stage, "deepspeed": more}


def recipe_of(topology: str, parallel: dict, compute: str = "fp32", **sections: dict) -> Recipe:
    return make_recipe(topology, MODELS[topology], parallel, compute, num_blocks=4, **sections)


def stepped(rank: int, recipes: list[Recipe], steps: int = 10, lr: float = 1e-3) -> list[dict]:
    """Steps of different batches, whose ranks and microbatches have unequal numbers of labels."""
    found = []
    for recipe in recipes:
        _, engine = build(recipe)
        done = [engine.step(batches(engine, recipe, seed=step), lr) for step in range(steps)]
        assert all(stats.applied for stats in done)
        loss = engine.evaluate(batches(engine, recipe, seed=steps))
        found.append(Done([(stats.loss, stats.gradient_norm) for stats in done], loss)._asdict())
    return found


def run(num_ranks: int, recipes: list[Recipe], **options: float) -> list[Done]:
    """Of each recipe; all ranks say the same."""
    everyone = run_ranks(num_ranks, stepped, recipes, *options.values())
    assert all(said == everyone[0] for said in everyone)
    return [Done(**one) for one in everyone[0]]


def distance(one: Done, other: Done) -> float:
    """Largest relative difference of a loss or norm."""
    pairs = zip([*one.steps, (one.loss, 1.0)], [*other.steps, (other.loss, 1.0)], strict=True)
    return max(abs(a - b) / abs(b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True))


def compare(topology: str, layout: str, compute: str, steps: int = 10, spread: float = FP32, **sections: dict) -> None:
    """Of every stage with the native engine, which adds microbatches up as stages 0 and 1 do, or as 2 and 3."""
    ranks, parallel = TENSOR[layout]
    natives = [recipe_of(topology, parallel | more, compute, **sections) for more in ({}, {"dp_shard": 2})]
    zeros = [recipe_of(topology, parallel, compute, engine=zero(stage), **sections) for stage in STAGES]
    ddp, fsdp, *found = run(ranks, natives + zeros, steps=steps)
    if compute != "fp32":
        others = [recipe_of(topology, parallel, compute, **sections) for _, parallel in TENSOR.values()]
        spread = max(FP32, distance(ddp, fsdp), *(distance(run(4, [other])[0], ddp) for other in others))
        spread = min(spread, BF16)
    for stage, done in zip(STAGES, found, strict=True):
        native = fsdp if stage > 1 else ddp
        assert distance(done, native) <= spread, (stage, spread)
        if compute == "fp32":
            losses = [([loss for loss, _ in one.steps], one.loss) for one in (done, native)]
            assert losses[0][0] == pytest.approx(losses[1][0], rel=FP32), stage
            assert losses[0][1] == pytest.approx(losses[1][1], rel=FP32), stage
        # Nothing has been rounded otherwise before the first update.
        assert done.steps[0] == pytest.approx(native.steps[0], rel=FP32), stage


def test_every_stage_equals_the_native_engine():
    compare("keel", "tp1", "fp32", steps=4)


def test_partial_sums_of_tensor_parallel_ranks_are_added_up():
    """Of which DeepSpeed knows nothing; and the norm of each parameter, which AdaGC clips by, is that of all ranks."""
    parallel, sections = {"tp": 2, "tensor_layout": "tokens"}, {"optim": {"clip": "adagc", "adagc_warmup": 1}}
    native = recipe_of("deepnorm", parallel, **sections)
    zeros = [recipe_of("deepnorm", parallel, engine=zero(stage), **sections) for stage in (1, 3)]
    wanted, *found = run(2, [native, *zeros], steps=3)
    assert max(distance(done, wanted) for done in found) <= FP32


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", TENSOR)
@pytest.mark.parametrize("topology", MODELS)
def test_every_stage_equals_the_native_engine_in_every_layout(topology, layout, compute):
    """In BF16 within what the native engine's own layouts differ by."""
    compare(topology, layout, compute)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [{"clip": "adagc", "adagc_warmup": 2}, {"clip": "global", "clip_norm": 0.1}])
@pytest.mark.parametrize("layout", TENSOR)
def test_clipping_is_that_of_the_native_engine(layout, optim):
    compare("pre", layout, "fp32", spread=CLIPPED, optim=optim)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["norm", "attention", "ffn", "branch", "block", "every"])
@pytest.mark.parametrize("layout", ["tp1", "tp2 tokens"])
def test_recomputation_changes_nothing(layout, policy):
    """Not even a bit, in any stage."""
    recompute = {"policy": policy} | ({"every": 2} if policy == "every" else {})
    ranks, parallel = TENSOR[layout]
    for stage in STAGES:
        recipes = [recipe_of("keel", parallel, "bf16", engine=zero(stage), recompute=one) for one in ({}, recompute)]
        plain, again = run(ranks, recipes, steps=3)
        assert again == plain, stage


@pytest.mark.slow
def test_four_ranks_shard_what_does_not_divide():
    """Partitions of flat groups end anywhere, and norms have fewer elements than FSDP2's rows would need."""
    natives = [recipe_of("deepnorm", {"dp_shard": 4})]
    zeros = [recipe_of("deepnorm", {}, engine=zero(stage)) for stage in STAGES]
    native, *found = run(4, natives + zeros)
    assert max(distance(done, native) for done in found) <= FP32
