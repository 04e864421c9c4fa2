"""What DeepSpeed cannot do is refused with the recipe, in one line; its JSON is generated from the recipe."""

import json
import re
from pathlib import Path

import pytest

from megaresnorm import packages
from megaresnorm.assemble import build_model
from megaresnorm.checkpoint import resume
from megaresnorm.engines.deepspeed_config import deepspeed_config
from megaresnorm.errors import ConfigError
from megaresnorm.layout import check_execution
from megaresnorm.model import compiled
from megaresnorm.opening import open_recipe
from megaresnorm.parallel.mesh import Axis, Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.deepspeed import CommsLogger, ZeroOptimization
from megaresnorm.recipe.load import apply_override, build_recipe, dump_recipe, read_yaml
from megaresnorm.resilience.output import OutputFolder
from megaresnorm.trainer import train

ROOT = Path(__file__).parents[1]
DEEPSPEED = "engine.name=deepspeed"
ZERO = "engine.deepspeed.zero_optimization"


def recipe_of(*overrides: str) -> Recipe:
    values: dict = {
        "model": {"dim": 64, "num_blocks": 2, "num_heads": 4, "seq_len": 16, "vocab_size": 32},
        "data": {"path": "no such data"},
        "train": {"output": "o", "steps": 10, "global_batch": 8},
    }
    for override in overrides:
        apply_override(values, override)
    return build_recipe(values)


def told(*overrides: str, pin: bool = False) -> dict:
    return deepspeed_config(recipe_of(DEEPSPEED, *overrides), data_ranks=2, pin=pin)


# (overrides, parts of the line)
NATIVE = [
    (
        ["engine.zero_stage=2"],
        ["engine.zero_stage=2 has no effect with engine.name=native; set engine.name=deepspeed, or engine='{name: nat"],
    ),
    (["engine.offload=optimizer"], ["engine.offload=optimizer has no effect with engine.name=native"]),
    (
        [f"{ZERO}.reduce_bucket_size=5e8"],
        [f"{ZERO}.reduce_bucket_size=500000000 has no effect with engine.name=native"],
    ),
    (["engine.deepspeed.dump_state=true"], ["engine.deepspeed.dump_state=true has no effect with engine.name=native"]),
]
OTHER_SECTIONS = [
    (["parallel.pp=2"], ["parallel.pp=2 does not go with", "PipelineModule", "engine.name=native, or parallel.pp=1"]),
    (["parallel.dp_shard=2"], ["parallel.dp_shard=2 does not go with", "parallel.dp_shard=1", "engine.zero_stage=3"]),
    (["parallel.reshard_after_forward=false"], ["parallel.reshard_after_forward", "no effect with engine.name=deeps"]),
    (["parallel.accumulate=unsharded"], ["parallel.accumulate=unsharded has no effect"]),
    (["precision.compute=fp64"], ["precision.compute=fp64", "master weights are FP32; use engine.name=native"]),
    (["precision.compute=fp8"], ["precision.compute=fp8", "codes of weights", "or precision.compute=bf16"]),
    (["precision.compute=bf16", "precision.weights=bf16"], ["precision.weights=bf16", "or precision.weights=fp32"]),
    (["train.compile=cuda_graphs"], ["train.compile=cuda_graphs", "hooks", "train.compile=blocks with"]),
    (["train.compile=blocks", "engine.zero_stage=3"], ["train.compile=blocks", "engine.zero_stage=3", "compile=none"]),
    (["engine.offload=optimizer", "engine.zero_stage=0"], ["engine.offload=optimizer needs engine.zero_stage=1, 2 or"]),
    (
        ["engine.offload=parameters", "engine.zero_stage=2"],
        ["engine.offload=parameters needs engine.zero_stage=3, not"],
    ),
    (["engine.zero_stage=4"], ["engine.zero_stage=4: wanted less than or equal to 3"]),
]
DECIDED = [  # by the recipe, or by nobody
    ("zero_optimization.stage=2", "is set by engine.zero_stage; remove it"),
    ("zero_optimization.offload_optimizer.device=cpu", "is set by engine.offload; remove it"),
    ("zero_optimization.offload_param.device=cpu", "is set by engine.offload; remove it"),
    ("zero_optimization.offload_param.nvme_path=/x", "nothing is offloaded to disk"),
    ("zero_optimization.zenflow={}", "changes results"),
    ("zero_optimization.round_robin_gradients=true", "does not follow it"),
    ("zero_optimization.contiguous_gradients=false", "always on"),
    ("zero_optimization.zero_quantized_gradients=true", "nothing is quantized"),
    ("zero_optimization.zero_hpz_partition_size=8", "nearest is parallel.dp_shard"),
    ("train_batch_size=8", "is set by train.global_batch; remove it"),
    ("train_micro_batch_size_per_gpu=8", "is set by train.micro_batch; remove it"),
    ("gradient_accumulation_steps=8", "set train.global_batch and train.micro_batch"),
    ("gradient_clipping=1.0", "is set by optim.clip_norm; remove it"),
    ("bf16={enabled: true}", "is set by precision.compute; remove it"),
    ("fp16.enabled=true", "is set by precision.compute; remove it"),
    ("torch_autocast.enabled=true", "is set by precision.compute; remove it"),
    ("optimizer.type=Adam", "the only optimizer is AdamW"),
    ("scheduler.type=WarmupLR", "is set by schedule.kind; remove it"),
    ("communication_data_type=bf16", "gradients are sent in FP32"),
    ("data_types.grad_accum_dtype=bf16", "summed in FP32"),
    ("tensor_parallel.autotp_size=2", "is set by parallel.tp; remove it"),
    ("pipeline.stages=2", "is set by parallel.pp; remove it"),
    ("activation_checkpointing.cpu_checkpointing=true", "is set by recompute.policy; remove it"),
    ("compile.deepcompile=true", "is set by train.compile; remove it"),
    ("checkpoint.tag_validation=Fail", "never by DeepSpeed"),
    ("curriculum_learning.enabled=true", "there is no curriculum"),
]
UNKNOWN = [
    ("zero_optimization.reduce_buket_size=1", f"did you mean {ZERO}.reduce_bucket_size?"),
    ("zero_optimization.stage3_prefetch_bucket_sise=1", f"did you mean {ZERO}.stage3_prefetch_bucket_size?"),
    ("reduce_bucket_size=1", f"did you mean {ZERO}.reduce_bucket_size?"),
    ("zero_optimisation.stage=1", "did you mean engine.deepspeed.zero_optimization?"),
    ("gradient_cliping=1.0", "gradient_clipping is set by optim.clip_norm; remove it"),
    ("frobnicate=1", "these are: zero_optimization, wall_clock_breakdown, memory_breakdown, dump_state, comms_logger"),
    ("comms_logger.frobnicate=1", "these are: enabled, verbose, prof_all, prof_ops, debug"),
]
VALUES = [
    ("zero_optimization.reduce_bucket_size=0", "=0: wanted greater than or equal to 1"),
    ("zero_optimization.reduce_bucket_size=1.5", "=1.5: wanted integer, got a float"),
    ("zero_optimization.reduce_bucket_size=auto", "='auto': wanted integer, got a str"),
    ("zero_optimization.reduce_bucket_size=5e12", "wanted less than or equal to 2147483648"),
    ("zero_optimization.overlap_comm=1", "=1: wanted boolean, true or false"),
    ("zero_optimization=2", "wanted a section with keys, got a int"),
    ("comms_logger.enabled=true", "no effect without enabled: true and verbose: true"),
    (
        "comms_logger={enabled: true, verbose: true, prof_ops: [all_reduce]}",
        "prof_ops has no effect without prof_all: false",
    ),
    ("log_level=loud", "wanted one of debug, info, warning, error"),
]
IGNORED = [  # (overrides, the setting of DeepSpeed's, under which other it has no effect)
    (["engine.zero_stage=0"], "zero_optimization.overlap_comm=true", "engine.zero_stage=0"),
    (["engine.zero_stage=2"], "zero_optimization.stage3_max_live_parameters=1", "engine.zero_stage=2"),
    (["engine.zero_stage=2"], "zero_optimization.sub_group_size=8", "engine.zero_stage=2"),
    (["engine.zero_stage=3"], "zero_optimization.parameter_alignment=true", "engine.zero_stage=3"),
    (["engine.zero_stage=3"], "zero_optimization.use_multi_rank_bucket_allreduce=false", "engine.zero_stage=3"),
    ([f"{ZERO}.reduce_scatter=false"], "zero_optimization.use_multi_rank_bucket_allreduce=false",
     f"{ZERO}.reduce_scatter=false"),
    ([], "zero_optimization.offload_optimizer.pin_memory=true", "engine.offload=none"),
    (["engine.offload=optimizer"], "zero_optimization.offload_param.pin_memory=false", "engine.offload=optimizer"),
    (["engine.zero_stage=3", "engine.offload=optimizer"], "zero_optimization.offload_param.pin_memory=false",
     "engine.offload=optimizer"),
    (["engine.deepspeed.log_level=error"], "dump_state=true", "engine.deepspeed.log_level=error"),
]  # fmt: skip
PASSED = {  # every setting that is passed on -> a value; the stages that read it
    "reduce_bucket_size": (100, (1, 2, 3)),
    "reduce_scatter": (False, (1, 2, 3)),
    "use_multi_rank_bucket_allreduce": (False, (1, 2)),
    "overlap_comm": (True, (1, 2, 3)),
    "parameter_alignment": (True, (1, 2)),
    "sub_group_size": (100, (3,)),
    "stage3_max_live_parameters": (100, (3,)),
    "stage3_max_reuse_distance": (0, (3,)),
    "stage3_prefetch_bucket_size": (0, (3,)),
    "stage3_param_persistence_threshold": (0, (3,)),
    "stage3_model_persistence_threshold": (50, (3,)),
    "stage3_use_all_reduce_for_fetch_params": (True, (3,)),
    "stage3_allgather_sequential": (True, (3,)),
}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        *NATIVE,
        *[([DEEPSPEED, *overrides], parts) for overrides, parts in OTHER_SECTIONS],
        *[([DEEPSPEED, f"engine.deepspeed.{one}"], [f"engine.deepspeed.{one.split('=')[0].split('.')[0]}", why])
          for one, why in [*DECIDED, *UNKNOWN, *VALUES]],
        *[([DEEPSPEED, *others, f"engine.deepspeed.{one}"], [f"engine.deepspeed.{one} has no effect with {why};"])
          for others, one, why in IGNORED],
    ],
    ids=lambda value: " ".join(value)[-80:],
)  # fmt: skip
def test_what_deepspeed_cannot_do_or_would_ignore_costs_one_line(overrides, parts):
    with pytest.raises(ConfigError) as refused:
        recipe_of(*overrides)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 600
    assert all(part in line for part in parts), line


def test_compiled_blocks_go_with_stages_that_leave_weights_whole():
    for stage in (0, 1, 2):
        assert recipe_of(DEEPSPEED, f"engine.zero_stage={stage}", "train.compile=blocks").train.compile == "blocks"


def test_auto_compiles_nothing_where_weights_are_gathered_by_hooks(monkeypatch):
    monkeypatch.setattr(compiled, "_cannot_generate", lambda device_type: "asked last, if nothing else is against it")
    reasons = {False: "asked last", True: "hooks that gather weights"}
    for gathers, reason in reasons.items():
        built = build_model(recipe_of().model, compiled="auto", shards_later=gathers)
        assert built.compiled == "none" and reason in built.kernel_choices["compile"]


def test_pinned_memory_is_refused_on_a_cpu():
    recipe = recipe_of(DEEPSPEED, "engine.offload=optimizer", f"{ZERO}.offload_optimizer.pin_memory=true")
    check_execution(recipe, Sizes(1, 1, 1, 1), "cuda")
    with pytest.raises(ConfigError, match=rf"{ZERO}.offload_optimizer.pin_memory=true has no effect on a CPU"):
        check_execution(recipe, Sizes(1, 1, 1, 1), "cpu")


def test_the_json_shards_and_offloads_what_the_recipe_says():
    for stage in range(4):
        zero = told(f"engine.zero_stage={stage}")["zero_optimization"]
        assert zero["stage"] == stage and not {"offload_optimizer", "offload_param"} & zero.keys()
        assert zero.get("overlap_comm") is (None if stage == 0 else False)
    for stage, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")):
        for pin in (False, True):
            zero = told(f"engine.zero_stage={stage}", f"engine.offload={offload}", pin=pin)["zero_optimization"]
            assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": pin}
            assert zero.get("offload_param") == (zero["offload_optimizer"] if offload == "parameters" else None)


def test_the_json_leaves_all_that_decides_on_a_step_to_us():
    for stage in range(4):
        for compute in ("fp32", "bf16", "fp16"):
            config = told(f"engine.zero_stage={stage}", f"precision.compute={compute}", "optim.clip_norm=0.5")
            assert config["gradient_clipping"] == 0.0 and config["communication_data_type"] == "fp32"
            assert not {"bf16", "fp16", "torch_autocast", "optimizer", "scheduler", "checkpoint"} & config.keys()
    assert told("train.micro_batch=2")["train_micro_batch_size_per_gpu"] == 2
    assert told()["train_micro_batch_size_per_gpu"] == 4 and told()["gradient_accumulation_steps"] == 1


def test_every_setting_that_is_passed_on_stands_in_the_json_beside_ours():
    fields = set(ZeroOptimization.model_fields) - {"offload_optimizer", "offload_param"}
    assert fields == set(PASSED)
    for name, (value, stages) in PASSED.items():
        for stage in stages:
            plain = told(f"engine.zero_stage={stage}")
            config = told(f"engine.zero_stage={stage}", f"{ZERO}.{name}={json.dumps(value)}")
            assert config["zero_optimization"] == plain["zero_optimization"] | {name: value}
            assert type(config["zero_optimization"][name]) is type(value)
    pinned = told("engine.offload=optimizer", f"{ZERO}.offload_optimizer.pin_memory=false", pin=True)
    assert pinned["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


def test_lines_that_are_asked_for_are_said():
    assert "log_level" not in told() and "log_level" not in told("engine.deepspeed.wall_clock_breakdown=true")
    assert told("engine.deepspeed.dump_state=true")["log_level"] == "info"
    logger = "engine.deepspeed.comms_logger={enabled: true, verbose: true, prof_ops: [all_reduce], prof_all: false}"
    assert told(logger)["log_level"] == "info"
    assert told(logger, "engine.deepspeed.log_level=debug")["log_level"] == "debug"
    assert told(logger)["comms_logger"] == CommsLogger(
        enabled=True, verbose=True, prof_ops=["all_reduce"], prof_all=False
    ).model_dump(exclude_none=True)


def test_what_a_stage_does_not_read_is_not_in_the_json():
    for stage in range(4):
        zero = told(f"engine.zero_stage={stage}")["zero_optimization"]
        assert any(name.startswith("stage3_") for name in zero) == (stage == 3)
        assert ("reduce_bucket_size" in zero) == (stage > 0)


def test_quiet_lines_are_refused_with_both_settings():
    with pytest.raises(ConfigError, match=r"dump_state=true has no effect with .*log_level=error; remove one of them"):
        recipe_of(DEEPSPEED, "engine.deepspeed.dump_state=true", "engine.deepspeed.log_level=error")


def test_a_run_says_what_it_was_computed_with(monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: f"the {package}")
    assert packages.versions_of_run("deepspeed") == packages.versions_of_run("native") | {"deepspeed": "the deepspeed"}
    monkeypatch.setattr(packages, "version_of", lambda package: "0.19.99")
    assert packages.untested("0.19.99") == "DeepSpeed 0.19.99 is newer than 0.19.8, the newest one that was tested"


def test_a_change_of_engine_is_warned_of_in_one_line(tiny, caplog):
    before = tiny(model={"vocab_size": 257}, engine={"name": "deepspeed", "zero_stage": 3})
    train(tiny(train={"steps": 1}))
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "recipe_of", lambda *_: before)
        train(tiny(train={"steps": 2}))
    told = [record.getMessage() for record in caplog.records if "from now on" in record.getMessage()]
    assert [line for line in told if "engine." in line] == [
        'warning: engine.name was "deepspeed" up to step 1 and is "native" from now on'
    ]


def test_a_number_of_elements_may_be_written_as_deepspeed_writes_it():
    assert told(f"{ZERO}.reduce_bucket_size=5e8")["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_settings_of_deepspeed_survive_a_recipe_file():
    recipe = recipe_of(
        DEEPSPEED, "engine.zero_stage=3", f"{ZERO}.overlap_comm=true", "engine.deepspeed.dump_state=true"
    )
    for full in (True, False):
        assert build_recipe(read_yaml(dump_recipe(recipe, full=full))) == recipe
    assert "deepspeed: {}" in dump_recipe(recipe_of())  # nothing of it under the native engine


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        (None, ["engine.name=deepspeed: DeepSpeed is not installed; pip install 'deepspeed>=0.19.7,<0.20'"]),
        ("0.17.6", ["DeepSpeed 0.17.6 is installed, >=0.19.7,<0.20 is supported", "pip install", "engine.name=native"]),
        ("0.19.6", ["DeepSpeed 0.19.6 is installed"]),
        ("0.20.0", ["DeepSpeed 0.20.0 is installed"]),
    ],
)
def test_a_missing_or_untested_deepspeed_is_an_error_before_data_are_opened(version, parts, monkeypatch):
    monkeypatch.setattr(packages, "version_of", lambda package: version)
    with pytest.raises(ConfigError) as refused:
        open_recipe(lambda: recipe_of(DEEPSPEED))
    line = str(refused.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_the_versions_that_were_tested_are_those_of_the_extra():
    extra = re.search(r'^deepspeed = \["deepspeed(.*)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert extra is not None and extra[1] == packages.DEEPSPEED
    for version, supported in {"0.19.8": True, "0.19.9+local": True, "0.20.0": False, "unknown": False}.items():
        assert packages.is_supported(version) == supported, version
    pinned = re.search(r"^deepspeed==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == packages.NEWEST_TESTED


def test_a_run_that_leaves_deepspeed_leaves_no_file_that_says_otherwise(tmp_path):
    folder = OutputFolder(tmp_path, Axis("control"), None)
    folder.prepare({"recipe.yaml": "a", "deepspeed.json": "{}"}, {}, 2)
    assert (tmp_path / "deepspeed.json").read_text() == "{}"
    folder.prepare({"recipe.yaml": "b", "deepspeed.json": None}, {}, 2)
    assert not (tmp_path / "deepspeed.json").exists() and (tmp_path / "recipe.yaml").read_text() == "b"
    folder.release()
