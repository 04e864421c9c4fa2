"""Activations under recomputation: as many bytes as live storages, and plans that keep their budget."""

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "parallel"))
from cases import Batch, StepBatch
from live_storages import Live, live_storages
from test_memory import recipe_of

from megaresnorm.activation_memory import ActivationMemory
from megaresnorm.cli import main
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.layout import check_layout
from megaresnorm.memory import MemoryAccounts, memory_of_stages, memory_per_rank
from megaresnorm.model.activations import Activations, BlockKind
from megaresnorm.model.topology import beside_others
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe, dump_recipe
from megaresnorm.recompute_auto import budget_in_bytes, describe_segments, plan_recompute, sizes_of
from megaresnorm.recompute_budget import Choice, Group, Run, Stage, TooSmall, held, seconds, solve
from megaresnorm.recompute_plan import Segment, segments_of
from megaresnorm.testing import run_ranks

BF16 = {"compute": "bf16", "residual_dtype": "bf16"}
COLUMNS = {"tp": 2, "tensor_layout": "columns"}
CASES: dict[str, dict] = {
    "pre": {"recompute": "norm"},
    "deepnorm, bf16": {"topology": "deepnorm", "precision": {"compute": "bf16"}, "recompute": "ffn"},
    "keel": {"topology": "keel", "recompute": "branch"},
    "peri, bf16 stream": {"topology": "peri", "precision": BF16, "recompute": "attention"},
    "gated, bf16": {"topology": "gated", "precision": {"compute": "bf16"}, "recompute": "branch"},
    "subln, dropout": {"topology": "subln", "model": {"dropout": 0.1}, "recompute": "norm"},
    "mix_ln, mixed": {
        "topology": "mix_ln",
        "recompute": {"policy": "norm", "blocks": [{"first": 0, "last": 4, "policy": "block"}]},
    },
    "reordered": {"topology": "reordered", "recompute": {"policy": "every", "every": 3}},
    "tp2 full": {"topology": "layerscale", "parallel": {"tp": 2}, "recompute": "norm"},
    "tp2 tokens": {
        "topology": "sandwich",
        "parallel": {"tp": 2, "tensor_layout": "tokens"},
        "precision": {"compute": "bf16"},
        "recompute": "branch",
    },
    "tp2 tokens, kept rows": {
        "parallel": {"tp": 2, "tensor_layout": "tokens"},
        "recompute": {"policy": "ffn", "gathered": "keep"},
    },
    "tp2 columns, merge": {
        "topology": "keel",
        "parallel": COLUMNS | {"columns_norm": "merge"},
        "precision": {"compute": "bf16"},
        "recompute": "block",
    },
    "tp2 columns, gather": {"parallel": COLUMNS | {"columns_norm": "gather"}, "precision": BF16, "recompute": "none"},
    "tp2 columns, gather, kept rows": {
        "topology": "deepnorm",
        "parallel": COLUMNS | {"columns_norm": "gather"},
        "recompute": {"policy": "norm", "gathered": "keep"},
    },
}


def recipe_for(case: dict, num_blocks: int = 12, seq_len: int = 512, *, checkpoint: bool = True) -> Recipe:
    topology, recompute = case.get("topology", "pre"), case.get("recompute", "none")
    model = {"topology": topology, "num_blocks": num_blocks, "dim": 64, "seq_len": seq_len, "vocab_size": 64}
    return recipe_of(
        model | beside_others(topology) | case.get("model", {}),
        recompute={"policy": recompute} if isinstance(recompute, str) else recompute,
        precision=case.get("precision", {}),
        parallel=case.get("parallel", {}),
        train={"micro_batch": 1, "global_batch": 4},
        checkpoint={"asynchronous": checkpoint},
    )


def engine_of(recipe: Recipe) -> NativeEngine:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return NativeEngine(recipe, context_of(check_layout(recipe, ranks)))


@cache
def context_of(sizes: Sizes) -> ParallelContext:
    """One for all recipes of a rank: its groups have threads of their own."""
    return ParallelContext.create(sizes, "cpu")


def measured(recipe: Recipe) -> Live:
    """A microbatch of this rank, with gradients that are there already."""
    engine = engine_of(recipe)
    model, seq = engine.model, recipe.model.seq_len
    tokens = torch.arange(seq).remainder(64).unsqueeze(0)
    dropout = engine._dropout(Batch(tokens, tokens, torch.arange(1)))

    def forward() -> torch.Tensor:
        return model(tokens, labels_BS=tokens, dropout=dropout)[1]

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    differentiate(forward())  # what is made once, such as rotary tables
    return live_storages(forward, differentiate)


def measured_by_all(rank: int, recipes: list[Recipe]) -> list[dict]:
    return [measured(recipe)._asdict() for recipe in recipes]


@cache
def found(name: str) -> tuple[Recipe, Live]:
    recipe = recipe_for(CASES[name])
    if recipe.parallel.tp == 1:
        return recipe, measured(recipe)
    return recipe, of_two_ranks()[name]


@cache
def of_two_ranks() -> dict[str, Live]:
    names = [name for name, case in CASES.items() if "parallel" in case]
    first, _ = run_ranks(2, measured_by_all, [recipe_for(CASES[name]) for name in names])
    return {name: Live(**one) for name, one in zip(names, first, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_activations_are_those_of_live_storages_within_a_twentieth(name: str) -> None:
    recipe, live = found(name)
    accounts = MemoryAccounts(recipe, Sizes(tp=recipe.parallel.tp), "cpu")
    memory = accounts.of_ranks(None)[0]
    expected, _ = accounts.activations.of_rank(0, {0: segments_of(recipe.recompute, range(recipe.model.num_blocks))})
    assert expected.kept + memory.logits == pytest.approx(live.kept, rel=0.05)
    assert max(expected.kept + memory.logits, expected.peak) + memory.passing == pytest.approx(live.peak, rel=0.05)


def test_terms_of_a_block_add_up_and_policies_drop_theirs() -> None:
    recipe = recipe_for({"topology": "keel"})
    of, kind = Activations(recipe.model, 1, "full", False, 4, 4), BlockKind.of(recipe.model, 3)
    sizes: dict[str, int] = {}
    for term in of.terms(kind):
        sizes[term.name] = sizes.get(term.name, 0) + term.size
    dim, width, heads = 64, recipe.model.ffn_width, 4
    assert sizes == {
        "trunk": 2 * 4 * dim,
        "stored sum": 2 * 4 * dim,
        "branch input": 2 * 4 * dim,
        "statistics": 4 * 8,
        "q, k, v": 3 * 4 * dim,
        "normaliser": 4 * heads,
        "attention output": 4 * dim,
        "gate, up": 2 * 4 * width,
        "activation": 4 * width,
    }
    whole, stream = sum(sizes.values()), sizes["trunk"] + sizes["stored sum"] + sizes["statistics"]
    light = whole - sizes["branch input"] - sizes["activation"]
    inside = sizes["q, k, v"] + sizes["normaliser"] + sizes["attention output"]
    wanted = {"none": whole, "norm": light, "attention": light - inside, "ffn": light - sizes["gate, up"]}
    wanted |= {"branch": stream, "block": 4 * dim + 8}
    assert {policy: of.of_block(kind, policy) for policy in wanted} == wanted


def test_memory_of_a_rank_has_its_policy_in_it() -> None:
    def activations(**recompute: Any) -> int:
        return memory_per_rank(recipe_for({"recompute": {"policy": "none"} | recompute}), 1).activations

    policies = ("none", "norm", "ffn", "branch", "block")
    sizes = [activations(policy=policy) for policy in policies]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 * sizes[-1]
    assert activations(policy="every", every=3) < activations(policy="every", every=12)
    assert activations(policy="auto") <= min(sizes[-1], activations(policy="every", every=3))  # the least there is


def test_tensors_between_blocks_that_are_offloaded_lie_beside_a_gpu() -> None:
    kept, away = (
        recipe_for({"recompute": {"policy": "block", "offload": offload}}, num_blocks=100) for offload in (False, True)
    )
    before, after = (memory_per_rank(recipe, 1, device_type="cuda") for recipe in (kept, away))
    assert before.offloaded == 0 and after.offloaded == before.activations - after.activations > 100 * 512 * 64 * 4
    assert after.host.likely == before.host.likely + after.offloaded
    assert after.device.likely < before.device.likely and "offloaded" in after.describe("host")
    here = memory_per_rank(away, 1)
    assert here.offloaded == 0 and here.activations == before.activations


AUTO = {"recompute": {"policy": "auto"}}
SHARES = (0.9, 0.7, 0.5, 0.25, 0.05)  # of the room between the least and no recomputation


def with_budget(recipe: Recipe, budget: Any) -> Recipe:
    return recipe.model_copy(update={"recompute": recipe.recompute.model_copy(update={"budget": budget})})


def budgets_of(recipe: Recipe, sizes: Sizes) -> list[int]:
    """Between what the fullest rank needs at least, and what it needs without recomputation."""
    stages = ActivationMemory(recipe, sizes, "cpu").stages
    none = {number: [Segment(stage.blocks, "none")] for number, stage in enumerate(stages)}
    most = max(memory.host.likely for memory in memory_of_stages(recipe, sizes, segments=none))
    least = max(memory.host.likely for memory in memory_of_stages(recipe, sizes))
    return [int(least + share * (most - least)) for share in SHARES]


def peak_of_step(recipe: Recipe) -> tuple[NativeEngine, int]:
    """An engine, and its tensors at the fullest moment of a step's passes."""
    engine = engine_of(recipe)
    sizes, seq = sizes_of(engine.context), recipe.model.seq_len
    tokens = torch.arange(4 * seq).remainder(64).view(4, seq)
    parts = [Batch(tokens[i : i + 1], tokens[i : i + 1], torch.arange(1)) for i in range(4)]
    batch = StepBatch.of(parts, engine.stack)
    engine.gradients(batch)
    engine._optimizer.zero_grad()
    memory = memory_of_stages(recipe, sizes, segments=engine.assembled.segments)[engine.context.pp.rank]
    standing = memory.weights + memory.optimizer + memory.copies + memory.packed + memory.received
    return engine, standing + live_storages(lambda: None, lambda _: engine.gradients(batch)).peak


def auto_on_ranks(rank: int, recipes: list[Recipe]) -> list[dict]:
    found = []
    for recipe in recipes:
        engine, peak = peak_of_step(recipe)
        segments = {n: [[*one.blocks, one.policy] for one in some] for n, some in engine.assembled.segments.items()}
        found.append({"segments": str(segments), "peak": peak})
    return found


@pytest.mark.parametrize("topology", ["pre", "keel"])
def test_auto_takes_the_memory_that_it_may(topology: str) -> None:
    recipe = recipe_for(AUTO | {"topology": topology}, num_blocks=24, checkpoint=False)
    for budget in budgets_of(recipe, Sizes()):
        engine, peak = peak_of_step(with_budget(recipe, budget))
        process = memory_per_rank(recipe, 1).process
        print(f"RESULT {topology} budget {(budget-process)/2**20:.2f} peak {peak/2**20:.2f} {peak/(budget-process)-1:.1%}", describe_segments([*engine.assembled.segments[0]]))
        assert peak + process <= 1.05 * budget - 0.05 * process
        assert peak == pytest.approx(budget - process, rel=0.05), describe_segments([*engine.assembled.segments[0]])


def test_auto_takes_the_memory_that_it_may_on_every_stage() -> None:
    """The fullest rank as much, the others no more; and both have the same plan."""
    recipe = recipe_for(AUTO | {"parallel": {"pp": 2}}, num_blocks=24, checkpoint=False)
    budgets = budgets_of(recipe, Sizes(pp=2))
    ranks = run_ranks(2, auto_on_ranks, [with_budget(recipe, budget) for budget in budgets])
    process = memory_per_rank(recipe, 2).process
    for budget, *found in zip(budgets, *ranks, strict=True):
        assert found[0]["segments"] == found[1]["segments"]
        print("RESULT pp2", (budget-process)/2**20, [(o["peak"]/2**20, f"{o['peak']/(budget-process)-1:.1%}") for o in found])
        for one in found:
            assert one["peak"] <= 1.05 * (budget - process)
        assert max(one["peak"] for one in found) == pytest.approx(budget - process, rel=0.05)
