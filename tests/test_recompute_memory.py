"""Activations under recomputation: as many bytes as live storages, and plans that keep their budget."""

import json
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent / "parallel"))
from cases import Batch, StepBatch
from live_storages import Live, live_storages
from test_memory import recipe_of

from megaresnorm import recompute_auto
from megaresnorm.activation_memory import ActivationMemory
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.cli import main
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.layout import check_layout
from megaresnorm.memory import MemoryAccounts, memory_of_stages, memory_per_rank
from megaresnorm.model.activations import Activations, BlockKind
from megaresnorm.model.topology import beside_others
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.planner.estimate import estimate
from megaresnorm.reading import bytes_of_size
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import dump_recipe, load_recipe
from megaresnorm.recompute_auto import budget_in_bytes, describe_segments, memory_of_rank, plan_recompute, sizes_of
from megaresnorm.recompute_budget import Choice, Group, Run, Stage, TooSmall, held, seconds, solve
from megaresnorm.recompute_plan import Segment, segments_of
from megaresnorm.resilience.host import HostMemory
from megaresnorm.run import Run as TrainingRun
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
    "fp8": {"topology": "deepnorm", "precision": {"compute": "fp8"}, "recompute": "none"},
    "fp8, block": {
        "topology": "keel",
        "precision": {"compute": "fp8", "fp8": {"recipe": "block"}},
        "recompute": {"policy": "norm", "blocks": [{"first": 0, "last": 5, "policy": "none"}]},
    },
    "tp2 tokens, fp8": {
        "parallel": {"tp": 2, "tensor_layout": "tokens"},
        "model": {"ffn_dim": 192},
        "precision": {"compute": "fp8"},
        "recompute": {"policy": "branch", "gathered": "keep"},
    },
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
    dropout = engine.passes.dropout(Batch(tokens, tokens, torch.arange(1)))

    def forward() -> torch.Tensor:
        return model(tokens, labels_BS=tokens, dropout=dropout)[1]

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    differentiate(forward())  # what is made once, such as rotary tables
    # Threads of gloo may let go of what they have sent a moment late.
    return Live(*map(min, *(live_storages(forward, differentiate) for _ in range(2))))


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
    """All but two; none that is too small to be copied."""
    kept, away, small = (
        recipe_for({"recompute": {"policy": "block", "offload": offload}}, num_blocks=100, seq_len=seq_len)
        for offload, seq_len in ((False, 4096), (True, 4096), (True, 2048))
    )
    before, after, none = (memory_per_rank(recipe, 1, device_type="cuda") for recipe in (kept, away, small))
    assert none.offloaded == before.offloaded == 0
    assert after.offloaded == before.activations - after.activations == 98 * 4096 * 64 * 4
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


@pytest.mark.parametrize("topology", ["pre", pytest.param("keel", marks=pytest.mark.slow)])
def test_auto_takes_the_memory_that_it_may(topology: str) -> None:
    recipe = recipe_for(AUTO | {"topology": topology}, num_blocks=24, checkpoint=False)
    for budget in budgets_of(recipe, Sizes()):
        engine, peak = peak_of_step(with_budget(recipe, budget))
        process = memory_per_rank(recipe, 1).process
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
        for one in found:
            assert one["peak"] <= 1.05 * (budget - process)
        assert max(one["peak"] for one in found) == pytest.approx(budget - process, rel=0.05)


def test_a_budget_below_the_least_is_refused_in_one_line() -> None:
    recipe = recipe_for(AUTO, num_blocks=24)
    least = memory_per_rank(recipe, 1)
    assert plan_recompute(recipe, Sizes(), least.host.likely)
    tight = with_budget(recipe, "10MB")
    with pytest.raises(ConfigError) as refused:
        plan_recompute(tight, Sizes(), budget_in_bytes(tight, None))
    line = str(refused.value)
    assert "\n" not in line and line.startswith("recompute.budget=10MB: a rank may use 10.0 MB and needs at least ")
    needed = line.split("needs at least ")[1].split(" (")[0]
    assert needed == human_bytes(least.host.likely)
    assert "process 250.0 MB, " in line and "even with blocks 0-" in line and "raise the budget" in line
    with pytest.raises(ConfigError, match=r"recompute\.policy=auto: a rank may use"):
        plan_recompute(recipe, Sizes(), least.host.likely - 1)


def test_budgets_are_sizes_or_shares() -> None:
    recipe = recipe_for(AUTO)
    cases = {None: 900, 0.6: 600, 1: 1000, 5_000: 5000, "2kB": 2000, "1GiB": 2**30}
    for budget, wanted in cases.items():
        assert budget_in_bytes(with_budget(recipe, budget), 1000) == wanted
    assert budget_in_bytes(with_budget(recipe, "2kB"), None) == 2000
    with pytest.raises(ConfigError, match="which is not known here; give a size"):
        budget_in_bytes(with_budget(recipe, 0.5), None)


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaresnorm.recompute_auto.host_memory", lambda: HostMemory(8 * 10**9, 1))
    assert memory_of_rank(torch.device("cpu"), 4) == 2 * 10**9


def unequal_ranks(rank: int, recipe: Recipe, memory: int) -> str:
    """The second rank has twice the memory: both must take the plan of the first."""
    recompute_auto.memory_of_rank = lambda device, ranks_here: memory * (1 + rank)
    engine = engine_of(recipe)
    return describe_segments([*engine.assembled.segments[0]])


def test_ranks_agree_on_the_plan_of_the_smallest() -> None:
    recipe = recipe_for(AUTO | {"parallel": {"tp": 2}}, num_blocks=6)
    memory = memory_per_rank(recipe, 2).host.likely + 2**20
    wanted, other = (describe_segments(plan_recompute(recipe, Sizes(tp=2), times * memory)[0]) for times in (1, 2))
    assert run_ranks(2, unequal_ranks, with_budget(recipe, 1.0), memory) == [wanted, wanted] != [other, other]


def group_of(count: int, **choices: tuple) -> Group:
    return Group(range(count), {policy: Choice(*values) for policy, values in choices.items()})


CHOICES: dict[str, tuple] = {
    "none": (100, 10, 0.0),
    "norm": (70, 20, 2.0),
    "attention": (50, 25, 20.0),
    "ffn": (35, 50, 25.0),
    "branch": (15, 50, 44.0),
    "every": (5, 120, 70.0, 60.0),
}


def test_the_solver_is_never_slower_than_a_uniform_policy() -> None:
    for under_way in (1, 3):
        for count in (1, 2, 7, 40):
            stages = [Stage((group_of(count, **CHOICES),), under_way, ends=3)]
            uniform = {policy: [[Run(range(count), policy, stages[0].groups[0])]] for policy in CHOICES}
            top, least = held(stages, uniform["none"]).peak, 0
            for budget in range(top, 0, -max(1, top // 60)):
                fitting = [plan for plan in uniform.values() if held(stages, plan).peak <= budget]
                try:
                    plan = solve(stages, lambda found: found.peak, budget)
                except TooSmall as e:
                    assert not fitting and e.least > budget and least in (0, e.least)
                    least = e.least
                    continue
                assert held(stages, plan).peak <= budget
                assert [block for runs in plan for run in runs for block in run.blocks] == list(range(count))
                assert seconds(stages, plan) <= min((seconds(stages, one) for one in fitting), default=float("inf"))


def test_the_solver_is_near_the_best_of_all_choices() -> None:
    """Of six blocks without spans, compared with all 3,125 and more choices."""
    choices = {policy: values for policy, values in CHOICES.items() if policy != "every"}
    stage = Stage((group_of(6, **choices, every=(200, 0, 99.0, 99.0)),))
    (group,) = stage.groups

    def plan_of(policies: tuple[str, ...]) -> list[list[Run]]:
        return [[Run(range(i, i + 1), policy, group) for i, policy in enumerate(policies)]]

    everything = [plan_of(policies) for policies in product(choices, repeat=6)]
    step = max(values[2] for values in choices.values())
    for budget in range(150, 620, 47):
        best = min(seconds([stage], plan) for plan in everything if held([stage], plan).peak <= budget)
        assert seconds([stage], solve([stage], lambda found: found.peak, budget)) <= best + step


def test_stages_of_a_rank_share_its_budget() -> None:
    """What more microbatches keep is dropped first."""
    group = group_of(10, none=(10, 0, 0.0), norm=(8, 0, 1.0), every=(1, 9, 9.0, 9.0))
    stages = [Stage((group,), under_way) for under_way in (3, 1)]
    plan = solve(stages, lambda found: found.peak, 400 - 3 * 2 * 10)
    assert [[run.policy for run in runs] for runs in plan] == [["norm"], ["none"]]


def test_a_last_block_is_left_alone_where_nothing_is_gained() -> None:
    stage = Stage((group_of(4, none=(10, 5, 0.0), every=(1, 14, 9.0, 9.0)),))
    (runs,) = solve([stage], lambda found: found.peak, 20)
    assert runs[-1].policy == "none" and runs[-1].blocks == range(3, 4)
    at_loss = solve([stage], lambda found: max(found.kept + 10, found.peak), 20)[0]  # where logits are there, too
    assert at_loss[-1].policy == "every"


def test_a_dry_run_tells_what_is_recomputed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recipe = recipe_for({"recompute": {"policy": "ffn"}, "parallel": {"pp": 2}}, num_blocks=4)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))

    def lines(*arguments: str, code: int = 0) -> str:
        assert main(["train", str(path), "--dry-run", "--no-data", *arguments]) == code
        return "".join(capsys.readouterr())

    told = lines()
    assert "# recompute  ffn: stage 0: blocks 0-1 ffn; " in told and "#            stage 1: blocks 2-3 ffn; " in told
    assert "recompute " not in lines("recompute.policy=none").replace("recompute:", "")
    auto = lines("recompute.policy=auto", "recompute.budget=262MB")
    assert "auto within " in auto and ": stage 0: blocks 0" in auto and " of activations\n" in auto
    assert "needs at least" in lines("recompute.policy=auto", "recompute.budget=200MB", code=2)
    assert "blocks 0-1 none" in lines("recompute.policy=auto", "--memory", "80GB")
    assert "auto: chosen where it will run" in lines("recompute.policy=auto", "train.device=cuda")


def test_a_run_writes_its_plan_and_may_change_it_when_it_goes_on(
    tiny: Callable[..., Recipe], caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, **recompute: Any) -> dict:
        recipe = tiny(train={"steps": steps, "global_batch": 4}, model={"num_blocks": 3}, recompute=recompute)
        with TrainingRun(recipe) as one:
            told = [line for line in one.describe() if line.startswith("recompute")]
            while not one.is_finished:
                one.engine.step(one.next_batch(), 1e-3)
                one.step_is_done()
            one.save_last(None)
        written = json.loads((Path(recipe.train.output) / "recompute.json").read_text())
        return written | {"told": told, "done": one.steps_done}

    first = run(1, policy="every", every=2)
    assert first["schema_version"] == 1 and first["policy"] == "every"
    assert first["stages"] == [
        {"stage": 0, "segments": [{"first": 0, "last": 1, "policy": "every", "every": 2},
                                  {"first": 2, "last": 2, "policy": "block"}]}
    ]  # fmt: skip
    assert first["ranks"][0]["stages"] == [0] and first["ranks"][0]["activations"] > 0
    assert first["told"][0].startswith("recompute every: blocks 0-1 every 2, 2 block; ")
    second = run(2, policy="auto", budget="10GB")
    assert (
        second["policy"] == "auto"
        and second["done"] == 2
        and second["told"][0].startswith("recompute auto within 10GB: blocks")
    )
    assert second["stages"][0]["segments"] == [{"first": 0, "last": 2, "policy": "none"}]
    assert run(3)["told"] == []


def test_dry_run_tells_the_memory_of_the_stage_that_needs_most() -> None:
    settings = ["data.path=x", "model.vocab_size=32000", "parallel.pp=4", "parallel.dp_shard=4"]
    recipe = load_recipe("configs/llama-7b.yaml", settings)
    found = estimate(recipe, ranks=64, device_memory=80 * 10**9, with_data=False)
    most = max(memory.device.likely for memory in found.stages)
    assert f"a rank: {human_bytes(most)} of GPU memory" in "\n".join(found.describe())


def test_the_least_memory_that_is_printed_is_enough_as_a_budget() -> None:
    settings = ["data.path=x", "model.vocab_size=32000", "recompute.policy=auto"]
    recipe = load_recipe("configs/deepnorm-200-1b.yaml", settings)
    with pytest.raises(ConfigError) as e:
        plan_recompute(recipe, Sizes(dp_shard=8), 2 * 10**9)
    least = str(e.value).split("needs at least ")[1].split(" (")[0]
    assert plan_recompute(recipe, Sizes(dp_shard=8), bytes_of_size(least))
