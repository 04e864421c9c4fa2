"""Checks before step 0 that a run will be able to write."""

import logging
import os
import tempfile
from pathlib import Path

from megaresnorm.checkpoint.format import human_bytes, list_checkpoints
from megaresnorm.checkpoint.writer import free_bytes, sweep
from megaresnorm.errors import TrainingError

log = logging.getLogger(__name__)


def check_output(root: Path, num_bytes: int, keep: int) -> None:
    """Check that checkpoints can be written; warns where there is room for fewer than there will be at times.

    Args:
        root: the folder of checkpoints. It is made, and swept of unfinished ones.
        num_bytes: size of a checkpoint's tensors.
        keep: how many checkpoints stay; while a new one is written, there is one more.

    Raises:
        TrainingError: nothing can be written, or there is no room for even one checkpoint.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".probe-") as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
        free = free_bytes(root)
    except OSError as e:
        raise TrainingError(f"train.output: {root} cannot be written ({e.strerror})") from None
    need = f"need {human_bytes(num_bytes)} for a checkpoint, have {human_bytes(free)} in {root}"
    if free < num_bytes:
        raise TrainingError(f"no space: {need}; make room, or use another train.output")
    missing = keep + 1 - len(list_checkpoints(root))
    if free < missing * num_bytes:
        log.warning(
            "warning: %s, and there will be %d at times (checkpoint.keep=%d and a new one)", need, keep + 1, keep
        )
