"""One table of the parameters by global name: shape, logical parts, initialisation, decay, optimizer multipliers.

It is computed from the recipe alone, for the whole model; every sub-layer describes its own. Initialisation, optimizer
and checkpoints read it; no tensor carries settings of its own.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from megaresnorm.model.branches import BRANCHES
from megaresnorm.model.residual import Residual
from megaresnorm.model.specs import PLAIN, ParameterSpec, Part, norm_parameters
from megaresnorm.model.topology import SUBLAYERS, residual_at, topology
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe


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
            name, (rows, recipe.dim), (Part(role, rows, std=std),), decay=True, multipliers=multipliers, matrix=True
        )

    embedding_std = default_embedding_std(recipe)
    yield table("embedding.weight", "embedding", recipe.padded_vocab_size, embedding_std)
    if recipe.positions == "learned":
        yield table("positions.weight", "position", recipe.seq_len, default_position_std(recipe))
    if has_embedding_norm(recipe):
        yield from norm_parameters(recipe, "embedding_norm", recipe.dim)
    for block in blocks:
        for kind in SUBLAYERS:
            spec = residual_at(recipe, block, kind)
            yield from Residual.parameter_specs(recipe, spec, BRANCHES[kind], f"blocks.{block}.{kind}")
    if wiring.final_norm:
        yield from norm_parameters(recipe, "final_norm", recipe.dim)
    if not recipe.tied_embeddings:
        yield table(
            "head.weight", "head", recipe.padded_vocab_size, init.head_std or wiring.head_std(recipe.dim, options)
        )


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
