"""Depth telemetry of a run: which steps are watched and after which the model is probed, and what becomes of it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megaresnorm.assemble import Assembled
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.depth.alarms import Alarms
from megaresnorm.telemetry.depth.probe import DepthProbe
from megaresnorm.telemetry.depth.records import record_of_probe, record_of_watch
from megaresnorm.telemetry.depth.tensors import TensorNorms
from megaresnorm.telemetry.depth.watch import DepthWatch

log = logging.getLogger(__name__)

OF_WATCH = ("logit_max", "effective_depth", "gradient_ratio")  # that are among a step's metrics as well
OF_PROBE = ("model_update", "mean_path_length")


class Depth:
    """Watches every ``telemetry.every``-th step, and probes after every ``telemetry.probe_every``-th.

    Args:
        norms: of the engine; None where no step is watched.
        probe: None where there is none.

    Attributes:
        records: of the last step, as lines of depth.jsonl.
        metrics: of the last step.
    """

    def __init__(
        self, recipe: Recipe, assembled: Assembled, norms: TensorNorms | None, probe: DepthProbe | None
    ) -> None:
        self._every, self._probe_every = recipe.telemetry.every, recipe.telemetry.probe_every
        self._watch = DepthWatch(recipe.model, assembled, norms) if self._every else None
        self._probe, self._has_probed = probe, False
        self._alarms = Alarms(recipe)
        self.records: list[dict[str, Any]] = []
        self.metrics: dict[str, float | None] = {}

    @contextmanager
    def seen_in(self, step: int, lr: float) -> Iterator[None]:
        """Watch the step that is made within, if it is one of those. Collective.

        Args:
            step: counted from 1.
            lr: the schedule's.

        Communication:
            That of ``DepthWatch.watching``, in a step that is watched.
        """
        self.records, self.metrics = [], {}
        if self._watch is None or step % self._every:
            yield
            return
        with self._watch.watching(lr):
            yield
        figures = self._watch.figures
        assert figures is not None
        self.records.append(record_of_watch(step, figures))
        self.metrics |= {name: figures.whole[name] for name in OF_WATCH}
        self._alarms.watched(step, figures)

    def probe(self, step: int) -> None:
        """Probe the model after a step, if it is one of those. Collective.

        Communication:
            That of ``DepthProbe.probe``, after such a step.
        """
        if self._probe is None or step % self._probe_every:
            return
        record = record_of_probe(step, self._probe.probe(step))
        self.records.append(record)
        self.metrics |= {name: record["whole"][name] for name in OF_PROBE}
        self._alarms.probed(step, record)
        if not self._has_probed:
            self._has_probed = True
            log.info("probe     of depth after step %d took %.1f s", step, record["whole"]["seconds"])
