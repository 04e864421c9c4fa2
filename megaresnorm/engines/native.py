"""The native engine: plain PyTorch, one optimizer step at a time."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.data.loader import Batch
from megaresnorm.model.residual import DropoutKey
from megaresnorm.optim import GradientClipper, Optimizer, gradient_norms
from megaresnorm.recipe import Recipe


class Decision(Enum):
    """What to do with a step once its gradients are known."""

    APPLY = "apply"
    SKIP = "skip"


@dataclass(frozen=True)
class GradientStats:
    """After every reduction and before the update. loss: mean cross entropy in nats; norm: of all gradients, unclipped."""

    loss: float
    norm: float

    @property
    def finite(self) -> bool:
        return isfinite(self.loss) and isfinite(self.norm)


@dataclass(frozen=True)
class StepStats:
    """One optimizer step. loss: mean cross entropy a token in nats; tokens: valid labels of the global batch."""

    loss: float
    gradient_norm: float
    tokens: int
    applied: bool


class NativeEngine:
    """Owns the model, its optimizer and its clipper."""

    def __init__(self, assembled: Assembled, recipe: Recipe) -> None:
        self.assembled, self.model = assembled, assembled.model
        self._z_loss, self._seed = recipe.train.z_loss, recipe.train.seed
        self._drops = recipe.model.dropout > 0.0
        self._parameters = dict(self.model.named_parameters())
        self._optimizer = Optimizer(self._parameters, assembled.table, recipe.optim)
        self._clips_each = recipe.optim.clip == "adagc"
        self._clipper = GradientClipper(recipe.optim, len(self._parameters))
        self._updates = 0

    def step(self, microbatches: Iterable[Batch], lr: float, accept: Callable[[GradientStats], Decision]) -> StepStats:
        """Accumulate the gradients of one global batch in FP32, ask ``accept``, clip and update.

        The loss is the sum over valid tokens divided by their number in the whole batch, however unequal its microbatches.
        """
        with _no_garbage_collection():
            return self._step(microbatches, lr, accept)

    def _step(self, microbatches: Iterable[Batch], lr: float, accept: Callable[[GradientStats], Decision]) -> StepStats:
        batches = list(microbatches)
        tokens = sum(int((batch.labels >= 0).sum()) for batch in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            nll, objective = self._losses(batch, self._dropout(batch), 1 / max(1, tokens))
            objective.backward()
            loss += nll.detach().cpu()
        gradients = self._optimizer.collect(per_parameter=self._clips_each)
        norms = gradient_norms(gradients)
        stats = GradientStats(loss.item() / max(1, tokens), torch.linalg.vector_norm(norms).item())
        applied = accept(stats) is Decision.APPLY
        if applied:
            self._clipper.clip(gradients, norms)
            self._optimizer.step(lr)
            self._updates += 1
            self.assembled.weights_changed()
        self._optimizer.zero_grad()
        return StepStats(stats.loss, stats.norm, tokens, applied)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean cross entropy a token, in nats, without dropout and z-loss."""
        total, tokens = 0.0, 0
        for batch in batches:
            nll, _ = self._losses(batch, None, 1.0)
            total += nll.item()
            tokens += int((batch.labels >= 0).sum())
        return total / max(1, tokens)

    def state(self) -> dict[str, Any]:
        """What JSON can hold of the engine's state."""
        return {"updates": self._updates, "clipper_steps": self._clipper.steps}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The live tensors of the engine's state, by group and global name: to be saved, or to be copied into."""
        optimizer = {
            f"{key}.{name}": tensor
            for name, p in self._parameters.items()
            for key, tensor in self._optimizer.moments(p).items()
        }
        weights = {name: p.data for name, p in self._parameters.items()}
        return {"weights": weights, "optimizer": {**optimizer, "clipper.averages": self._clipper.averages}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over ``state()`` of the engine whose tensors have been copied into ``tensors()``."""
        self._updates, self._clipper.steps = state["updates"], state["clipper_steps"]
        self._optimizer.set_updates(self._updates)
        self.assembled.weights_changed()

    def weights_digest(self) -> str:
        """SHA-256 of all weights: equal runs have equal digests, where printed losses can hide a difference."""
        digest = hashlib.sha256()
        for name, parameter in self._parameters.items():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _losses(self, batch: Batch, dropout: DropoutKey | None, scale: float) -> tuple[Tensor, Tensor]:
        logits_TV = self.model(batch.tokens, dropout, documents_BS=batch.documents)
        return self.assembled.cross_entropy(logits_TV, batch.labels.flatten(), self._z_loss, scale)

    def _dropout(self, batch: Batch) -> DropoutKey | None:
        if not self._drops:
            return None
        seq_len = batch.tokens.shape[1]
        rows = batch.samples.unsqueeze(1) * seq_len + torch.arange(seq_len, device=batch.samples.device)
        return DropoutKey(self._seed, rows.flatten())


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A step of a deep model makes thousands of small objects, none of them in a cycle; looking for cycles among them, and among
    all that was imported, took 30 of 450 ms at 200 blocks.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
