"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, behind one small interface.

A service that cannot be reached costs a warning; it never ends a run. Settings of the services are their own
environment variables (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...).
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from megaresnorm.errors import ConfigError
from megaresnorm.files import replace_file
from megaresnorm.reading import first_line, read_plain_file
from megaresnorm.telemetry.events import EventFile

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WARNINGS = 60.0
IDS = "loggers.json"  # in the run's folder: what the services call this run, so that a resumed one goes on there
MAX_IDS_BYTES = 1 << 16
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
TAGS = {
    "loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "samples": "train/samples",
    "tokens": "train/tokens",
    "lr": "optim/lr",
    "tokens_per_second": "perf/tokens_per_second",
    "seconds": "perf/seconds_per_step",
    "tflops": "perf/tflops_per_rank",
    "mfu": "perf/mfu",
    "peak_memory": "perf/peak_memory_gb",
}


class MetricsLogger(Protocol):
    """What takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step, counted from 1, by their tags."""

    def close(self) -> None:
        """Record what is still waiting, and end."""


def check_loggers(names: Sequence[str]) -> None:
    """Check that what train.loggers names is installed.

    Raises:
        ConfigError: one is not; the line says how to install it.
    """
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"train.loggers: {name} is not installed; install it with: pip install {PACKAGES[name]}")


def open_loggers(names: Sequence[str], folder: Path, first_step: int, settings: Mapping[str, Any]) -> list["_Guarded"]:
    """Start the loggers of a run.

    Args:
        folder: the run's.
        first_step: from which on what an earlier process wrote is void, counted from 1.
        settings: the recipe's, by dotted key, to be shown beside the curves.

    Raises:
        ConfigError: a service refuses to start; the line says why.
        OSError: TensorBoard's files cannot be written.
    """
    found: list[_Guarded] = []
    for name in names:
        if name == "tensorboard":
            found.append(_Guarded(name, EventFile(folder / "tensorboard", first_step, settings)))
            continue
        service = _Wandb if name == "wandb" else _MLflow
        try:
            found.append(_Guarded(name, service(folder, first_step == 1, settings)))
        except Exception as e:  # noqa: BLE001 - of a service's own making, of whatever kind
            raise ConfigError(
                f"train.loggers: {name} cannot start ({first_line(e)}); see its own documentation, or leave it out"
            ) from None
    return found


def tagged(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics by the tags under which curves are grouped.

    >>> tagged({"loss": 1.0, "valid_loss": 2.0, "valid_loss/web": 3.0, "time": 4.0})
    {'train/loss': 1.0, 'valid/loss': 2.0, 'valid/loss/web': 3.0}
    """
    found = {}
    for name, value in metrics.items():
        tag = f"valid/{name.removeprefix('valid_')}" if name.startswith("valid_") else TAGS.get(name)
        if tag is not None:
            found[tag] = value / 1e9 if tag.endswith("_gb") else value
    return found


class _Guarded:
    """A logger whose failures are warnings, at most one a minute."""

    def __init__(self, name: str, logger: MetricsLogger) -> None:
        self._name, self._logger, self._next_warning = name, logger, 0.0

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._logger.write(step, tagged(metrics)))

    def close(self) -> None:
        self._next_warning = 0.0
        self._try(self._logger.close)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as e:  # noqa: BLE001 - whatever a service does, training goes on
            if time.monotonic() >= self._next_warning:
                self._next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
                log.warning("warning: %s does not take metrics (%s); training goes on", self._name, e)


def _run_id(folder: Path, service: str, new: bool, make: Callable[[], str]) -> str:
    """What a service calls this run; made where there is none, or where the run begins anew."""
    try:
        ids = json.loads(read_plain_file(folder / IDS, MAX_IDS_BYTES))
    except (OSError, ValueError):
        ids = {}
    ids = ids if isinstance(ids, dict) else {}
    if new or not isinstance(ids.get(service), str):
        ids[service] = make()
        replace_file(folder / IDS, json.dumps(ids) + "\n")
    return ids[service]


class _Wandb:
    """Weights & Biases: https://docs.wandb.ai/ref/python/init."""

    def __init__(self, folder: Path, new: bool, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            id=_run_id(folder, "wandb", new, lambda: uuid4().hex[:12]),
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=dict(settings),
        )
        # Steps that are done again after a crash would lie before the service's own count, and be dropped.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """MLflow: https://mlflow.org/docs/latest/tracking."""

    BATCH = 50  # steps that are sent together: a call is a transaction or a request

    def __init__(self, folder: Path, new: bool, settings: Mapping[str, Any]) -> None:
        import mlflow
        from mlflow.entities import Metric

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self._waiting: list[Any] = []
        made: list[str] = []

        def make() -> str:
            run = mlflow.start_run(run_name=folder.name)
            mlflow.end_run("RUNNING")
            made.append(run.info.run_id)
            return run.info.run_id

        self._id = _run_id(folder, "mlflow", new, make)
        if made:
            for key, value in settings.items():
                self._client.log_param(self._id, key, str(value)[:500])
        else:
            self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._waiting += [self._metric(name, value, now, step) for name, value in metrics.items()]
        if step % self.BATCH == 0:
            self._send()

    def close(self) -> None:
        self._send()
        self._client.set_terminated(self._id)

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), 1000):  # as many as one call may have
            self._client.log_batch(self._id, metrics=waiting[start : start + 1000])
