"""The one order in which a model is put together: meta model, precision, materialise, initialise."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.dispatch import choose_kernel
from megaresnorm.model.init import materialize
from megaresnorm.model.parameters import ParameterSpec, parameter_table
from megaresnorm.model.residual import AddNorm, Kernels
from megaresnorm.model.transformer import Transformer
from megaresnorm.precision import DTYPES, Bf16Weights, weight_dtype
from megaresnorm.recipe import KernelRecipe, ModelRecipe, PrecisionRecipe


@dataclass(frozen=True)
class Assembled:
    """A model that is ready to train, and what was decided on the way."""

    model: Transformer
    table: dict[str, ParameterSpec]
    device: torch.device
    kernel_choices: dict[str, str]
    cross_entropy: Callable[..., tuple[Tensor, Tensor]]
    bf16: Bf16Weights | None

    def weights_changed(self) -> None:
        """To be called after the optimizer or a checkpoint has changed the weights."""
        if self.bf16 is not None:
            self.bf16.refresh()


def build_model(
    recipe: ModelRecipe,
    precision: PrecisionRecipe | None = None,
    kernels: KernelRecipe | None = None,
    *,
    seed: int = 1234,
    device: str | torch.device = "cpu",
) -> Assembled:
    """Build, materialise and initialise the model of a recipe whose vocab_size is set.

    Raises: ConfigError for a topology, kernel or device that cannot be used.
    """
    load_backends()
    precision, kernels = precision or PrecisionRecipe(), kernels or KernelRecipe()
    device = torch.device(device)
    compute = DTYPES[precision.compute]
    chosen = {op: choose_kernel(op, backend, device, compute) for op, backend in kernels}
    add_norm = AddNorm(chosen["add_norm"][0].function, DTYPES[precision.stream], compute)
    model_kernels = Kernels(add_norm, chosen["attention"][0].function, chosen["activation"][0].function)
    with torch.device("meta"):
        model = Transformer(recipe, model_kernels)
    bf16 = Bf16Weights(model) if precision.compute == "bf16" else None
    table = parameter_table(recipe)
    materialize(model, table, seed=seed, dtype=weight_dtype(precision.compute), device=device)
    choices = {op: line for op, (_, line) in chosen.items()}
    assembled = Assembled(model, table, device, choices, chosen["cross_entropy"][0].function, bf16)
    assembled.weights_changed()
    return assembled


def choose_device(name: str) -> torch.device:
    """The device of a recipe's train.device. Raises: ConfigError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda: torch sees no GPU here; use train.device=auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
