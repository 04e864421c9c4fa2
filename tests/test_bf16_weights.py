"""Weights stored in BF16 alone: what is stored, updated, refused, saved and read again."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "parallel"))
from cases import batches, build, make_recipe
from live_storages import live_storages

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.resume import check_same_run
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.memory import memory_per_rank
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import ParameterSpec, Part
from megaresnorm.optim import SMALL, Optimizer
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.sharding import boxes, shard
from megaresnorm.parallel.wide import with_wide_gradient
from megaresnorm.precision import rounded_updates
from megaresnorm.precision.rounded_updates import Rounded
from megaresnorm.recipe import OptimRecipe, Recipe
from megaresnorm.recipe.load import build_recipe

BF16 = {"compute": "bf16", "weights": "bf16"}


def recipe_of(variant: str = "gpt", topology: str = "gated", **precision: str) -> Recipe:
    return make_recipe(topology, variant, {}, num_blocks=3, precision=BF16 | precision)


def optimizer_of(
    weights: dict[str, torch.Tensor], places: dict[str, list], optim: OptimRecipe
) -> tuple[dict, Optimizer]:
    parameters = {name: with_wide_gradient(nn.Parameter(weight.clone())) for name, weight in weights.items()}
    table = {
        n: ParameterSpec(n, tuple(p.shape), (Part("q", len(p)),), True, matrix=True) for n, p in parameters.items()
    }
    rounded = {name: Rounded.of(7, name, places[name]) for name in weights}
    return parameters, Optimizer(parameters, table, optim, rounded=rounded)


def whole(shape: tuple[int, ...]) -> list:
    return [tuple((0, size) for size in shape)]


def test_matrices_are_bf16_all_else_fp32_and_nothing_is_kept_twice() -> None:
    """Gates of tokens are matrices of one row by their shape, and none by what they are."""
    recipe = recipe_of()
    assembled, engine = build(recipe)
    kinds = {name: p.dtype for name, p in assembled.parameters().items()}
    assert {name for name, dtype in kinds.items() if dtype == torch.bfloat16} == {
        name for name, spec in assembled.table.items() if spec.decay
    }
    assert kinds["blocks.0.ffn.token_gate.weight"] == kinds["blocks.0.ffn.branch.down.bias"] == torch.float32
    assert {"embedding.weight", "positions.weight"} < {n for n, dtype in kinds.items() if dtype == torch.bfloat16}
    assert not engine.low_precision.copies
    engine.step(batches(engine, recipe), 1e-3)
    states = [state for p in assembled.parameters().values() for state in engine._optimizer.state(p).values()]
    assert {state.dtype for state in states} == {torch.float32}


def test_initial_weights_are_those_of_fp32_rounded_once() -> None:
    of_fp32, of_bf16 = (build(recipe_of(weights=weights))[0].parameters() for weights in ("fp32", "bf16"))
    assert all(torch.equal(of_bf16[name], p.to(of_bf16[name].dtype)) for name, p in of_fp32.items())


@pytest.mark.parametrize(("variant", "topology"), [("gpt", "gated"), ("llama", "keel"), ("gemma", "pre")])
@pytest.mark.parametrize("rows", [None, 3])
def test_gradients_are_bit_for_bit_those_of_fp32_weights_of_the_same_values(variant, topology, rows) -> None:
    """FP32 over four microbatches of embedding, positions, output matrix and layers; BF16 sums would differ."""
    found = []
    for weights in ("bf16", "fp32"):
        recipe = make_recipe(
            topology, variant, {}, num_blocks=3, logit_rows=rows, precision=BF16 | {"weights": weights}
        )
        assembled, engine = build(recipe)
        with torch.no_grad():
            for p in assembled.parameters().values():  # of FP32 weights to those that BF16 can store
                p.copy_(p.to(torch.bfloat16))
        engine.weights_changed()
        loss, _ = engine.gradients(batches(engine, recipe))
        found.append((loss, {name: p.grad for name, p in assembled.parameters().items()}))
    (loss, got), (wanted_loss, wanted) = found
    assert loss == wanted_loss
    for name, gradient in wanted.items():
        assert got[name].dtype == torch.float32 and torch.equal(got[name], gradient), name
    matrices = [got[name] for name in got if name.endswith(("embedding.weight", "down.weight"))]
    assert all(not torch.equal(gradient, gradient.bfloat16().float()) for gradient in matrices)


@pytest.mark.parametrize("size", [(8, 16), (300, 256)])  # packed with others, and by itself
def test_updates_that_rounding_to_nearest_would_lose_are_made_on_average(size, monkeypatch) -> None:
    """A hundred steps of 1e-4 from weights of 1, whose neighbours are 4e-3 below and 8e-3 above them."""
    assert (size[0] * size[1] > SMALL) == (size == (300, 256))
    moved = {}
    for name, rounds in (("at random", rounded_updates.rounded_at_random), ("nearest", lambda x, bits: x.bfloat16())):
        monkeypatch.setattr(rounded_updates, "rounded_at_random", rounds)
        weights = {"w": torch.ones(size, dtype=torch.bfloat16)}
        parameters, optimizer = optimizer_of(weights, {"w": whole(size)}, OptimRecipe(weight_decay=0.0))
        p = parameters["w"]
        for _ in range(100):
            p.grad = torch.ones(size)
            optimizer.collect()
            optimizer.step(1e-4)
        moved[name] = 1.0 - p.detach().double()
    assert not moved["nearest"].any()
    # The variance of one step is at most step * distance: the mean's standard error is that of as many walks.
    error = (100 * 1e-4 * 2**-8 / moved["at random"].numel()) ** 0.5
    assert abs(moved["at random"].mean().item() - 1e-2) < 5 * error


@pytest.mark.parametrize("layout", ["full", "columns"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_share_of_a_weight_is_rounded_as_the_whole_is(layout, size, monkeypatch) -> None:
    """Three updates with the same gradients, in pieces of other sizes and in another order: the same bits."""
    recipe = build_recipe(
        {
            "model": {"dim": 48, "num_blocks": 2, "num_heads": 6, "num_kv_heads": 6, "ffn_dim": 96, "seq_len": 8,
                      "vocab_size": 96, "vocab_multiple": 6, "positions": "learned"},
            "data": {"path": "none"}, "train": {"output": "none", "steps": 1},
        }
    )  # fmt: skip
    table = {name: spec for name, spec in parameter_table(recipe.model, layout).items() if spec.matrix}
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s.shape, generator=generator).bfloat16() for n, s in table.items()}
    gradients = [{n: torch.randn(s.shape, generator=generator) for n, s in table.items()} for _ in range(3)]
    alone = Axis("dp_shard")

    def updated(axis: Axis) -> dict[str, torch.Tensor]:
        def share(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {n: shard(t, table[n].split, [p.rows for p in table[n].parts], axis) for n, t in tensors.items()}

        places = {n: boxes(s.shape, s.split, [p.rows for p in s.parts], axis, alone) for n, s in table.items()}
        parameters, optimizer = optimizer_of(share(weights), places, OptimRecipe())
        for step in gradients:
            for name, gradient in share(step).items():
                parameters[name].grad = gradient.clone()
            optimizer.collect()
            optimizer.step(1e-2)
        return {name: p.detach() for name, p in parameters.items()}

    wanted = updated(Axis("tp"))
    monkeypatch.setattr(rounded_updates, "CPU_PIECE", 1000)
    assert all(torch.equal(weight, wanted[name]) for name, weight in updated(Axis("tp")).items())
    for rank in range(size):
        axis = Axis("tp", size, rank)
        for name, weight in updated(axis).items():
            spec = table[name]
            assert torch.equal(weight, shard(wanted[name], spec.split, [p.rows for p in spec.parts], axis)), name
    assert not any(torch.equal(weight, weights[name]) for name, weight in wanted.items())


@pytest.mark.parametrize("size", [(3, 7), (300, 256)])
def test_a_refused_update_changes_nothing_and_is_not_counted(size) -> None:
    """The step after it is the one that it would have been without, down to the random bits."""
    found = []
    for steps in (["good", "good"], ["good", "refused", "good"]):
        weights = {"w": torch.linspace(-1, 1, size[0] * size[1]).view(size).bfloat16()}
        parameters, optimizer = optimizer_of(weights, {"w": whole(size)}, OptimRecipe())
        p = parameters["w"]
        for kind in steps:
            bad = kind == "refused"
            p.grad = torch.full(size, float("nan")) if bad else torch.linspace(1, 2, p.numel()).view(size)
            optimizer.collect()
            before = [p.detach().clone(), *(state.clone() for state in optimizer.state(p).values())]
            divisor = torch.tensor(float("nan") if bad else 1.25, dtype=torch.float64)
            optimizer.step(1e-2, divisor=divisor, refused=torch.tensor(float(bad)))
            after = [p.detach(), *optimizer.state(p).values()]
            assert all(torch.equal(a, b) == bad for a, b in zip(before, after, strict=True))
        found.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_batch_that_is_not_finite_leaves_the_engine_as_it_was() -> None:
    recipe = recipe_of()
    assembled, engine = build(recipe)
    engine.step(batches(engine, recipe), 1e-3)
    held = [s.local for group in engine.tensors.values() for s in group.values()]
    before = [tensor.clone() for tensor in held]
    final = assembled.parameters()["final_norm.weight"]
    with torch.no_grad():
        final[0] = float("nan")
    assert not engine.step(batches(engine, recipe, seed=1), 1e-3).applied
    with torch.no_grad():
        final.copy_(before[list(engine.tensors["weights"]).index("final_norm.weight")])
    assert all(torch.equal(a, b) for a, b in zip(before, held, strict=True))


def saved(root: Path, engine: NativeEngine, recipe: Recipe, steps: int) -> Checkpoint:
    state = {"recipe": recipe.model_dump(exclude_none=True)}
    return Checkpoint(save_checkpoint(root, steps, engine.tensors, state))


def test_a_resumed_run_repeats_every_bit_and_its_checkpoint_has_two_bytes_an_element(tmp_path: Path) -> None:
    recipe = recipe_of("llama", "keel")
    _, engine = build(recipe)
    for step in range(2):
        engine.step(batches(engine, recipe, seed=step), 1e-2)
    checkpoint = saved(tmp_path, engine, recipe, 2)
    recorded = checkpoint.tensors
    for name, spec in engine.assembled.table.items():
        assert recorded["weights"][name]["dtype"] == ("bfloat16" if spec.matrix else "float32")
        assert recorded["optimizer"][f"exp_avg.{name}"]["dtype"] == "float32"
    _, resumed = build(recipe)
    resumed.load(checkpoint, EngineState(updates=2, clipper_steps=0))
    for step in (2, 3):
        one, other = (each.step(batches(each, recipe, seed=step), 1e-2) for each in (engine, resumed))
        assert one == other
    for group, members in engine.tensors.items():
        for name, slices in members.items():
            assert torch.equal(slices.local, resumed.tensors[group][name].local), name


def test_weights_of_fp32_are_rounded_to_nearest_when_they_are_read_and_those_of_bf16_widened(tmp_path: Path) -> None:
    """train.initial_weights; a run itself keeps its type, and says so in one line."""
    wide, narrow = recipe_of(weights="fp32"), recipe_of()
    (_, of_fp32), (_, of_bf16) = build(wide), build(narrow)
    for engine, recipe in ((of_fp32, wide), (of_bf16, narrow)):
        engine.step(batches(engine, recipe), 1e-2)
    checkpoints = saved(tmp_path / "wide", of_fp32, wide, 1), saved(tmp_path / "narrow", of_bf16, narrow, 1)
    before, after = (dict(engine.full_state().items()) for engine in (of_fp32, of_bf16))
    before, after = ({name: t.clone() for name, t in state.items()} for state in (before, after))
    of_bf16.load_weights(checkpoints[0])
    of_fp32.load_weights(checkpoints[1])
    assert all(torch.equal(t, before[name].to(t.dtype)) for name, t in of_bf16.full_state().items())
    assert all(torch.equal(t, after[name].float()) for name, t in of_fp32.full_state().items())
    state = SimpleNamespace(recipe=wide.model_dump(exclude_none=True))
    with pytest.raises(CheckpointError) as refused:
        check_same_run(checkpoints[0], state, narrow, SimpleNamespace(), "data")
    line = str(refused.value)
    assert (
        'made with precision.weights="fp32", the recipe has "bf16"; use another train.output' in line
        and "\n" not in line
    )


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"precision": {"weights": "bf16"}}, "goes with precision.compute=bf16 alone, not fp32"),
        ({"precision": BF16 | {"compute": "fp8"}}, "goes with precision.compute=bf16 alone, not fp8"),
        ({"precision": BF16 | {"compute": "fp16"}}, "goes with precision.compute=bf16 alone, not fp16"),
        ({"precision": BF16 | {"compute": "fp64"}}, "goes with precision.compute=bf16 alone, not fp64"),
        ({"precision": BF16, "parallel": {"dp_shard": 2}}, "with parallel.dp_shard=2: FSDP2 has one type"),
        ({"precision": BF16, "train": {"compile": "blocks"}}, "with train.compile=blocks: torch.compile rounds"),
        ({"precision": BF16, "train": {"compile": "cuda_graphs"}}, "train.compile=cuda_graphs: torch.compile rounds"),
    ],
)  # fmt: skip
def test_what_bf16_weights_do_not_go_with_is_refused_in_one_line(sections, says) -> None:
    values = {
        "model": {"dim": 16, "num_blocks": 4, "num_heads": 2, "seq_len": 8, "vocab_size": 64},
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 2} | sections.get("train", {}),
    }
    with pytest.raises(ConfigError) as error:
        build_recipe(values | {name: value for name, value in sections.items() if name != "train"})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_auto_compiles_nothing_and_says_why() -> None:
    recipe = recipe_of()
    found = NativeEngine(recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": "auto"})}))
    assert found.assembled.compiled == "none"
    assert "precision.weights=bf16 cannot be compiled" in found.assembled.kernel_choices["compile"]


def states_of(recipe: Recipe) -> int:
    """Bytes that are alive once a model is built and has gradients and moments, found by torch's allocations."""

    def made() -> NativeEngine:
        engine = NativeEngine(recipe)
        tokens = torch.zeros((1, recipe.model.seq_len), dtype=torch.int64)
        engine.gradients(StepBatch.of([Batch(tokens, tokens, torch.zeros(1, dtype=torch.int64))]))
        for parameter in engine.assembled.parameters().values():
            engine._optimizer.state(parameter)
        return engine

    return live_storages(made, lambda engine: None).kept


def test_fourteen_bytes_a_parameter_instead_of_eighteen() -> None:
    """Weights, copies, gradients and moments; of the embedding, which has no copy, 14 instead of 16."""
    model = {"dim": 512, "num_blocks": 2, "num_heads": 4, "seq_len": 8, "vocab_size": 512}  # only norms are packed
    recipes = [
        build_recipe({"model": model, "data": {"path": "none"}, "train": {"output": "none", "steps": 1},
                      "precision": BF16 | {"weights": weights}})
        for weights in ("fp32", "bf16")
    ]  # fmt: skip
    states_of(recipes[0])  # what the first model of a process makes for good
    before, after = (states_of(recipe) for recipe in recipes)
    specs = parameter_table(recipes[0].model).values()
    linear = sum(spec.num_elements for spec in specs if spec.matrix and spec.name != "embedding.weight")
    # The numbers of rows and columns, by which bits are made, take 4 bytes each.
    assert before - after == pytest.approx(4 * linear + 2 * 512 * 512, rel=1e-2)
    told = [memory_per_rank(recipe, 1) for recipe in recipes]
    sums = [m.weights + m.copies + m.gradients + m.packed + m.optimizer for m in told]
    assert sums[0] - sums[1] == 4 * linear + 2 * 512 * 512
    for memory, real in zip(sums, (before, after), strict=True):
        assert memory == pytest.approx(real, rel=5e-3)
    others = 20 * sum(spec.num_elements for spec in specs if not spec.matrix)
    assert sums[1] == pytest.approx(14 * (linear + 512 * 512) + others, rel=1e-6)
