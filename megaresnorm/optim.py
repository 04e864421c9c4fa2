"""The optimizer: an update rule, groups from the table of parameters, and gradient clipping.

Nothing here waits for the device. Whether a step may be applied is decided there: a refused one is the same sequence of
kernels and changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.errors import ConfigError
from megaresnorm.kernels.hashing import hash_number
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.wide import gradient_dtype, no_gradient, with_wide_gradient
from megaresnorm.precision.rounded_updates import Piece, Rounded, pieces_of_packed, pieces_of_weight
from megaresnorm.recipe import OptimRecipe

SMALL = 1 << 16  # elements; below this, calling an operation costs about as much as its work
# Elements: slices begin at multiples of 32 bytes, since code that is compiled for one block serves them all.
ALIGNED = 8
SMALLEST_EPS = torch.finfo(torch.float32).tiny  # below it AdamW divides zero by zero


class GradientPlacement(NamedTuple):
    """How a gradient is spread over ranks.

    Attributes:
        split: sharded over tp; otherwise every rank of tp has all of it.
        copy: of an embedding that the first stage of a pipeline has as well.
    """

    split: bool = False
    copy: bool = False


class Gradient(NamedTuple):
    """A gradient after every reduction, or this rank's share of it.

    Attributes:
        tensor: in the type of the weight, of one in BF16 in FP32.
    """

    tensor: Tensor
    placement: GradientPlacement


@dataclass
class Group:
    """Tensors that are updated with the same settings.

    Attributes:
        tensors: what the rule updates: packed tensors, large parameters, this rank's part of sharded ones.
        lr_multiplier: factor on the schedule's learning rate.
        placement: of the gradients of all of them.
    """

    weight_decay: float
    eps: float
    lr_multiplier: float
    placement: GradientPlacement
    tensors: list[nn.Parameter] = field(default_factory=list)


class Settings(NamedTuple):
    """How a parameter is updated; ``Group`` says what they are."""

    weight_decay: float
    eps: float
    lr_multiplier: float


def settings_of(spec: ParameterSpec, recipe: OptimRecipe) -> Settings:
    """How a parameter is updated."""
    m = spec.multipliers
    return Settings(recipe.weight_decay * m.weight_decay if spec.decay else 0.0, recipe.eps * m.eps, m.lr)


class AdamW:
    """The update rule of AdamW, as one fused operation a group, or of weights in BF16 one a piece.

    Args:
        recipe: beta1 and beta2 are read.
        pieces: of every tensor in BF16, which is updated in FP32 and rounded at random piece by piece.

    Attributes:
        names: names of its state, of which every tensor has each once; a checkpoint has them.

    Source:
        arXiv:1711.05101, algorithm 2.
    """

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, recipe: OptimRecipe, pieces: Mapping[nn.Parameter, Sequence[Piece]] | None = None) -> None:
        self._beta1, self._beta2 = recipe.beta1, recipe.beta2
        self._pieces = pieces or {}
        self._state: dict[Tensor, dict[str, Tensor]] = {}
        self._updates = 0  # that a checkpoint has seen
        # Updates so far, one number for all tensors of a device: as the fused operation takes it, and exactly.
        self._steps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def state(self, tensor: Tensor) -> dict[str, Tensor]:
        """Its state by name, laid out as the tensor is, of a weight in BF16 in FP32; zeros before the first update."""
        if tensor not in self._state:
            dtype = gradient_dtype(tensor.dtype)
            zeros = (torch.zeros_like(tensor, dtype=dtype, requires_grad=False) for _ in self.names)
            self._state[tensor] = dict(zip(self.names, zeros, strict=True))
        return self._state[tensor]

    def set_updates(self, updates: int) -> None:
        """Set the number of updates that the state has seen, for the bias correction."""
        self._updates = updates
        self._steps.clear()

    @torch.no_grad()
    def update(self, groups: Sequence[Group], lr: float, *, divisor: Tensor | None, refused: Tensor | None) -> None:
        """Update every tensor of the groups with its ``grad``.

        Args:
            lr: the schedule's learning rate.
            divisor: a number FP64 by which gradients are divided first; they stay divided. None: 1.
            refused: a number FP32; where it is 1 nothing changes. None: 0.
        """
        self._count(groups, refused)
        numbers = {device: hash_number(number) for device, (_, number) in self._steps.items()} if self._pieces else {}
        for group in groups:
            gradients = [_gradient_of(tensor) for tensor in group.tensors]
            scale = None if divisor is None else divisor.float()
            if divisor is not None and gradients[0].dtype == torch.float64:
                torch._foreach_div_(gradients, divisor)  # the fused operation would divide by an FP32 number
                scale = None
            states = [self.state(tensor) for tensor in group.tensors]
            moments = [[state[name] for state in states] for name in self.names]
            options: dict[str, Any] = {"lr": lr * group.lr_multiplier, "weight_decay": group.weight_decay}
            options |= {"eps": group.eps, "grad_scale": scale, "found_inf": refused}
            if group.tensors[0] not in self._pieces:
                self._fused(list(group.tensors), gradients, *moments, **options)
                continue
            for tensor, gradient, *two in zip(group.tensors, gradients, *moments, strict=True):
                for piece in self._pieces[tensor]:
                    updated = tensor[piece.at].float()
                    self._fused([updated], [gradient[piece.at]], *([each[piece.at]] for each in two), **options)
                    piece.store(updated, tensor, numbers[tensor.device])

    def _fused(
        self, weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor],
        **options: Any,
    ) -> None:  # fmt: skip
        torch._fused_adamw_(
            weights, gradients, averages, squares, [], [self._steps[weight.device][0] for weight in weights],
            amsgrad=False, beta1=self._beta1, beta2=self._beta2, maximize=False, **options,
        )  # fmt: skip

    def _count(self, groups: Sequence[Group], refused: Tensor | None) -> None:
        for device in {tensor.device for group in groups for tensor in group.tensors}:
            if device not in self._steps:
                number = torch.full((), self._updates, dtype=torch.int64, device=device)
                self._steps[device] = number.float(), number
        for steps, number in self._steps.values():
            number += 1 if refused is None else (1.0 - refused).long()
            steps.copy_(number)


class Optimizer:
    """AdamW, with one group for each combination of decay, multipliers and placement.

    A deep, narrow model has thousands of small parameters. Those of a group become slices of one tensor, and
    ``collect`` puts their gradients into another, so that norm, clipping and update are one call for all of them.
    Parameters that FSDP2 has sharded are updated where they are, unpacked.

    Args:
        parameters: by name.
        table: the specification of each.
        recipe: settings of the optimizer.
        placements: of each parameter's gradient, by name; None: all are whole.
        rounded: how each weight that is stored in BF16 is rounded, by name.

    Attributes:
        rule: what updates a tensor.
        groups: all tensors that it updates.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        table: Mapping[str, ParameterSpec],
        recipe: OptimRecipe,
        placements: Mapping[str, GradientPlacement] | None = None,
        rounded: Mapping[str, Rounded] | None = None,
    ) -> None:
        self._parameters = list(parameters.values())
        placements = placements or dict.fromkeys(parameters, GradientPlacement())
        self._placements = [placements[name] for name in parameters]
        self._slices: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}  # small -> (packed tensor, first element)
        self._locals: dict[nn.Parameter, nn.Parameter] = {  # sharded -> this rank's part of its memory
            p: nn.Parameter(local(p.detach())) for p in self._parameters if local(p) is not p
        }
        self._members: dict[nn.Parameter, list[nn.Parameter]] = {}  # packed tensor -> its small ones, in order
        self._rounded = {parameters[name]: one for name, one in (rounded or {}).items()}
        pieces: dict[nn.Parameter, list[Piece]] = {}
        groups: dict[tuple, Group] = {}
        for name, parameter in parameters.items():
            settings = settings_of(table[name], recipe)
            key = (settings, placements[name], parameter.dtype)
            group = groups.setdefault(key, Group(*settings, placements[name]))
            group.tensors.append(parameter)
        for group in groups.values():
            small = [p for p in group.tensors if p.numel() <= SMALL and p not in self._locals]
            packed = set(small)
            large = [self._locals.get(p, p) for p in group.tensors if p not in packed]
            pieces |= {p: pieces_of_weight(self._rounded[p], p.device) for p in large if p in self._rounded}
            group.tensors = large + ([self._pack(small, pieces)] if small else [])
        self.groups = list(groups.values())
        self.rule = AdamW(recipe, pieces)
        self._keeps_gradients = False

    def keep_gradients(self) -> None:
        """Let gradients stay in their memory, as a CUDA graph needs it: backward adds, ``zero_grad`` writes zeros."""
        assert not self._locals, "FSDP2 makes its gradients itself"
        self._keeps_gradients = True
        for tensor in self.tensors:
            tensor.grad = no_gradient(tensor)
        for parameter in self._parameters:
            parameter.grad = self._slice_for(parameter, _gradient_of(self.updated_as(parameter)))

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The tensors of all groups, in their order."""
        return [tensor for group in self.groups for tensor in group.tensors]

    def updated_as(self, parameter: nn.Parameter) -> nn.Parameter:
        """The tensor that the rule updates in place of a parameter of the model."""
        return self._slices.get(parameter, (self._locals.get(parameter, parameter), 0))[0]

    def collect(self, *, per_parameter: bool = False) -> list[Gradient]:
        """Take over the gradients of the parameters, which then have none.

        Returns:
            Gradients of ``tensors``, or with ``per_parameter`` one for each parameter of the model, as a slice.
        """
        for packed, members in self._members.items() if not self._keeps_gradients else ():
            assert packed.grad is not None
            torch.cat([_padded(_gradient_of(p)) for p in members], out=packed.grad)
            for p in members:
                p.grad = None
        for p, mine in self._locals.items():
            mine.grad, p.grad = _gradient_of(p), None
        if per_parameter:
            return [Gradient(self.gradient(p), at) for p, at in zip(self._parameters, self._placements, strict=True)]
        return [Gradient(_gradient_of(p), group.placement) for group in self.groups for p in group.tensors]

    @torch.no_grad()
    def divide_gradients(self, factor: float) -> None:
        """Divide the gradients of the parameters, before they are collected, by a power of two: nothing is rounded."""
        tensors = self.tensors if self._keeps_gradients else self._parameters
        gradients = [local(p.grad) for p in tensors if p.grad is not None]
        if factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, 1.0 / factor)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The collected gradient of a parameter of the model."""
        return self._slice_for(parameter, _gradient_of(self.updated_as(parameter)))

    def step(self, lr: float, *, divisor: Tensor | None = None, refused: Tensor | None = None) -> None:
        """Update with the collected gradients; the arguments are those of ``AdamW.update``."""
        self.rule.update(self.groups, lr, divisor=divisor, refused=refused)

    def zero_grad(self) -> None:
        """Drop the gradients of the parameters, or zero those that stay; packed ones are overwritten by ``collect``."""
        if self._keeps_gradients:
            torch._foreach_zero_([_gradient_of(tensor) for tensor in self.tensors])
            return
        for parameter in (*self._parameters, *self._locals.values()):
            parameter.grad = None

    def state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The rule's state of a parameter of the model, packed or not: its own memory, not copies."""
        found = self.rule.state(self.updated_as(parameter))
        return {name: self._slice_for(parameter, tensor) for name, tensor in found.items()}

    @torch.no_grad()
    def _pack(self, parameters: list[nn.Parameter], pieces: dict[nn.Parameter, list[Piece]]) -> nn.Parameter:
        """Move the parameters' values into one tensor, whose slices they become, with zeros between them.

        Those in BF16 are ordered by their place, so that few ``pieces`` serve many of them.
        """
        rounds = parameters[0] in self._rounded
        if rounds:
            parameters = sorted(parameters, key=lambda p: str(self._rounded[p].place))
        packed = with_wide_gradient(nn.Parameter(torch.cat([_padded(p) for p in parameters])))
        packed.grad = no_gradient(packed)
        if rounds:
            members = [self._rounded[p] for p in parameters]
            pieces[packed] = list(pieces_of_packed(members, ALIGNED, packed.device))
        start = 0
        for p in parameters:
            self._slices[p] = packed, start
            p.data = self._slice_for(p, packed.data)
            start += _padded(p).numel()
        self._members[packed] = parameters
        return packed

    def _slice_for(self, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
        """The slice of a parameter in a tensor that is laid out like the one it is updated in."""
        if parameter not in self._slices:
            return tensor
        start = self._slices[parameter][1]
        return tensor[start : start + parameter.numel()].view_as(parameter)


def _padded(tensor: Tensor) -> Tensor:
    """A tensor's elements, with zeros up to a multiple of ALIGNED."""
    missing = -tensor.numel() % ALIGNED
    return F.pad(tensor.flatten(), (0, missing)) if missing else tensor.flatten()


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, or this rank's shard of it; zeros for a parameter that no loss depends on."""
    return no_gradient(local(parameter.detach())) if parameter.grad is None else local(parameter.grad)


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
