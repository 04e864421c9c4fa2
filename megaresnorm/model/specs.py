"""The specification of one parameter, and those of a linear layer and of a norm."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from megaresnorm.model.topology import Multipliers, ResidualSpec
from megaresnorm.recipe import ModelRecipe

PLAIN = Multipliers()


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a parameter that are one matrix or vector in the mathematics (the q of a fused qkv).

    Every element is drawn from N(mean, std^2). A tensor-parallel rank has its share of every part.

    Attributes:
        role: its role in the model, by which topologies name gains and multipliers and by which it is sharded.
    """

    role: str
    rows: int
    mean: float = 0.0
    std: float = 0.0


IN_BRANCHES = ("q", "out", "gate", "up", "down")  # roles of the first parts of matrices of branches' linear layers


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model.

    Attributes:
        shape: of the whole parameter, not of a rank's share.
        decay: whether it has weight decay.
        split: the dim in which it is sharded over the tensor-parallel ranks; None: each has all of it.
        partial: whether a rank's gradient is a partial sum, which parallel/gradients.py adds up.
        matrix: whether it is a matrix that is multiplied by or looked up in, of the type that precision.weights names.
            Norms, biases and gates are none.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    decay: bool
    multipliers: Multipliers = PLAIN
    split: int | None = None
    partial: bool = False
    matrix: bool = False

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def linear_parameters(
    recipe: ModelRecipe, name: str, parts: tuple[tuple[str, int], ...], in_dim: int, spec: ResidualSpec
) -> Iterator[ParameterSpec]:
    """Weight and, where the recipe has one, bias of a linear layer.

    Args:
        name: global, ending with the layer's name in the recipe.
        parts: role and rows of the logical matrices that the weight holds.
    """
    rows = sum(size for _, size in parts)
    matrices = tuple(Part(role, size, std=matrix_std(recipe, role, size, in_dim, spec)) for role, size in parts)
    # The parts of a fused matrix share one optimizer state, so they must share its settings.
    (multipliers,) = {multipliers_of(spec, role) for role, _ in parts}
    yield ParameterSpec(f"{name}.weight", (rows, in_dim), matrices, decay=True, multipliers=multipliers, matrix=True)
    if recipe.has_bias(name.rpartition(".")[2]):
        zeros = tuple(Part("stream_bias" if role in ("out", "down") else role, size) for role, size in parts)
        yield ParameterSpec(f"{name}.bias", (rows,), zeros, decay=False, multipliers=multipliers_of(spec, "bias"))


def matrix_std(recipe: ModelRecipe, role: str, fan_out: int, fan_in: int, spec: ResidualSpec) -> float:
    """Standard deviation of a logical matrix; Xavier's fans are its own, not the fused or sharded matrix's."""
    gain = spec.init_gain.get(role, 1.0)
    if recipe.init.scale_residual and role in ("out", "down"):
        gain /= sqrt(2 * recipe.num_blocks)
    return gain * (recipe.init.std if recipe.init.distribution == "normal" else sqrt(2 / (fan_in + fan_out)))


def norm_parameters(
    recipe: ModelRecipe, name: str, dim: int, spec: ResidualSpec | None = None, role: str = "norm"
) -> Iterator[ParameterSpec]:
    """Weight and, where the recipe has one, bias of a norm of width ``dim``; ``spec`` None: outside of sub-layers."""
    multipliers = PLAIN if spec is None else multipliers_of(spec, "norm")
    start = 0.0 if recipe.norm_zero_centered else 1.0
    yield ParameterSpec(f"{name}.weight", (dim,), (Part(role, dim, mean=start),), decay=False, multipliers=multipliers)
    if recipe.norm == "layernorm" and recipe.norm_bias:
        yield ParameterSpec(f"{name}.bias", (dim,), (Part(role, dim),), decay=False, multipliers=multipliers)


def multipliers_of(spec: ResidualSpec, role: str) -> Multipliers:
    """The multipliers of a role in a sub-layer."""
    return spec.optim.get(role, spec.optim.get("*", PLAIN))
