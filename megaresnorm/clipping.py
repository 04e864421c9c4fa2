"""Gradient clipping: all gradients together, or each tensor against its own history."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaresnorm.recipe import OptimRecipe


class GradientClipper:
    """Clips gradients: all together by their global norm, or each tensor against its own history (AdaGC).

    With AdaGC the gradient of tensor i may exceed the moving average gamma_i of its own clipped norms by
    ``adagc_ratio``. During its warm-up clipping is global, and gamma_i is the smallest norm seen.

    Args:
        recipe: the kind of clipping and its settings.
        num_tensors: number of gradients.
        device: of the gradients.

    Attributes:
        steps: steps that the averages have seen. The caller counts them, since only it learns whether one was refused.
        averages: gamma, [num_tensors].

    Source:
        AdaGC, arXiv:2502.11034, algorithm 1.
    """

    def __init__(self, recipe: OptimRecipe, num_tensors: int, device: str | torch.device = "cpu") -> None:
        self.recipe = recipe
        self.steps = 0
        self.averages = torch.full((num_tensors,), torch.inf, device=device)

    @property
    def clips_each(self) -> bool:
        """Whether each tensor is clipped against its own history."""
        return self.recipe.clip == "adagc"

    def divisor(self, total: Tensor) -> Tensor | None:
        """The number FP64 to divide all gradients by under ``clip: global``, at least 1; None for other clipping.

        Args:
            total: norm of all gradients of all ranks, a number FP64.
        """
        if self.recipe.clip != "global":
            return None
        return (total / self.recipe.clip_norm).clamp(min=1.0)

    def clip_each(
        self, gradients: Sequence[Tensor], norms: Tensor, total: Tensor, refused: Tensor | None = None
    ) -> None:
        """Clip each gradient in place, and remember its norm unless the step is refused.

        Args:
            gradients: every gradient, in a fixed order; they may be in host memory.
            norms: [n] FP64, their L2 norms before clipping; of whole tensors where they are sharded over ranks.
            total: as in ``divisor``.
            refused: as in ``AdamW.update``.
        """
        warm = self.steps >= self.recipe.adagc_warmup
        limit = self.recipe.adagc_ratio * self.averages if warm else self.recipe.clip_norm * norms / total
        factors = (limit / norms).clamp(max=1.0).nan_to_num(nan=1.0)  # 0/0: a gradient of zeros needs no clipping
        torch._foreach_mul_(list(gradients), list(factors.to(gradients[0].device).unbind()))
        clipped = norms * factors
        beta = self.recipe.adagc_beta
        average = beta * self.averages + (1 - beta) * clipped if warm else torch.minimum(self.averages, clipped)
        average = torch.where(self.averages.isinf(), clipped, average)
        # A norm of zero (behind a gate that starts at 0) says nothing about a tensor's scale, and would pin gamma to 0.
        keeps = clipped <= 0 if refused is None else (clipped <= 0) | (refused > 0)
        self.averages.copy_(torch.where(keeps, self.averages, average))
