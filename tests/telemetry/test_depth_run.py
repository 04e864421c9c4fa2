"""Depth telemetry of a run: what is written, what is warned of, what is refused."""

import json
from pathlib import Path

import pytest

from megaresnorm.errors import ConfigError, DataError
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.recipe import Recipe
from megaresnorm.run import Run
from megaresnorm.telemetry.depth.alarms import Alarms
from megaresnorm.telemetry.depth.figures import DepthFigures
from megaresnorm.telemetry.depth.records import read_depth
from megaresnorm.telemetry.depth.tensors import CLASSES
from megaresnorm.telemetry.loggers import TAGS
from megaresnorm.trainer import Trainer, train

BY_SUBLAYER = ["stream_rms", "sum_rms", "branch_rms", "branch_ratio", "branch_cosine", "kurtosis"]
BY_BLOCK = ["cosine", "angular_distance", "logit_max", "stream_gradient", "gradient_norm", "update_ratio"]
WHOLE = ["logit_max", "effective_depth", "sublayers_above", "gradient_ratio"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_records_depth_and_goes_on_as_one_that_never_stopped(tiny, tmp_path, caplog):
    """The records of step 6 are of a start that was killed before its checkpoint: they are dropped, and made again."""
    caplog.set_level("INFO")
    settings = {"telemetry": {"every": 2, "probe_every": 3}, "checkpoint": {"every": 4}}
    settings |= {"train": {"micro_batch": 2}, "model": {"dropout": 0.1}}
    train(tiny(**settings))
    run = tmp_path / "run"
    whole = read_depth(run)
    assert [(record["step"], record["kind"]) for record in whole] == [
        (2, "watch"), (3, "probe"), (4, "watch"), (6, "watch"), (6, "probe")
    ]  # fmt: skip
    watched, probed = whole[3], whole[4]
    assert list(watched) == ["schema_version", "step", "kind", "by_sublayer", "by_block", "whole"]
    assert list(watched["by_sublayer"]) == BY_SUBLAYER
    assert all(len(numbers) == 2 * 3 and None not in numbers for numbers in watched["by_sublayer"].values())
    classes = [f"{what}/{kind}" for kind in CLASSES for what in ("gradient_norm", "update_ratio")]
    assert list(watched["by_block"]) == BY_BLOCK + classes
    assert all(len(numbers) == 3 for numbers in watched["by_block"].values())
    assert list(watched["whole"])[:4] == WHOLE
    assert list(probed["by_block"]) == ["attention_entropy", "collapse"]
    assert list(probed["whole"]) == ["model_update", "mean_path_length", "seconds"] and probed["whole"]["seconds"] > 0
    assert list(probed["paths"]) == ["lengths", "log_norms", "shares"] and len(probed["paths"]["shares"]) == 7
    assert whole[1]["whole"]["model_update"] is None and probed["whole"]["model_update"] > 0
    assert sum("probe     of depth" in record.getMessage() for record in caplog.records) == 1
    assert not (run / "numbers.jsonl").exists(), "FP32 loses nothing"
    metrics = lines(run / "metrics.jsonl")
    for name in ("logit_max", "effective_depth", "gradient_ratio"):
        assert metrics[5][name] == pytest.approx(watched["whole"][name], rel=1e-5)
    assert [row["step"] for row in metrics if "mean_path_length" in row] == [3, 6]
    assert {"logit_max", "effective_depth", "gradient_ratio", "model_update", "mean_path_length"} <= TAGS.keys()

    (run / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    train(tiny(**settings))
    again = read_depth(run)
    assert again[:4] == whole[:4], "watched steps that are made again are the same"
    assert again[4]["paths"] == probed["paths"] and again[4]["whole"]["model_update"] is None

    (tmp_path / "other").mkdir()
    settings["train"] |= {"output": str(tmp_path / "other")}
    train(tiny(**settings | {"telemetry": {}}))
    assert not (tmp_path / "other" / "depth.jsonl").exists()
    ends = [next((folder / "checkpoints" / "step-00000006").glob("weights-*")) for folder in (run, tmp_path / "other")]
    assert ends[0].read_bytes() == ends[1].read_bytes(), "neither watching nor probing changes a bit"


@pytest.mark.parametrize("precision", [{"compute": "bf16", "residual_dtype": "bf16"}, {"compute": "fp16"}])
def test_16_bit_runs_record_numbers_and_depth(tiny, tmp_path, precision):
    """In FP16 gradients of the stream have the loss scale divided out."""
    train(tiny(precision=precision, telemetry={"every": 6, "probe_every": 6}))
    found = {record["kind"]: record for record in read_depth(tmp_path / "run")}
    assert (tmp_path / "run" / "numbers.jsonl").exists()
    (tmp_path / "wide").mkdir()
    train(tiny(train={"output": str(tmp_path / "wide")}, telemetry={"every": 6, "probe_every": 6}))
    wide = {record["kind"]: record for record in read_depth(tmp_path / "wide")}
    for name in ("stream_gradient", "logit_max", "gradient_norm", "angular_distance"):
        assert found["watch"]["by_block"][name] == pytest.approx(wide["watch"]["by_block"][name], rel=0.05)
    path = found["probe"]["whole"]["mean_path_length"]
    assert path == pytest.approx(wide["probe"]["whole"]["mean_path_length"], rel=0.05)
    assert found["probe"]["paths"]["log_norms"] == pytest.approx(wide["probe"]["paths"]["log_norms"], abs=0.1)


def test_an_error_in_a_watched_step_leaves_the_model_as_it_was(tiny):
    with Run(tiny(telemetry={"every": 1})) as run:
        trainer = Trainer(run)

        def own_methods() -> list[dict]:
            model = run.engine.model
            objects = (*model.modules(), run.engine.policy)
            return [{k: v for k, v in vars(one).items() if callable(v)} for one in objects]

        before = own_methods()
        with pytest.raises(ArithmeticError), trainer.depth.seen_in(1, 1e-3):
            assert own_methods() != before
            raise ArithmeticError
        assert own_methods() == before and trainer.depth.records == []


def test_what_cannot_be_watched_or_probed_is_refused_in_a_line(tiny):
    for settings, wanted in (
        ({"telemetry": {"probe_every": 5}, "engine": {"name": "deepspeed"}}, "engine.name=native"),
        ({"telemetry": {"probe_every": 5}, "train": {"compile": "blocks"}}, "train.compile=none"),
        ({"telemetry": {"every": 5}, "train": {"compile": "blocks"}}, "train.compile=none"),
    ):
        with pytest.raises(ConfigError, match=wanted) as error:
            tiny(**settings)
        assert "\n" not in str(error.value) and "telemetry." in str(error.value)
    assert tiny(telemetry={"every": 5}, engine={"name": "deepspeed"}).telemetry.every == 5


def test_a_file_that_is_missing_is_said_in_a_line(tmp_path):
    with pytest.raises(DataError, match=r"depth\.jsonl: there is none; set telemetry\.every or telemetry\.probe_every"):
        read_depth(tmp_path)


def figures(recipe: Recipe, **changed) -> DepthFigures:
    """Nothing to warn of, but for what is changed: name=(index, number)."""
    blocks, sites = recipe.model.num_blocks, len(SUBLAYERS) * recipe.model.num_blocks
    by_sublayer: dict = {"branch_ratio": [0.1] * sites, "stream_rms": [1.0] * sites}
    by_block: dict = {"logit_max": [5.0] * blocks}
    whole = {"gradient_ratio": changed.pop("gradient_ratio", 1.0)}
    for name, (index, number) in changed.items():
        (by_sublayer if name in by_sublayer else by_block)[name][index] = number
    return DepthFigures(by_sublayer, by_block, whole, 1.0)


@pytest.mark.parametrize(
    ("sections", "changed", "words"),
    [
        ({"precision": {"compute": "bf16", "residual_dtype": "bf16"}}, {"branch_ratio": (3, 1e-3)},
         ["ffn of block 1", "0.001", "precision.residual_dtype=fp32"]),
        ({}, {"logit_max": (2, 250.0)}, ["block 2", "250", "model.qk_norm=head"]),
        ({}, {"gradient_ratio": 2e4}, ["2e+04", "grows", "model.topology"]),
        ({}, {"gradient_ratio": 1e-5}, ["1e-05", "vanishes", "schedule.warmup_steps"]),
        ({"precision": {"compute": "fp16"}, "model": {"topology": "rezero"}}, {"stream_rms": (4, 80.0)},
         ["attention of block 2", "RMS 80", "precision.compute=bf16"]),
    ],
    ids=["swallowed", "logits", "grows", "vanishes", "fp16"],
)  # fmt: skip
def test_each_alarm_says_once_where_how_much_and_what_to_do(tiny, caplog, sections, changed, words):
    recipe = tiny(**sections)
    alarms = Alarms(recipe)
    alarms.watched(7, figures(recipe))
    assert not caplog.records
    for step in (8, 9):
        alarms.watched(step, figures(recipe, **changed))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("warning: step 8: ") and "\n" not in said and all(word in said for word in words)


def test_alarms_are_still_where_their_cause_is_none(tiny, caplog):
    """A small branch in an FP32 stream, and a learned gate's, which finds its own size."""
    for sections in ({}, {"precision": {"compute": "bf16", "residual_dtype": "bf16"}, "model": {"topology": "rezero"}}):
        recipe = tiny(**sections)
        Alarms(recipe).watched(1, figures(recipe, branch_ratio=(3, 1e-5)))
    assert not caplog.records


def test_collapsed_tokens_are_said_once(tiny, caplog):
    alarms = Alarms(tiny())
    for step, collapse in ((1, [0.5, None, 0.01]), (2, [0.5, 1e-4, 0.01]), (3, [0.5, 1e-4, 0.01])):
        alarms.probed(step, {"by_block": {"collapse": collapse}})
    (said,) = [record.getMessage() for record in caplog.records]
    assert "step 2: after block 1" in said and "0.0001" in said and "optim.lr" in said
