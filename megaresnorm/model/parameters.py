"""One table of the parameters by global name: shape, logical parts, initialisation, decay, optimizer multipliers.

It is computed from the recipe alone, for the whole model. Initialisation, optimizer and checkpoints read it; no tensor
carries settings of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

from megaresnorm.model.residual import gate_size
from megaresnorm.model.topology import Learned, Multipliers, Position, ResidualSpec, TokenGate, topology
from megaresnorm.model.transformer import has_embedding_norm
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


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of the whole model.

    Attributes:
        shape: of the whole parameter, not of a rank's share.
        decay: whether it has weight decay.
        split: the dim in which it is sharded over the tensor-parallel ranks; None: each has all of it.
        partial: whether a rank's gradient is a partial sum, which parallel/gradients.py adds up.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    decay: bool
    multipliers: Multipliers = PLAIN
    split: int | None = None
    partial: bool = False

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        product = 1
        for size in self.shape:
            product *= size
        return product


def parameter_table(
    recipe: ModelRecipe, tensor_layout: str = "full", blocks: Iterable[int] | None = None
) -> dict[str, ParameterSpec]:
    """Every parameter of the model by global name, in the order of Transformer.named_parameters().

    Args:
        recipe: resolved, so that model.vocab_size is set.
        tensor_layout: the stream's layout, on which ``split`` and ``partial`` depend.
        blocks: only these blocks, and what is outside blocks; None: all.
    """
    chosen = range(recipe.num_blocks) if blocks is None else blocks
    return {spec.name: _placed(spec, recipe, tensor_layout) for spec in _parameters(recipe, chosen)}


def global_name(name: str, table: Mapping[str, ParameterSpec]) -> str:
    """The table's name for a parameter of a stage: a tied output matrix is the embedding, on whatever stage it is."""
    return "embedding.weight" if name == "head.weight" and name not in table else name


def _placed(spec: ParameterSpec, recipe: ModelRecipe, tensor_layout: str) -> ParameterSpec:
    """The parameter with its placement on a tensor-parallel axis, which follows from what its role works on."""
    match spec.parts[0].role:
        case "embedding" | "head" | "q" | "gate" | "up" | "inner":  # rows, or the share of an inner width
            return replace(spec, split=0)
        case "out" | "down":
            return replace(spec, split=1)
        case "heads":  # each rank's gradient is that of its own heads
            return replace(spec, partial=True)
        case "token_gate":
            return replace(spec, partial=True)
        case "residual_gate" if spec.shape == (1,):
            return replace(spec, partial=tensor_layout != "full")
        case "norm" | "residual_gate" | "stream_bias" | "position":  # as the stream
            split = len(spec.shape) - 1 if tensor_layout == "columns" else None
            return replace(spec, split=split, partial=tensor_layout == "tokens")
        case role:
            raise AssertionError(f"{spec.name} has the role {role}, which has no place")


def _parameters(recipe: ModelRecipe, blocks: Iterable[int]) -> Iterator[ParameterSpec]:
    wiring = topology(recipe.topology)
    options, init = recipe.topology_options, recipe.init
    outer = wiring.outer_optim(recipe.dim, options)

    def table(name: str, role: str, rows: int, std: float) -> ParameterSpec:
        multipliers = outer.get(role, outer.get("*", PLAIN))
        return ParameterSpec(
            name, (rows, recipe.dim), (Part(role, rows, std=std),), decay=True, multipliers=multipliers
        )

    embedding_std = default_embedding_std(recipe)
    yield table("embedding.weight", "embedding", recipe.padded_vocab_size, embedding_std)
    if recipe.positions == "learned":
        yield table("positions.weight", "position", recipe.seq_len, default_position_std(recipe))
    if has_embedding_norm(recipe):
        yield from _norm(recipe, "embedding_norm", recipe.dim)
    for block in blocks:
        yield from _block(recipe, block)
    if wiring.final_norm:
        yield from _norm(recipe, "final_norm", recipe.dim)
    if not recipe.tied_embeddings:
        yield table(
            "head.weight", "head", recipe.padded_vocab_size, init.head_std or wiring.head_std(recipe.dim, options)
        )


def _block(recipe: ModelRecipe, block: int) -> Iterator[ParameterSpec]:
    q_dim, kv_dim = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
    ffn_dim = recipe.ffn_width
    qkv = (("q", q_dim), ("k", kv_dim), ("v", kv_dim))
    inner = ("gate_up", (("gate", ffn_dim), ("up", ffn_dim))) if recipe.gated_ffn else ("up", (("up", ffn_dim),))
    branches: dict = {
        "attention": (("qkv", qkv, recipe.dim), ("out", (("out", recipe.dim),), q_dim)),
        "ffn": ((*inner, recipe.dim), ("down", (("down", recipe.dim),), ffn_dim)),
    }
    for sublayer, linears in branches.items():
        at = Position(block=block, num_blocks=recipe.num_blocks, sublayer=sublayer, dim=recipe.dim)
        spec = topology(recipe.topology).residual(at, recipe.topology_options)
        prefix = f"blocks.{block}.{sublayer}"
        yield from _residual_gate(spec, f"{prefix}.gate", recipe.dim)
        for role in ("norm_in", "norm_branch", "norm_out"):
            if getattr(spec, role):
                yield from _norm(recipe, f"{prefix}.{role}", recipe.dim, spec)
        for name, parts, in_dim in linears:
            yield from _linear(recipe, f"{prefix}.branch.{name}", parts, in_dim, spec)
        if spec.norm_inner:
            yield from _norm(recipe, f"{prefix}.branch.norm_inner", linears[-1][-1], spec, role="inner")
        if sublayer == "attention" and recipe.qk_norm != "none":
            per_head = recipe.qk_norm == "head"
            for name, width in (("q_norm", q_dim), ("k_norm", kv_dim)):
                dim, role = (recipe.head_width, "heads") if per_head else (width, "inner")
                yield from _norm(recipe, f"{prefix}.branch.{name}", dim, spec, role=role)
        yield from _token_gate(spec, f"{prefix}.token_gate", recipe.dim)


def _linear(
    recipe: ModelRecipe, name: str, parts: tuple[tuple[str, int], ...], in_dim: int, spec: ResidualSpec
) -> Iterator[ParameterSpec]:
    rows = sum(size for _, size in parts)
    matrices = tuple(Part(role, size, std=matrix_std(recipe, role, size, in_dim, spec)) for role, size in parts)
    # The parts of a fused matrix share one optimizer state, so they must share its settings.
    (multipliers,) = {_multipliers(spec, role) for role, _ in parts}
    yield ParameterSpec(f"{name}.weight", (rows, in_dim), matrices, decay=True, multipliers=multipliers)
    if recipe.has_bias(name.rpartition(".")[2]):
        zeros = tuple(Part("stream_bias" if role in ("out", "down") else role, size) for role, size in parts)
        yield ParameterSpec(f"{name}.bias", (rows,), zeros, decay=False, multipliers=_multipliers(spec, "bias"))


def matrix_std(recipe: ModelRecipe, role: str, fan_out: int, fan_in: int, spec: ResidualSpec) -> float:
    """Standard deviation of a logical matrix; Xavier's fans are its own, not the fused or sharded matrix's."""
    gain = spec.init_gain.get(role, 1.0)
    if recipe.init.scale_residual and role in ("out", "down"):
        gain /= sqrt(2 * recipe.num_blocks)
    return gain * (recipe.init.std if recipe.init.distribution == "normal" else sqrt(2 / (fan_in + fan_out)))


def _norm(
    recipe: ModelRecipe, name: str, dim: int, spec: ResidualSpec | None = None, role: str = "norm"
) -> Iterator[ParameterSpec]:
    multipliers = PLAIN if spec is None else _multipliers(spec, "norm")
    start = 0.0 if recipe.norm_zero_centered else 1.0
    yield ParameterSpec(f"{name}.weight", (dim,), (Part(role, dim, mean=start),), decay=False, multipliers=multipliers)
    if recipe.norm == "layernorm" and recipe.norm_bias:
        yield ParameterSpec(f"{name}.bias", (dim,), (Part(role, dim),), decay=False, multipliers=multipliers)


def _residual_gate(spec: ResidualSpec, name: str, dim: int) -> Iterator[ParameterSpec]:
    if isinstance(spec.gate, Learned):
        size = gate_size(spec.gate, dim)
        parts = (Part("residual_gate", size, mean=spec.gate.init),)
        yield ParameterSpec(name, (size,), parts, decay=False, multipliers=_multipliers(spec, "residual_gate"))


def _token_gate(spec: ResidualSpec, name: str, dim: int) -> Iterator[ParameterSpec]:
    if isinstance(spec.gate, TokenGate):
        multipliers = _multipliers(spec, "token_gate")
        yield ParameterSpec(f"{name}.weight", (1, dim), (Part("token_gate", 1),), decay=False, multipliers=multipliers)
        bias = (Part("token_gate", 1, mean=spec.gate.bias),)
        yield ParameterSpec(f"{name}.bias", (1,), bias, decay=False, multipliers=multipliers)


def _multipliers(spec: ResidualSpec, role: str) -> Multipliers:
    return spec.optim.get(role, spec.optim.get("*", PLAIN))


def default_embedding_std(recipe: ModelRecipe) -> float:
    """The recipe's standard deviation, else 1, or min(0.02, dim^-1/2) where the same matrix also makes the logits."""
    if recipe.init.embedding_std is not None:
        return recipe.init.embedding_std
    return min(0.02, recipe.dim**-0.5) if recipe.tied_embeddings else 1.0


def default_position_std(recipe: ModelRecipe) -> float:
    """The recipe's standard deviation, else half of the token embedding's, as in GPT-2 (0.01 and 0.02).

    Near-identity topologies pass the sum on almost unchanged, so positions as large as the tokens drown them: at 100
    sub-layers KEEL and DeepNorm learn measurably slower.
    """
    return recipe.init.position_std or 0.5 * default_embedding_std(recipe)
