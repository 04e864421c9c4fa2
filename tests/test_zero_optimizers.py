"""What DeepSpeed is handed as its optimizer makes the updates of our AdamW, on the device and on the host."""

import pytest
import torch

from megaresnorm.engines.zero_optimizers import DeviceOptimizer, host_optimizer, settings_groups
from megaresnorm.optim import Settings
from megaresnorm.recipe import OptimRecipe

RECIPE = OptimRecipe(beta1=0.8, beta2=0.97)


class Adam(torch.optim.Optimizer):
    """What DeepSpeedCPUAdam is documented to do."""

    def __init__(self, groups, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
                 amsgrad=False, adamw_mode=True, fp32_optimizer_states=True):  # fmt: skip
        assert adamw_mode and fp32_optimizer_states
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, options | {"bias_correction": bias_correction, "amsgrad": amsgrad})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (beta1, beta2), lr, eps = group["betas"], group["lr"], group["eps"]
            for tensor in group["params"]:
                state = self.state[tensor]
                state["step"] += 1
                first, second = state["exp_avg"], state["exp_avg_sq"]
                first.lerp_(tensor.grad, 1 - beta1)
                second.lerp_(tensor.grad.square(), 1 - beta2)
                corrects = group["bias_correction"]
                one = 1 - beta1 ** state["step"] if corrects else 1.0
                two = 1 - beta2 ** state["step"] if corrects else 1.0
                tensor.mul_(1 - lr * group["weight_decay"])
                tensor.addcdiv_(first, (second / two).sqrt() + eps, value=-lr / one)


def updated(make, steps) -> tuple[list[torch.Tensor], list[dict]]:
    """Two tensors with settings of their own, and their moments, as DeepSpeed has them updated: one at a time."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.nn.Parameter(torch.randn(33, generator=generator)) for _ in range(2)]
    settings = [Settings(weight_decay=0.1, eps=1e-3, lr_multiplier=0.5), Settings(0.0, 1e-8, 2.0)]
    optimizer = make(settings_groups(dict(zip(tensors, settings, strict=True))))
    assert all(not moment.any() for tensor in tensors for moment in optimizer.state_of(tensor).values())
    updates = 0
    for lr, divisor, refused in steps:
        for tensor in tensors:
            tensor.grad = torch.randn(33, generator=generator)
        divisor = None if divisor is None else torch.tensor(divisor, dtype=torch.float64)
        optimizer.begin(lr, updates, divisor, torch.tensor(float(refused)))
        groups = optimizer.param_groups
        for number in range(2):
            optimizer.param_groups = [groups[number]]
            optimizer.step()
        optimizer.param_groups = groups
        updates += not refused
    return [tensor.detach() for tensor in tensors], [optimizer.state_of(tensor) for tensor in tensors]


@pytest.mark.parametrize(
    "steps", [[(1e-2, None, False)] * 5, [(1e-2, 3.0, False), (0.0, 1.0, False), (1e-2, 2.0, True), (3e-2, 1.5, False)]]
)
def test_the_host_makes_the_updates_of_the_device(steps):
    weights, moments = updated(lambda groups: host_optimizer(Adam, groups, RECIPE), steps)
    wanted, states = updated(lambda groups: DeviceOptimizer(groups, RECIPE), steps)
    for mine, theirs in zip((*weights, *(m for one in moments for m in one.values())),
                            (*wanted, *(m for one in states for m in one.values())), strict=True):  # fmt: skip
        assert (mine - theirs).abs().max() < 1e-6


def test_a_refused_step_changes_nothing():
    def both(steps):
        weights, moments = updated(lambda groups: host_optimizer(Adam, groups, RECIPE), steps)
        return [*weights, *(moment for one in moments for moment in one.values())]

    applied = (1e-2, 2.0, False)
    before, after = both([applied]), both([applied, (1e-2, 2.0, True)])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
