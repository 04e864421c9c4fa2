"""A digest of all whole weights, the same in whatever layout they are."""

import hashlib
from pathlib import Path

import torch

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.engines.native import NativeEngine


def engine_digest(engine: NativeEngine) -> str:
    """Of a run's weights as they are now. All ranks must call it."""
    return _digest(dict(engine.full_state().items()))


def checkpoint_digest(folder: Path) -> str:
    checkpoint = Checkpoint(folder)
    return _digest({name: checkpoint.read("weights", name) for name in checkpoint.names("weights")})


def _digest(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
