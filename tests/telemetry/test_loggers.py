"""Loggers take the same metrics behind one interface; a service that fails never ends a run."""

import json
import logging
import shutil
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.recipe.load import build_recipe
from megaresnorm.run import Run
from megaresnorm.telemetry import loggers as module
from megaresnorm.telemetry.throughput import Meter, peak_tflops
from megaresnorm.trainer import train


class FakeWandb(types.ModuleType):
    """What is used of W&B's package; it writes down how."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.rows, self.codes, self.finished, self.fails = [], [], [], 0, ""

    def init(self, **settings):
        if self.fails == "init":
            raise RuntimeError("No API key configured.\nUse `wandb login`")
        self.runs.append(settings)
        return self

    def define_metric(self, *arguments, **settings):
        pass

    def log(self, row):
        if self.fails == "log":
            raise ConnectionError("network is gone")
        self.rows.append(row)

    def finish(self, exit_code):
        self.finished += 1
        self.codes.append(exit_code)


class FakeMlflow(types.ModuleType):
    """The same of MLflow's client."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.params, self.metrics, self.ended, self.fails = [], {}, {}, [], ""
        self.MlflowClient = lambda: self
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: (key, value, step)
        self.entities.Param = lambda key, value: (key, value)
        self.environment_variables = types.ModuleType("mlflow.environment_variables")
        self.environment_variables.MLFLOW_EXPERIMENT_NAME = types.SimpleNamespace(get=lambda: "mine")

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return f"experiment of {name}"

    def create_run(self, experiment, run_name):
        self.runs.append((experiment, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.runs)}"))

    def log_batch(self, run, metrics=(), params=()):
        if self.fails == "log" and metrics:
            raise ConnectionError("no answer")
        assert len(params) <= 100
        self.params.update(params)
        self.metrics.setdefault(run, []).extend(metrics)

    def update_run(self, run, status):
        pass

    def set_terminated(self, run, status):
        self.ended.append((run, status))


@pytest.fixture
def services(monkeypatch):
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for one in (wandb, mlflow, mlflow.entities, mlflow.environment_variables):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    monkeypatch.setattr(module, "installed", lambda name: True)
    return wandb, mlflow


def test_all_take_the_same_and_a_resumed_run_goes_on_in_its_own(tiny, services, tmp_path):
    wandb, mlflow = services
    settings = {"loggers": ["wandb", "mlflow"], "eval_every": 2}
    train(tiny(train={**settings, "steps": 3}))
    train(tiny(train={**settings, "steps": 5}))
    rows = [row for row in wandb.rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and wandb.finished == 2
    assert len({run["id"] for run in wandb.runs}) == 1 and wandb.runs[0]["resume"] == "allow"
    assert wandb.runs[0]["config"]["model.topology"] == "deepnorm" and wandb.runs[0]["name"] == "run"
    assert mlflow.runs == [("experiment of mine", "run")] and mlflow.params["train.steps"] == "3"
    assert mlflow.ended == [("id1", "FINISHED")] * 2 and wandb.codes == [0, 0]
    curve = [(step, value) for key, value, step in mlflow.metrics["id1"] if key == "train/loss"]
    assert curve == [(row["step"], row["train/loss"]) for row in rows]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [value for _, value in curve]
    assert [line["step"] for line in lines if "valid_loss" in line] == [2, 3, 4, 5], "once for a step"
    assert [row["step"] for row in wandb.rows if "valid/loss" in row] == [2, 3, 4, 5]


def test_a_run_that_begins_anew_is_another_one(tiny, services, tmp_path):
    wandb, _ = services
    for _ in range(2):
        train(tiny(train={"loggers": ["wandb"], "steps": 1}))
        shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert len({run["id"] for run in wandb.runs}) == 2


def test_a_service_that_fails_on_the_way_costs_a_warning(tiny, services, caplog):
    wandb, _ = services
    wandb.fails = "log"
    with caplog.at_level(logging.WARNING):
        assert train(tiny(train={"loggers": ["wandb"]})).steps == 6
    said = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert said == ["warning: wandb does not take metrics (network is gone); training goes on"], "one a minute"


def test_metrics_that_a_service_takes_late_or_not_at_all_hold_nothing_up(tiny, services, caplog, monkeypatch):
    wandb, mlflow = services
    mlflow.fails = "log"
    monkeypatch.setattr(wandb, "log", lambda row: time.sleep(60))
    monkeypatch.setattr(module, "SECONDS_TO_END", 0.2)
    start = time.monotonic()
    assert train(tiny(train={"loggers": ["wandb", "mlflow"]})).steps == 6
    assert time.monotonic() - start < 20
    assert "wandb did not take everything within 0 s" in caplog.text
    assert "mlflow does not take metrics (no answer)" in caplog.text and mlflow.ended == [("id1", "FINISHED")]


def test_a_run_that_goes_on_does_so_without_a_service_that_is_down(tiny, services, caplog):
    wandb, _ = services
    train(tiny(train={"loggers": ["wandb"], "steps": 2}))
    wandb.fails = "init"
    assert train(tiny(train={"loggers": ["wandb"], "steps": 4})).steps == 4
    assert "wandb cannot start (No API key configured.); the run goes on without it" in caplog.text


def test_the_last_checkpoint_is_saved_before_services_are_told_and_the_model_is_evaluated(tiny, services, monkeypatch):
    wandb, mlflow = services
    there = []
    recipe = tiny(train={"loggers": ["wandb", "mlflow"], "eval_every": 0}, checkpoint={"every": 0})
    folder = Path(recipe.train.output) / "checkpoints"
    monkeypatch.setattr(wandb, "finish", lambda exit_code: there.append((exit_code, len(list(folder.glob("step-*"))))))

    def evaluate(self):
        there.append(("evaluating", len(list(folder.glob("step-*")))))
        raise MemoryError

    monkeypatch.setattr(Run, "evaluate", evaluate)
    with pytest.raises(MemoryError):
        train(recipe)
    assert there == [("evaluating", 1), (1, 1)] and mlflow.ended == [("id1", "FAILED")]


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "strange_service").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not module.installed("strange_service") and module.installed("torch")


def test_one_that_cannot_start_ends_the_run_before_step_0(tiny, services, tmp_path):
    wandb, _ = services
    wandb.fails = "init"
    with pytest.raises(ConfigError, match=r"train\.loggers: wandb cannot start \(No API key configured\.\)"):
        train(tiny(train={"loggers": ["wandb"]}))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_one_that_is_not_installed_is_named(tiny, monkeypatch):
    monkeypatch.setattr(module, "installed", lambda name: False)
    with pytest.raises(ConfigError, match="mlflow is not installed; install it with: pip install mlflow"):
        train(tiny(train={"loggers": ["mlflow"]}))


def test_the_old_setting_is_read(tiny):
    values = tiny().model_dump(exclude_none=True)
    rest = {key: value for key, value in values["train"].items() if key != "loggers"}
    for old, new in ((True, ["tensorboard"]), (False, [])):
        assert build_recipe(values | {"train": rest | {"tensorboard": old}}).train.loggers == new


def test_real_services_take_them(tiny, tmp_path, monkeypatch):
    """Where they are installed: W&B without network, MLflow in a file."""
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for steps in (3, 5):
        train(tiny(train={"loggers": ["wandb", "mlflow"], "steps": steps}))
    identity = json.loads((tmp_path / "run" / "loggers.json").read_text())
    history = mlflow.MlflowClient().get_metric_history(identity["mlflow"], "train/loss")
    assert [one.step for one in history] == [1, 2, 3, 4, 5]
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity['wandb']}"))


def test_speeds_are_means_since_the_last_line():
    meter = Meter(flops=10**9, num_ranks=2, device=torch.device("cpu"), peak=2.0)
    first, second = meter.step(100, 128, 0.5), meter.step(100, 128, 1.5)
    assert first["tokens_per_second"] == 200 and first["seconds"] == 0.5
    assert first["tflops"] == pytest.approx(10**9 * 128 / 0.5 / 2 / 1e12) and first["mfu"] == first["tflops"] / 2.0
    assert second["peak_memory"] >= first["peak_memory"] > 10**7
    mean = meter.mean()
    assert mean["tokens_per_second"] == 100 and mean["seconds"] == 1.0 and mean["tflops"] == 10**9 * 256 / 2 / 2 / 1e12
    assert meter.step(50, 64, 0.1) and meter.mean()["tokens_per_second"] == pytest.approx(500)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA RTX 9999", None),
    ],
)
def test_peaks_are_those_of_the_gpu_at_hand(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda", 0)
    assert peak_tflops(cuda, "bf16") == peak
    assert peak_tflops(cuda, "fp32") is None and peak_tflops(torch.device("cpu"), "bf16") is None
