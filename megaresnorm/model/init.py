"""Initialisation from (seed, global name): the same numbers in every parallel layout, type and device."""

from hashlib import sha256

import torch
from torch import Tensor, nn

from megaresnorm.model.parameters import ParameterSpec


def materialize(
    model: nn.Module, table: dict[str, ParameterSpec], *, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Give a model that was built on the meta device its memory and initial values, one parameter at a time.

    Peak memory is the model's own size plus its largest parameter. Tied parameters stay tied.
    Raises: AssertionError if model and table do not name the same parameters and shapes.
    """
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == {name: spec.shape for name, spec in table.items()}, "the model and its table of parameters differ"
    places: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name, f"{module_name}.{name}".lstrip(".")))
    for owners in places.values():
        value = nn.Parameter(initial_value(table[owners[0][2]], seed, dtype, device))
        for module, name, _ in owners:
            setattr(module, name, value)


def initial_value(spec: ParameterSpec, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The initial value of a whole parameter. Drawn in FP32 on the CPU, so that every type starts from the same numbers."""
    value = torch.empty(spec.shape, dtype=torch.float32)
    generator = torch.Generator()
    for part, rows in zip(spec.parts, value.split([part.rows for part in spec.parts]), strict=True):
        if part.std == 0.0:
            rows.fill_(part.mean)
            continue
        digest = sha256(f"{seed}/{spec.name}/{part.role}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.normal_(part.mean, part.std, generator=generator)
    return value.to(device=device, dtype=dtype)
