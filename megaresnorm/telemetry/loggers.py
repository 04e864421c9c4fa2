"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, behind one small interface.

A service takes metrics in a thread of its own: however slow it is, training goes on, and where it fails there is a
warning. Settings of the services are their own environment variables (WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, ...). Both are told the whole recipe, paths included.
"""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from megaresnorm.errors import ConfigError
from megaresnorm.files import replace_file
from megaresnorm.reading import first_line, read_plain_file
from megaresnorm.telemetry.events import SECONDS_BETWEEN_WARNINGS, EventFile

log = logging.getLogger(__name__)

MAX_WAITING = 10_000  # steps that a service may be behind
SECONDS_TO_END = 60.0  # that a service has to take what is waiting when the run has ended
IDS = "loggers.json"  # in the run's folder: what the services call this run, so that a resumed one goes on there
MAX_IDS_BYTES = 1 << 16
TAGS = {
    "loss": "train/loss",
    "gradient_norm": "train/gradient_norm",
    "samples": "train/samples",
    "tokens": "train/tokens",
    "lr": "optim/lr",
    "loss_scale": "optim/loss_scale",
    "skipped": "optim/skipped",
    "saturated": "numbers/saturated",
    "underflown": "numbers/underflown",
    "logit_max": "depth/logit_max",
    "effective_depth": "depth/effective_depth",
    "gradient_ratio": "depth/gradient_ratio",
    "model_update": "depth/model_update",
    "mean_path_length": "depth/mean_path_length",
    "tokens_per_second": "perf/tokens_per_second",
    "seconds": "perf/seconds_per_step",
    "tflops": "perf/tflops_per_rank",
    "mfu": "perf/mfu",
    "peak_memory": "perf/peak_memory_gb",
    "goodput": "perf/goodput",
    "waiting": "perf/waiting_seconds",
    "data": "perf/data_seconds",
    "reruns": "guard/reruns",
    "skips": "guard/skips",
    "rollbacks": "guard/rollbacks",
}


class MetricsLogger(Protocol):
    """What takes the metrics of steps."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of one step, counted from 1, by their tags. A step may come twice, with other metrics."""

    def close(self, code: int = 0) -> None:
        """Record what is still waiting, and end.

        Args:
            code: the run's exit code.
        """


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not, which would take seconds. A mere folder of that name is none.

    >>> installed("json"), installed("no_such_package")
    (True, False)
    """
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def check_loggers(names: Sequence[str]) -> None:
    """Check that what train.loggers names is installed.

    Raises:
        ConfigError: one is not; the line says how to install it.
    """
    for name in names:
        if not installed(name):
            raise ConfigError(f"train.loggers: {name} is not installed; install it with: pip install {name}")


def open_loggers(
    names: Sequence[str], folder: Path, first_step: int, settings: Mapping[str, Any]
) -> list[MetricsLogger]:
    """Start the loggers of a run. A service that does not start again where a run goes on costs a warning.

    Args:
        folder: the run's.
        first_step: where the run begins or goes on, counted from 1.
        settings: the recipe's, by dotted key, to be shown beside the curves.

    Raises:
        ConfigError: a service refuses to start before the first step; the line says why.
        OSError: TensorBoard's files cannot be written.
    """
    found: list[MetricsLogger] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            found.append(EventFile(folder / "tensorboard", first_step, settings))
            continue
        service = _Wandb if name == "wandb" else _MLflow
        try:
            found.append(InBackground(name, service(folder, first_step == 1, settings)))
        except Exception as e:  # noqa: BLE001 - of a service's own making, of whatever kind
            why = f"{name} cannot start ({first_line(e)})"
            if first_step > 1:
                log.warning("warning: %s; the run goes on without it", why)
                continue
            for one in found:
                one.close(1)
            raise ConfigError(f"train.loggers: {why}; see its own documentation, or leave it out") from None
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


class InBackground:
    """A logger behind a thread and a queue, whose failures are warnings, at most one a minute."""

    def __init__(self, name: str, logger: MetricsLogger) -> None:
        self._name, self._logger, self._next_warning = name, logger, 0.0
        self._waiting: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._code = 0
        self._thread = threading.Thread(target=self._take, name=name, daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Leave metrics to the thread."""
        try:
            self._waiting.put_nowait((step, metrics))
        except queue.Full:
            self._warn(f"is {MAX_WAITING:,} steps behind, and does not get this one")

    def close(self, code: int = 0) -> None:
        """Let the thread take what is waiting, for a minute at most."""
        self._code = code
        try:
            self._waiting.put(None, timeout=SECONDS_TO_END)
            self._thread.join(SECONDS_TO_END)
        except queue.Full:
            pass
        if self._thread.is_alive():
            log.warning("warning: %s did not take everything within %.0f s", self._name, SECONDS_TO_END)

    def _take(self) -> None:
        while (taken := self._waiting.get()) is not None:
            self._try(lambda taken=taken: self._logger.write(*taken))  # type: ignore[misc]
        self._try(lambda: self._logger.close(self._code))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as e:  # noqa: BLE001 - whatever a service does, training goes on
            self._warn(f"does not take metrics ({first_line(e)}); training goes on")

    def _warn(self, what: str) -> None:
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + SECONDS_BETWEEN_WARNINGS
            log.warning("warning: %s %s", self._name, what)


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

    def close(self, code: int = 0) -> None:
        self._run.finish(exit_code=code)


class _MLflow:
    """MLflow, by its client alone: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html."""

    PARAMS = 100  # that one call may have

    def __init__(self, folder: Path, new: bool, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

        self._metric, self._client = Metric, MlflowClient()

        def make() -> str:
            name = MLFLOW_EXPERIMENT_NAME.get()
            there = None if name is None else self._client.get_experiment_by_name(name)
            experiment = "0" if name is None else there.experiment_id if there else self._client.create_experiment(name)
            run = self._client.create_run(experiment, run_name=folder.name)
            params = [Param(key, str(value)[:500]) for key, value in settings.items()]
            for start in range(0, len(params), self.PARAMS):
                self._client.log_batch(run.info.run_id, params=params[start : start + self.PARAMS])
            return run.info.run_id

        self._id = _run_id(folder, "mlflow", new, make)
        self._client.update_run(self._id, status="RUNNING")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[self._metric(k, v, now, step) for k, v in metrics.items()])

    def close(self, code: int = 0) -> None:
        self._client.set_terminated(self._id, "FINISHED" if code == 0 else "FAILED" if code < 124 else "KILLED")
