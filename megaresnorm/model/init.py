"""Initialisation from (seed, global name): the same numbers in every parallel layout, type and device."""

from collections.abc import Callable
from hashlib import sha256

import torch
from torch import Tensor, nn

from megaresnorm.model.parameters import global_name
from megaresnorm.model.specs import ParameterSpec
from megaresnorm.parallel.data_parallel import local, placed_like
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.parallel.sharding import shard
from megaresnorm.parallel.wide import with_wide_gradient


def materialize(
    model: nn.Module,
    table: dict[str, ParameterSpec],
    context: ParallelContext,
    *,
    seed: int,
    dtype_of: Callable[[ParameterSpec], torch.dtype],
    device: torch.device,
    on_parameter: Callable[[nn.Parameter], None] = lambda _: None,
) -> None:
    """Give a model that was built on the meta device its memory and initial values, one parameter at a time.

    Peak memory is this rank's share of the model plus its largest whole parameter. Tied parameters stay tied.

    Args:
        dtype_of: the type that a parameter is stored in; gradients of those in BF16 are FP32.
        on_parameter: called with each parameter that has its value, before the next one gets memory.

    Raises:
        AssertionError: model and table do not name the same parameters and shapes.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, name, f"{module_name}.{name}".lstrip(".")))
    specs = {parameter: table[global_name(owners[0][2], table)] for parameter, owners in places.items()}
    # Whole values of sharded parameters are drawn into one buffer: allocated between the shards of others they would
    # leave gaps in the heap.
    divided = {p: spec for p, spec in specs.items() if list(spec.shape) != list(local(p).shape)}
    buffer = torch.empty(max((spec.num_elements for spec in divided.values()), default=0))
    for parameter, owners in places.items():
        spec = specs[parameter]
        whole = initial_value(spec, seed, dtype_of(spec), torch.device("cpu"), buffer if parameter in divided else None)
        share = shard(whole, spec.split, [part.rows for part in spec.parts], context.tp)
        assert share.shape == parameter.shape, f"the model and its table of parameters differ in {spec.name}"
        value = with_wide_gradient(placed_like(share.to(device), parameter, context.dp_shard))
        on_parameter(value)
        for module, name, _ in owners:
            setattr(module, name, value)


def initial_value(
    spec: ParameterSpec, seed: int, dtype: torch.dtype, device: torch.device, buffer: Tensor | None = None
) -> Tensor:
    """The initial value of a whole parameter, drawn in FP32 on the CPU: every type starts from the same numbers.

    Args:
        buffer: memory to draw it into, of at least as many elements, in which the result may lie; None: new memory.
    """
    value = torch.empty(spec.shape) if buffer is None else buffer[: spec.num_elements].view(spec.shape)
    generator = torch.Generator()
    for part, rows in zip(spec.parts, value.split([part.rows for part in spec.parts]), strict=True):
        if part.std == 0.0:
            rows.fill_(part.mean)
            continue
        digest = sha256(f"{seed}/{spec.name}/{part.role}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.normal_(part.mean, part.std, generator=generator)
    return value.to(device=device, dtype=dtype)
