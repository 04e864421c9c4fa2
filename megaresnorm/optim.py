"""AdamW over groups from the table of parameters, and gradient clipping."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from megaresnorm.model.parameters import ParameterSpec
from megaresnorm.recipe import OptimRecipe


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], table: Mapping[str, ParameterSpec], recipe: OptimRecipe
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with one group for each combination of decay and multipliers in the table."""
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters.items():
        spec = table[name]
        m = spec.multipliers
        decay = recipe.weight_decay * m.weight_decay if spec.decay else 0.0
        group = groups.setdefault(
            (decay, m.lr, m.eps),
            {"params": [], "weight_decay": decay, "eps": recipe.eps * m.eps, "lr_multiplier": m.lr},
        )
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the schedule's rate times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


class GradientClipper:
    """Clips gradients in place: all together by their global norm, or each tensor against its own history (AdaGC).

    AdaGC (arXiv:2502.11034, algorithm 1): the gradient of tensor i may exceed the moving average gamma_i of its own
    clipped norms by ``adagc_ratio``. During its warm-up clipping is global and gamma_i is the smallest norm seen.
    """

    def __init__(self, recipe: OptimRecipe, num_tensors: int) -> None:
        self.recipe = recipe
        self.steps = 0
        self.averages = torch.full((num_tensors,), torch.inf)  # gamma, on the CPU: one number a tensor

    def clip(self, gradients: Sequence[Tensor], norms: Tensor) -> None:
        """gradients: every gradient, in a fixed order.   norms: [n] their L2 norms before clipping."""
        recipe = self.recipe
        if recipe.clip == "none":
            return
        warm = recipe.clip == "adagc" and self.steps >= recipe.adagc_warmup
        norms = norms.float().cpu()
        limit = (
            recipe.adagc_ratio * self.averages if warm else recipe.clip_norm * norms / torch.linalg.vector_norm(norms)
        )
        factors = (limit / norms).clamp(max=1.0).nan_to_num(nan=1.0)  # 0/0: a gradient of zeros needs no clipping
        if bool((factors < 1.0).any()):
            torch._foreach_mul_(list(gradients), factors.tolist())
        if recipe.clip == "adagc":
            self._remember(norms * factors, warm)

    def _remember(self, clipped: Tensor, warm: bool) -> None:
        """A norm of zero (behind a gate that starts at 0) says nothing of a tensor's scale, and would pin gamma to 0."""
        beta = self.recipe.adagc_beta
        average = beta * self.averages + (1 - beta) * clipped if warm else torch.minimum(self.averages, clipped)
        average = torch.where(self.averages.isinf(), clipped, average)
        self.averages = torch.where(clipped > 0, average, self.averages)
        self.steps += 1


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of every gradient [n]; the norm of all of them together is the norm of this vector."""
    return torch.stack(torch._foreach_norm(list(gradients)))
