"""Loggers take the same metrics behind one interface; a service that fails never ends a run."""

import json
import logging
import shutil
import sys
import types

import pytest
import torch

from megaresnorm.errors import ConfigError
from megaresnorm.recipe.load import build_recipe
from megaresnorm.telemetry import loggers as module
from megaresnorm.telemetry.throughput import Meter, peak_tflops
from megaresnorm.trainer import train


class FakeWandb(types.ModuleType):
    """What is used of W&B's package; it writes down how."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.rows, self.finished, self.fails = [], [], 0, ""

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

    def finish(self):
        self.finished += 1


class FakeMlflow(types.ModuleType):
    """The same of MLflow's."""

    def __init__(self):
        super().__init__("mlflow")
        self.runs, self.params, self.metrics, self.ended = [], {}, {}, []
        self.MlflowClient = lambda: self
        self.entities = types.ModuleType("mlflow.entities")
        self.entities.Metric = lambda key, value, timestamp, step: (key, value, step)

    def start_run(self, run_name):
        self.runs.append(run_name)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"id{len(self.runs)}"))

    def end_run(self, status):
        pass

    def log_param(self, run, key, value):
        self.params[key] = value

    def log_batch(self, run, metrics):
        self.metrics.setdefault(run, []).extend(metrics)

    def update_run(self, run, status):
        pass

    def set_terminated(self, run):
        self.ended.append(run)


@pytest.fixture
def services(monkeypatch):
    wandb, mlflow = FakeWandb(), FakeMlflow()
    for name, one in {"wandb": wandb, "mlflow": mlflow, "mlflow.entities": mlflow.entities}.items():
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    return wandb, mlflow


def test_all_take_the_same_and_a_resumed_run_goes_on_in_its_own(tiny, services, tmp_path):
    wandb, mlflow = services
    settings = {"loggers": ["wandb", "mlflow"], "eval_every": 2}
    train(tiny(train={**settings, "steps": 3}))
    train(tiny(train={**settings, "steps": 5}))
    assert [row["step"] for row in wandb.rows] == [1, 2, 3, 4, 5] and wandb.finished == 2
    assert len({run["id"] for run in wandb.runs}) == 1 and wandb.runs[0]["resume"] == "allow"
    assert wandb.runs[0]["config"]["model.topology"] == "deepnorm" and wandb.runs[0]["name"] == "run"
    assert mlflow.runs == ["run"] and mlflow.ended == ["id1", "id1"] and mlflow.params["train.steps"] == "3"
    curve = [(step, value) for key, value, step in mlflow.metrics["id1"] if key == "train/loss"]
    assert curve == [(row["step"], row["train/loss"]) for row in wandb.rows]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [value for _, value in curve]
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


def test_one_that_cannot_start_ends_the_run_before_step_0(tiny, services, tmp_path):
    wandb, _ = services
    wandb.fails = "init"
    with pytest.raises(ConfigError, match=r"train\.loggers: wandb cannot start \(No API key configured\.\)"):
        train(tiny(train={"loggers": ["wandb"]}))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_one_that_is_not_installed_is_named(tiny, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
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
