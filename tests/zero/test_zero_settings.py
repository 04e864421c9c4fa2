"""Settings that are passed on to DeepSpeed change no result, and no other setting of it is known here by accident."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
sys.path.append(str(Path(__file__).parents[1]))
from cases import batches, make_recipe
from test_engine_recipe import PASSED, recipe_of

import megaresnorm.engines.deepspeed
from megaresnorm.engines import engine_files, make_engine
from megaresnorm.errors import ConfigError
from megaresnorm.kernels.cpu.trusted import BuildError
from megaresnorm.layout import check_layout
from megaresnorm.machine import look_at_machine
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.numbers import Numbers
from megaresnorm.testing import run_ranks

pytestmark = pytest.mark.deepspeed
CPU = torch.device("cpu")
SPEAKING = {
    "wall_clock_breakdown": True,
    "memory_breakdown": True,
    "dump_state": True,
    "comms_logger": {"enabled": True, "verbose": True, "prof_all": False, "prof_ops": ["all_reduce"], "debug": True},
    "log_level": "debug",
}


def small(stage: int | None, deepspeed: dict | None = None, parallel: dict | None = None, **sections: object) -> Recipe:
    """Of the native engine where ``stage`` is None. Its biases of 26 or 13 numbers are not aligned by themselves."""
    engine = {} if stage is None else {"name": "deepspeed", "zero_stage": stage, "deepspeed": deepspeed or {}}
    compute = sections.pop("compute", "fp32")
    sections |= {"model": {"ffn_dim": 26}, "engine": engine}
    return make_recipe("deepnorm", "gpt", parallel or {}, compute, num_blocks=2, **sections)


def trained(recipe: Recipe) -> list[float]:
    """Losses and gradient norms of three steps, then the loss of an evaluation."""
    sizes = check_layout(recipe, dist.get_world_size())
    engine = make_engine(recipe, ParallelContext.create(sizes, "cpu"), CPU)
    steps = [engine.step(batches(engine, recipe, seed=seed), 1e-2) for seed in range(3)]
    assert all(step.applied for step in steps)
    last = engine.evaluate(batches(engine, recipe, seed=9))
    return [number for step in steps for number in (step.loss, step.gradient_norm)] + [last]


def trained_with(rank: int, recipes: list[Recipe]) -> list[list[float]]:
    return [trained(recipe) for recipe in recipes]


def check_same(recipes: dict[str, Recipe], native: Recipe, num_ranks: int = 2) -> None:
    """Sums in another order differ in FP32's last bits: 3e-7 was measured."""
    wanted, *found = run_ranks(num_ranks, trained_with, [native, *recipes.values()])[0]
    for name, got in zip(recipes, found, strict=True):
        assert got == pytest.approx(wanted, rel=2e-6), name


def test_open_mpi_may_number_the_ranks_of_a_node_as_it_does(monkeypatch):
    """DeepSpeed takes LOCAL_RANK for a device, and compares."""
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    assert len(run_ranks(1, trained_with, [small(0)])[0][0]) == 7


def test_a_deepspeed_that_cannot_be_imported_is_an_error_in_one_line(monkeypatch):
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"^engine.name=deepspeed: DeepSpeed .* cannot be imported .ModuleNotFound"):
        megaresnorm.engines.deepspeed.load_deepspeed(CPU)


def refused_on_one(rank: int, recipe: Recipe) -> str:
    def load(*arguments: object) -> None:
        if rank == 1:
            raise BuildError("no luck")

    pytest.MonkeyPatch().setattr(megaresnorm.engines.deepspeed, "load_extension", load)
    with pytest.raises(ConfigError) as refused:
        make_engine(recipe, ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu"), CPU)
    return str(refused.value)


def test_where_one_rank_cannot_compile_all_say_why():
    recipe = small(1)
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"offload": "optimizer"})})
    said = "engine.offload=optimizer: no luck; engine.offload=none needs no compiler"
    assert run_ranks(2, refused_on_one, recipe) == [said, said]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_is_passed_on_changes_no_result(stage):
    values = {name: [value] for name, (value, stages) in PASSED.items() if stage in stages}
    values["reduce_bucket_size"] = [1, 100, 3000]  # each gradient is larger than a bucket, some are, none is
    if stage == 3:
        values["stage3_param_persistence_threshold"] += [10**6]
        values["stage3_max_live_parameters"] += [0]
    cases = [(name, value) for name, some in values.items() for value in some]
    recipes = {f"{name}={value}": small(stage, {"zero_optimization": {name: value}}) for name, value in cases}
    check_same(recipes, small(None))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_settings_of_tensor_parallel_runs_change_no_result_together(stage):
    parallel = {"tp": 2, "tensor_layout": "columns"}
    several = {name: value for name, (value, stages) in PASSED.items() if stage in stages}
    if stage == 2:
        del several["use_multi_rank_bucket_allreduce"]  # which reduce_scatter=false ignores
    zero = {"zero_optimization": several}
    check_same({"all": small(stage, zero, parallel)}, small(None, parallel=parallel), num_ranks=4)


@pytest.mark.slow
def test_lines_on_a_run_change_no_result():
    cases = product((0, 1, 3), SPEAKING)
    check_same({f"{stage} {name}": small(stage, {name: SPEAKING[name]}) for stage, name in cases}, small(None))


STEPS = """
import sys
from test_zero_settings import SPEAKING, small, trained_with
from megaresnorm.testing import run_ranks

if __name__ == "__main__":
    run_ranks(1, trained_with, [small(1, {name: SPEAKING[name]} if name else None) for name in sys.argv[1:]])
"""
SAID = {
    "wall_clock_breakdown": "time (ms)",
    "memory_breakdown": "CPU Virtual Memory",
    "dump_state": "DeepSpeedEngine configuration",
    "comms_logger": "comm op: all_reduce",
    "log_level": "[INFO]",
    "": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_lines_that_are_asked_for_are_said_and_no_others(name):
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parallel"), str(Path(__file__).parents[1])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", STEPS, name]
    got = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert (SAID[name] in got.stdout) if name else not got.stdout, got.stdout


@pytest.mark.slow
def test_compiled_blocks_change_no_result():
    recipes = {}
    for stage in (0, 1, 2):
        recipe = small(stage)
        train = recipe.train.model_copy(update={"compile": "blocks"})
        recipes[f"compiled, {stage}"] = recipe.model_copy(update={"train": train})
    check_same(recipes, small(None))


def seen_with(rank: int, recipes: list[Recipe]) -> list[dict]:
    """What is counted of the weights in the second step."""
    results = []
    for recipe in recipes:
        context = ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu")
        engine = make_engine(recipe, context, CPU)
        numbers = Numbers(recipe, engine.assembled, engine.tensors["weights"])
        for step in (1, 2):
            with numbers.seen_in(step):
                engine.step(batches(engine, recipe, seed=step), 1e-3)
        results.append(numbers.record["blocks"])
    return results


@pytest.mark.slow
def test_numbers_of_weights_are_counted_where_a_rank_has_parts_of_them():
    options = {"compute": "fp16", "telemetry": {"every": 2}}
    recipes = [small(stage, None, None, **options) for stage in (None, 0, 1, 2, 3)]
    wanted, *found = run_ranks(2, seen_with, recipes)[0]
    for got in found:
        for name in ("weight", "input", "gradient"):
            for kind, of in wanted[name].items():
                assert got[name][kind] == pytest.approx(of, rel=1e-2, abs=1e-3), (name, kind)


NAMES = """
import json, sys
from deepspeed.runtime import config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

seen = set()

class Read(dict):
    def get(self, key, default=None):
        seen.add(key)
        return super().get(key, default)
    def __contains__(self, key):
        seen.add(key)
        return super().__contains__(key)
    def __getitem__(self, key):
        seen.add(key)
        return super().__getitem__(key)
    def keys(self):
        return self

config.DeepSpeedConfig(Read(train_batch_size=1))
zero = "zero_optimization."
for prefix, model in ((zero, DeepSpeedZeroConfig), (zero + "offload_optimizer.", DeepSpeedZeroOffloadOptimizerConfig),
                      (zero + "offload_param.", DeepSpeedZeroOffloadParamConfig)):
    for name, field in model.model_fields.items():
        seen |= {prefix + name, prefix + (field.alias or name)}
print(json.dumps(sorted(seen)))
"""


@pytest.mark.slow
def test_every_setting_that_deepspeed_reads_is_passed_on_or_refused_with_a_reason():
    got = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, check=True)
    names = json.loads(got.stdout.splitlines()[-1])
    assert len(names) > 100
    for name, stage in product(names, (2, 3)):
        offload = "optimizer" if stage == 2 else "parameters"
        engine = ["engine.name=deepspeed", f"engine.zero_stage={stage}", f"engine.offload={offload}"]
        try:
            recipe_of(*engine, f"engine.deepspeed.{name}=true")
        except ConfigError as e:
            assert "no such setting of DeepSpeed" not in str(e), e


def files_of(rank: int, recipe: Recipe) -> dict:
    context = ParallelContext.create(check_layout(recipe, dist.get_world_size()), "cpu")
    engine = make_engine(recipe, context, CPU)
    return {"file": json.loads(engine_files(recipe, engine.assembled)["deepspeed.json"]), "told": engine._engine.config}


@pytest.mark.slow
def test_the_file_of_a_run_says_what_deepspeed_was_told():
    recipe = small(2, {"zero_optimization": {"reduce_bucket_size": 1000}})
    for rank in run_ranks(2, files_of, recipe):
        assert rank["file"] == rank["told"] and rank["file"]["zero_optimization"]["reduce_bucket_size"] == 1000


@pytest.mark.slow
def test_doctor_lets_deepspeed_make_a_step():
    (check,) = [one for one in look_at_machine(CPU) if one.name == "DeepSpeed"]
    assert check.verdict == "PASS" and "made a step in" in check.found, check
