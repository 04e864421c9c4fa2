"""Metrics of every step as JSON lines, and for TensorBoard."""

import json
import os
from math import isfinite
from pathlib import Path


class MetricsWriter:
    """Appends to ``folder/metrics.jsonl`` and, if asked, writes TensorBoard files to ``folder/tensorboard``.

    ``first_step``: where the run starts or resumes; what an earlier process wrote from there on is dropped, since those steps
    are about to be done again.
    """

    def __init__(self, folder: Path, *, first_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines(keepends=True) if _step_of(line) < first_step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)
        self._file = self.path.open("a")
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of one step; the step itself is counted from 0."""
        finite = {name: value if isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _step_of(line: str) -> float:
    """The step of a line; a line torn by a crash counts as the end of time."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
