"""A step made twice names the rank that computes two different gradients, before anything is updated."""

from pathlib import Path

import pytest
from cases import batches, build, make_recipe
from digests import engine_digest
from test_digests import ADAGC, BF16_WEIGHTS, LAYOUTS, TRAIN

from megaresnorm.engines.digests import ReplicaDigests
from megaresnorm.engines.replay import Replay
from megaresnorm.errors import ConfigError, CorruptionError
from megaresnorm.recipe import DrillRecipe, FaultRecipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.resilience.faults import Drill, Subject
from megaresnorm.testing import run_ranks

STEPS = 5


def of(layout: str, every: int, compute: str = "fp32", variant: str = "gpt", **sections: dict):
    ranks, parallel = (1, {}) if layout == "alone" else LAYOUTS[layout]
    train = TRAIN | ({"global_batch": 9, "micro_batch": 1} if ranks == 3 else {})
    sections |= {"train": train, "guard": {"replay_every": every}}
    return ranks, make_recipe("deepnorm", variant, parallel, compute, 2, **sections)


def trained(rank: int, recipe, faults: list[dict], output: str) -> dict:
    """Steps, of which those with faults are made again."""
    _, engine = build(recipe)
    subject = Subject(engine.context, engine, None, None, recipe.model.vocab_size)
    drill = Drill(DrillRecipe(faults=[FaultRecipe(**f) for f in faults]) if faults else None, Path(output), subject)
    replay, digests, lines, alike = Replay(recipe, engine), ReplicaDigests(engine, engine.context), [], True
    for step in range(1, STEPS + 1):
        batch = batches(engine, recipe, seed=step)
        with drill.seen_in(step):
            before = engine_digest(engine)
            try:
                with replay.seen_in(step):
                    engine.step(batch, 1e-2)
            except CorruptionError as error:
                assert engine_digest(engine) == before
                lines.append(str(error))
                engine.step(batch, 1e-2)
        alike &= not digests.check()
    return {"digest": engine_digest(engine), "lines": lines, "alike": alike}


def run(layout: str, every: int, output: Path, faults: list[dict] = [], **options) -> dict:  # noqa: B006
    ranks, recipe = of(layout, every, **options)
    first, *others = run_ranks(ranks, trained, recipe, faults, str(output))
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("layout", ["alone", "dp3", "tp2 tokens"])
def test_a_gradient_that_differs_names_its_rank_and_the_step_made_again_is_right(layout, tmp_path):
    odd = {"alone": 0, "dp3": 2, "tp2 tokens": 1}[layout]
    faults = [{"kind": "flip", "place": "gradient", "rank": odd, "step": step} for step in (2, 4)]
    plain, found = run(layout, 0, tmp_path), run(layout, 2, tmp_path, faults)
    assert not plain["lines"] and found["digest"] == plain["digest"]
    assert len(found["lines"]) == 2
    for step, line in zip((2, 4), found["lines"], strict=True):
        assert line.startswith(f"step {step}: rank {odd} on ") and "computed two different gradients" in line
        assert line.endswith("nothing was updated") and "\n" not in line


def test_a_gradient_that_was_wrong_before_its_reduction_leaves_replicas_alike(tmp_path):
    faults = [{"kind": "flip", "place": "gradient", "rank": 1, "step": 2}]
    plain, found = run("dp2", 0, tmp_path), run("dp2", 0, tmp_path, faults)
    assert found["alike"] and found["digest"] != plain["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["alone", "dp2", "dp3", "tp2 full", "tp2 tokens", "tp2 columns", "tp2 dp2"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "weights", "recomputed", "fp16"])
def test_sound_steps_that_are_made_twice_are_those_made_once(layout, kind, tmp_path):
    options: dict = {
        "fp32": ADAGC, "bf16": {"compute": "bf16"}, "weights": BF16_WEIGHTS,
        "recomputed": {"recompute": {"policy": "block"}}, "fp16": {"compute": "fp16"},
    }[kind]  # fmt: skip
    variant = "llama" if kind == "fp16" else "gpt"
    once, twice = (run(layout, every, tmp_path, variant=variant, **options) for every in (0, 1))
    assert once == twice and not once["lines"] and once["alike"]


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"parallel": {"pp": 2}}, "parallel.pp=2"),
        ({"parallel": {"dp_shard": 2}}, "parallel.dp_shard=2"),
        ({"engine": {"name": "deepspeed"}}, "engine.name=deepspeed"),
        ({"train": {"output": "none", "steps": 4, "global_batch": 4, "compile": "blocks"}}, "train.compile=blocks"),
        ({"precision": {"compute": "fp8"}}, "precision.compute=fp8"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_the_recipe(sections, what):
    values = {
        "model": {"dim": 32, "num_blocks": 4, "num_heads": 2, "ffn_dim": 32, "seq_len": 16},
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 4, "global_batch": 4},
    }
    with pytest.raises(ConfigError) as error:
        build_recipe(values | sections | {"guard": {"replay_every": 10}})
    assert f"guard.replay_every=10 does not go with {what}" in str(error.value)
    build_recipe(values | sections)
