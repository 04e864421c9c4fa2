"""Forward passes of one rank with the run's own loss and dropout; all engines make the same ones."""

import torch
from torch import Tensor, nn

from megaresnorm.data.loader import Batch
from megaresnorm.model.dropout import DropoutKey
from megaresnorm.recipe import Recipe


class Passes:
    """Losses of microbatches.

    Args:
        recipe: resolved.
        device: of the model.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._z_loss, self._seed, self._device = recipe.train.z_loss, recipe.train.seed, device
        self._drops = recipe.model.dropout > 0.0

    def train(self, module: nn.Module, part: Batch, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Sum of a microbatch's losses, and the objective: with z-loss and dropout, times ``scale``."""
        return module(part.tokens, dropout=self.dropout(part), **self.options(part, scale))

    @torch.no_grad()
    def evaluate(self, module: nn.Module, part: Batch) -> Tensor:
        """Sum of a microbatch's losses, without dropout."""
        return module(part.tokens, **self.options(part, 1.0))[0]

    def options(self, part: Batch, scale: float | Tensor) -> dict[str, Tensor | float | None]:
        """What ``Transformer.forward`` is told of a microbatch beside tokens and dropout."""
        return {"documents_BS": part.documents, "labels_BS": part.labels, "z_loss": self._z_loss, "scale": scale}

    def dropout(self, part: Batch) -> DropoutKey | None:
        """What the masks of a microbatch are drawn from; None where nothing is dropped."""
        return DropoutKey.of_samples(self._seed, part.samples, part.tokens.shape[1]) if self._drops else None

    def no_loss(self) -> Tensor:
        """A sum of no losses, FP64."""
        return torch.zeros((), dtype=torch.float64, device=self._device)
