"""AdamW with groups from the table of parameters, and gradient clipping."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from megaresnorm.errors import ConfigError
from megaresnorm.model.parameters import ParameterSpec
from megaresnorm.parallel.data_parallel import local
from megaresnorm.recipe import OptimRecipe

MOMENTS = ("exp_avg", "exp_avg_sq")
SMALL = 1 << 16  # elements; below this, calling an operation costs about as much as its work
SMALLEST_EPS = torch.finfo(torch.float32).tiny  # below it AdamW divides zero by zero
NORM_PIECE = 1 << 16  # elements whose squares may be added in FP32: the error is below 1e-6


class Optimizer:
    """AdamW, with one group for each combination of decay and multipliers in the table.

    A deep, narrow model has thousands of small parameters. Those of a group become slices of one tensor, and
    ``collect`` puts their gradients into another, so that norm, clipping and update are one call for all of them.
    Parameters that FSDP2 has sharded are updated where they are, unpacked.

    Args:
        parameters: by name.
        table: the specification of each.
        recipe: settings of the optimizer.
        kinds: kind of each parameter, by name; only parameters of one kind are packed together. None for a single kind.

    Attributes:
        tensors: what AdamW updates: packed tensors, large parameters, and this rank's part of sharded ones.

    Source:
        AdamW, arXiv:1711.05101.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        table: Mapping[str, ParameterSpec],
        recipe: OptimRecipe,
        kinds: Mapping[str, Hashable] | None = None,
    ) -> None:
        self._parameters = list(parameters.values())
        kinds = kinds or dict.fromkeys(parameters)
        self._slices: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}  # small -> (packed tensor, first element)
        self._locals: dict[nn.Parameter, nn.Parameter] = {  # sharded -> this rank's part of its memory
            p: nn.Parameter(local(p.detach())) for p in self._parameters if local(p) is not p
        }
        self._members: dict[nn.Parameter, list[nn.Parameter]] = {}  # packed tensor -> its small ones, in order
        groups: dict[tuple, dict] = {}
        for name, parameter in parameters.items():
            spec = table[name]
            m = spec.multipliers
            decay = recipe.weight_decay * m.weight_decay if spec.decay else 0.0
            group = groups.setdefault(
                (decay, m.lr, m.eps, kinds[name]),
                {"params": [], "weight_decay": decay, "eps": recipe.eps * m.eps, "lr_multiplier": m.lr},
            )
            group["params"].append(parameter)
        for group in groups.values():
            small = [p for p in group["params"] if p.numel() <= SMALL and p not in self._locals]
            packed = set(small)
            large = [self._locals.get(p, p) for p in group["params"] if p not in packed]
            group["params"] = large + ([self._pack(small)] if small else [])
        self.tensors = [tensor for group in groups.values() for tensor in group["params"]]
        self._kinds = [key[-1] for key, group in groups.items() for _ in group["params"]]
        self._kinds_of_parameters = [kinds[name] for name in parameters]
        self._adamw = torch.optim.AdamW(
            list(groups.values()), lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), fused=True
        )

    @property
    def groups(self) -> list[dict]:
        """AdamW's groups: their tensors, decay, eps and multiplier of the learning rate."""
        return self._adamw.param_groups

    def updated_as(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor that AdamW updates in place of a parameter of the model."""
        return self._slices.get(parameter, (self._locals.get(parameter, parameter), 0))[0]

    def kinds(self, *, per_parameter: bool = False) -> list[Hashable]:
        """Kinds of the gradients that ``collect`` returns."""
        return self._kinds_of_parameters if per_parameter else self._kinds

    def collect(self, *, per_parameter: bool = False) -> list[Tensor]:
        """Take over the gradients of the parameters, which then have none.

        Returns:
            Gradients of ``tensors``, or with ``per_parameter`` one for each parameter of the model, as a slice.
        """
        for packed, members in self._members.items():
            assert packed.grad is not None
            torch.cat([_gradient_of(p).flatten() for p in members], out=packed.grad)
            for p in members:
                p.grad = None
        for p, mine in self._locals.items():
            mine.grad, p.grad = _gradient_of(p), None
        return (
            [self.gradient(p) for p in self._parameters] if per_parameter else [_gradient_of(p) for p in self.tensors]
        )

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The collected gradient of a parameter of the model."""
        return self._slice_for(parameter, _gradient_of(self.updated_as(parameter)))

    def step(self, lr: float) -> None:
        """Update with the collected gradients.

        Args:
            lr: the schedule's learning rate, before the multiplier of a group.
        """
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        self._adamw.step()

    def zero_grad(self) -> None:
        """Drop the gradients of the parameters; packed ones are overwritten by ``collect``."""
        for parameter in (*self._parameters, *self._locals.values()):
            parameter.grad = None

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """exp_avg and exp_avg_sq of a parameter of the model, packed or not: AdamW's own memory, not copies."""
        updated = self.updated_as(parameter)
        state = self._adamw.state[updated]
        if not state:  # AdamW itself makes it only in its first step
            state["step"] = torch.zeros((), dtype=torch.float32, device=updated.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(updated), torch.zeros_like(updated)
        return {key: self._slice_for(parameter, state[key]) for key in MOMENTS}

    def set_updates(self, updates: int) -> None:
        """Set the number of updates that the moments have seen, for AdamW's bias correction."""
        for tensor in self.tensors:
            self._adamw.state[tensor]["step"].fill_(updates)

    @torch.no_grad()
    def _pack(self, parameters: list[nn.Parameter]) -> nn.Parameter:
        """Move the parameters' values into one tensor, whose slices they become."""
        packed = nn.Parameter(torch.cat([p.flatten() for p in parameters]))
        packed.grad = torch.zeros_like(packed)
        start = 0
        for p in parameters:
            self._slices[p] = packed, start
            p.data = self._slice_for(p, packed.data)
            start += p.numel()
        self._members[packed] = parameters
        return packed

    def _slice_for(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """The slice of a parameter in a tensor that is laid out like the one it is updated in."""
        if parameter not in self._slices:
            return tensor
        start = self._slices[parameter][1]
        return tensor[start : start + parameter.numel()].view_as(parameter)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, or this rank's shard of it; zeros for a parameter that no loss depends on."""
    return torch.zeros_like(local(parameter.detach())) if parameter.grad is None else local(parameter.grad)


class GradientClipper:
    """Clips gradients in place: all together by their global norm, or each tensor against its own history (AdaGC).

    With AdaGC the gradient of tensor i may exceed the moving average gamma_i of its own clipped norms by
    ``adagc_ratio``. During its warm-up clipping is global, and gamma_i is the smallest norm seen.

    Args:
        recipe: the kind of clipping and its settings.
        num_tensors: number of gradients.

    Attributes:
        steps: steps that the averages have seen.
        averages: gamma, [num_tensors], on the CPU.

    Source:
        AdaGC, arXiv:2502.11034, algorithm 1.
    """

    def __init__(self, recipe: OptimRecipe, num_tensors: int) -> None:
        self.recipe = recipe
        self.steps = 0
        self.averages = torch.full((num_tensors,), torch.inf)

    def clip(self, gradients: Sequence[Tensor], norms: Tensor, total: Tensor | None = None) -> None:
        """Clip the gradients of one step in place.

        Args:
            gradients: every gradient, in a fixed order.
            norms: [n] FP64, their L2 norms before clipping; of whole tensors where they are sharded over ranks.
            total: norm of all gradients of all ranks; None for that of ``norms``.
        """
        recipe = self.recipe
        if recipe.clip == "none":
            return
        warm = recipe.clip == "adagc" and self.steps >= recipe.adagc_warmup
        norms = norms.cpu()
        total = torch.linalg.vector_norm(norms) if total is None else total.to(norms)
        limit = recipe.adagc_ratio * self.averages if warm else recipe.clip_norm * norms / total
        factors = (limit / norms).clamp(max=1.0).nan_to_num(nan=1.0)  # 0/0: a gradient of zeros needs no clipping
        if bool((factors < 1.0).any()):
            torch._foreach_mul_(list(gradients), factors.tolist())
        if recipe.clip == "adagc":
            self._remember(norms * factors, warm)

    def _remember(self, clipped: Tensor, warm: bool) -> None:
        """Update gamma with the norms after clipping.

        A norm of zero (behind a gate that starts at 0) says nothing about a tensor's scale, and would pin gamma to 0.
        """
        beta = self.recipe.adagc_beta
        average = beta * self.averages + (1 - beta) * clipped if warm else torch.minimum(self.averages, clipped)
        average = torch.where(self.averages.isinf(), clipped, average)
        self.averages.copy_(torch.where(clipped > 0, average, self.averages))
        self.steps += 1


def check_eps(recipe: OptimRecipe, table: Mapping[str, ParameterSpec]) -> None:
    """Check that eps times the topology's multiplier is large enough for AdamW.

    Raises:
        ConfigError: it is so small for some parameter that AdamW would divide zero by zero.
    """
    for name, spec in table.items():
        multiplier = spec.multipliers.eps
        if recipe.eps * multiplier < SMALLEST_EPS:
            raise ConfigError(
                f"optim.eps={recipe.eps:g} times {multiplier:g}, the topology's multiplier for {name}, is no normal "
                f"number in FP32; wanted at least {SMALLEST_EPS / multiplier:.1e}"
            )


def gradient_norms(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of every gradient, [n] FP64. The norm of all of them together is the norm of this vector.

    On CPUs torch adds the squares of a whole tensor in FP32, which loses 4e-3 of the norm of 5e7 numbers. Pieces of
    NORM_PIECE numbers keep seven digits; their squares are added in FP64, so that the norm does not depend on how
    tensors are packed.
    """
    pieces = [piece for g in gradients for piece in (g.flatten().split(NORM_PIECE) if g.is_cpu else (g,))]
    norms = torch.stack(torch._foreach_norm(pieces)).double()
    if len(pieces) == len(gradients):
        return norms
    counts = torch.tensor([max(1, -(-g.numel() // NORM_PIECE)) for g in gradients])
    of_gradient = torch.repeat_interleave(torch.arange(len(gradients)), counts)
    return norms.new_zeros(len(gradients)).index_add_(0, of_gradient, norms.square()).sqrt()
