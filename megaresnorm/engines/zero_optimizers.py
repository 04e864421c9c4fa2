"""The optimizers that DeepSpeed is handed: AdamW on the device, and on the host where optimizer state is offloaded.

DeepSpeed calls ``step`` for one of its tensors, or a group of parameters, at a time, and is not told what a step is:
that stands in the optimizer before (``begin``). It imports no DeepSpeed.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megaresnorm.optim import AdamW, GradientPlacement, Group, Settings
from megaresnorm.recipe import OptimRecipe


class ZeroOptimizer(Protocol):
    """What the engine asks of an optimizer of DeepSpeed's, beside what DeepSpeed does."""

    def begin(self, lr: float, updates: int, divisor: Tensor | None, refused: Tensor) -> None:
        """Say what the next calls of ``step`` do.

        Args:
            lr: the schedule's learning rate of this step.
            updates: that have been made before it.
            divisor: as of ``AdamW.update``.
            refused: likewise.
        """

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """As ``AdamW.state``: the moments by name, laid out as what is updated; zeros before the first update."""


def settings_groups(settings: dict[nn.Parameter, Settings]) -> list[dict[str, Any]]:
    """Groups of parameters with the same settings, as optimizers of torch take them."""
    groups: dict[Settings, list[nn.Parameter]] = {}
    for parameter, one in settings.items():
        groups.setdefault(one, []).append(parameter)
    return [{"params": parameters, "settings": one} for one, parameters in groups.items()]


class DeviceOptimizer(torch.optim.Optimizer):
    """AdamW of optim.py, a ``ZeroOptimizer``. Nothing waits for the device.

    Args:
        groups: of ``settings_groups``.
        recipe: of the optimizer.
    """

    def __init__(self, groups: list[dict[str, Any]], recipe: OptimRecipe) -> None:
        super().__init__(groups, {})
        self._rule = AdamW(recipe)
        self._lr = 0.0
        self._divisor: Tensor | None = None
        self._refused: Tensor | None = None
        self._updates = 0

    def begin(self, lr: float, updates: int, divisor: Tensor | None, refused: Tensor) -> None:
        """See ``ZeroOptimizer``."""
        self._lr, self._updates, self._divisor, self._refused = lr, updates, divisor, refused

    def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
        """See ``ZeroOptimizer``."""
        return self._rule.state(tensor)

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update what DeepSpeed has put into ``param_groups``."""
        groups = [
            Group(**group["settings"]._asdict(), placement=GradientPlacement(), tensors=tensors)
            for group in self.param_groups
            if (tensors := [p for p in group["params"] if p.grad is not None])
        ]
        if groups:
            self._rule.set_updates(self._updates)  # one number for all, however often a step comes here
            self._rule.update(groups, self._lr, divisor=self._divisor, refused=self._refused)


def host_optimizer(adam: type, groups: list[dict[str, Any]], recipe: OptimRecipe) -> Any:
    """AdamW on the host: a ``ZeroOptimizer`` and, as ZeRO-Offload wants it, a ``DeepSpeedCPUAdam``.

    Args:
        adam: ``DeepSpeedCPUAdam``, whose operation has been compiled.
        groups: of ``settings_groups``.
        recipe: beta1 and beta2 are read.
    """

    class HostOptimizer(adam):
        """The bias correction is in the learning rate, epsilon and decay of each step.

        DeepSpeed's operation multiplies its own beta ** step on from step to step, in FP32, and takes a power in a
        process that was started anew: a run that is resumed would not have the bits of one that went on.
        """

        def __init__(self) -> None:
            super().__init__(groups, betas=(recipe.beta1, recipe.beta2), bias_correction=False, adamw_mode=True)
            self._lr, self._updates, self._divisor, self._refused = 0.0, 0, 1.0, False

        def begin(self, lr: float, updates: int, divisor: Tensor | None, refused: Tensor) -> None:
            """See ``ZeroOptimizer``. It waits for the device: the host has to know."""
            self._lr, self._updates = lr, updates
            self._divisor, self._refused = 1.0 if divisor is None else divisor.item(), bool(refused.item())

        def state_of(self, tensor: Tensor) -> dict[str, Tensor]:
            """See ``ZeroOptimizer``."""
            state = self.state[tensor]
            if not state:
                state |= {name: torch.zeros_like(tensor, requires_grad=False) for name in AdamW.names}
            return {name: state[name] for name in AdamW.names}

        @torch.no_grad()
        def step(self, closure: Callable | None = None) -> None:
            """Update what DeepSpeed has put into ``param_groups``, unless the step is refused."""
            if self._refused:
                return
            for group in self.param_groups:
                group |= self._options(group["settings"])
                for tensor in group["params"]:
                    self.state_of(tensor)
                    self.state[tensor]["step"] = self._updates  # the base adds one; only bias correction uses it
                    if self._divisor != 1.0:
                        tensor.grad.div_(self._divisor)
            super().step()

        def _options(self, settings: Settings) -> dict[str, float]:
            first, second = 1.0 - recipe.beta1 ** (self._updates + 1), 1.0 - recipe.beta2 ** (self._updates + 1)
            scale = second**0.5
            return {
                "lr": self._lr * settings.lr_multiplier * scale / first,
                "eps": settings.eps * scale,
                "weight_decay": settings.weight_decay * first / scale,
            }

    return HostOptimizer()
