"""Sizes of a recipe's parameters on one rank, whatever engine trains them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import ceil
from typing import NamedTuple

from megaresnorm.activation_memory import ActivationMemory
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import IN_BRANCHES, ParameterSpec
from megaresnorm.model.transformer import Stage
from megaresnorm.optim import AdamW
from megaresnorm.precision.dtypes import half_dtype, stored_dtypes, weight_dtype

_LINEAR_ROLES = (*IN_BRANCHES, "head")  # the first parts of matrices that linear layers multiply by


class Unit(NamedTuple):
    """``times`` equal groups of parameters, each of which FSDP2 gathers and frees as a whole."""

    specs: Sequence[ParameterSpec]
    times: int = 1
    in_fp8: bool = False


class ParameterMemory:
    """Parameters of one recipe in one layout.

    Args:
        of: has the recipe and the layout.

    Attributes:
        word: bytes of an element of a gradient, or of a moment.
        compute: bytes of an element of what products read.
    """

    def __init__(self, of: ActivationMemory) -> None:
        self.recipe, self.sizes, self.model = of.recipe, of.sizes, of.model
        self.word = weight_dtype(self.recipe.precision.compute).itemsize
        self.dtypes = stored_dtypes(self.recipe.precision)
        self.compute, self._kinds = of.compute, of.kinds
        self._examples = {kind: block for block, kind in reversed([*enumerate(of.kinds)])}
        layout = self.recipe.parallel.tensor_layout if self.sizes.tp > 1 else "full"
        self.table = parameter_table(self.model, layout, sorted(self._examples.values()))

    def units(self, stage: Stage) -> list[Unit]:
        """FSDP2 units of a stage, as in Transformer.parts: its blocks, embedding and head (one if tied), the rest."""
        blocks = Counter(self._kinds[block] for block in stage.blocks)
        units = [
            Unit(self._named(f"blocks.{self._examples[kind]}."), count, kind.in_fp8) for kind, count in blocks.items()
        ]
        tied = self.model.tied_embeddings
        ends = self._named("embedding.") if stage.has_embedding or (tied and stage.has_head) else []
        head = self._named("head.") if stage.has_head else []
        rest = self._named("positions.", "embedding_norm.") if stage.has_embedding else []
        rest += self._named("final_norm.") if stage.has_head else []
        groups = [ends + rest] if tied else [ends, head, rest]
        return units + [Unit(group) for group in groups if group]

    def in_order(self) -> Iterator[ParameterSpec]:
        """Every parameter of the whole model, in its order; of equal blocks the same specification each."""
        yield from self._named("embedding.", "positions.", "embedding_norm.")
        blocks = {kind: self._named(f"blocks.{block}.") for kind, block in self._examples.items()}
        for kind in self._kinds:
            yield from blocks[kind]
        yield from self._named("final_norm.", "head.")

    def _named(self, *prefixes: str) -> list[ParameterSpec]:
        return [spec for name, spec in self.table.items() if name.startswith(prefixes)]

    def sum(self, units: Iterable[Unit], size: Callable[[ParameterSpec], int]) -> int:
        """Of a size of every parameter."""
        return sum(unit.times * sum(map(size, unit.specs)) for unit in units)

    def weights(self, units: Iterable[Unit]) -> int:
        """Bytes of this rank's part of the parameters, in the types in which they are stored."""
        return self.sum(units, lambda spec: self.dtypes.of(spec).itemsize * self.held(spec))

    def held(self, spec: ParameterSpec) -> int:
        """Elements that a rank has: FSDP2 shards rows, and pads every rank to as many as the first has."""
        rows = spec.shape[0] // (self.sizes.tp if spec.split == 0 else 1)
        width = spec.num_elements // spec.shape[0] // (self.sizes.tp if spec.split else 1)
        return ceil(rows / self.sizes.dp_shard) * width

    def copies(self, units: list[Unit], has_head: bool) -> int:
        """Copies (precision/copies.py) of matrices, and of a tied embedding that makes logits; under FSDP2 of FP8."""
        if half_dtype(self.recipe.precision) is None:
            return 0
        tied, sharded = self.model.tied_embeddings and has_head, self.sizes.dp_shard > 1

        def size(spec: ParameterSpec) -> int:
            linear = spec.parts[0].role in _LINEAR_ROLES or (tied and spec.name == "embedding.weight")
            return self.compute * self.held(spec) if linear and len(spec.shape) == 2 and not sharded else 0

        codes = sum(unit.times * self.codes(unit, self.held) for unit in units)
        return codes + self.sum((unit for unit in units if not unit.in_fp8), size)

    def codes(self, unit: Unit, elements: Callable[[ParameterSpec], int]) -> int:
        """Codes of the matrices of one unit that are in FP8."""
        read = (spec for spec in unit.specs if spec.matrix and spec.parts[0].role in _LINEAR_ROLES)
        return sum(map(elements, read)) if unit.in_fp8 else 0

    def checkpoint(self, units: list[Unit], stages: Iterable[Stage]) -> int:
        """Weights and moments that this rank writes; replicated ones are shared out evenly (engines/state.py)."""
        copy = self.model.tied_embeddings and not any(stage.has_embedding for stage in stages)

        def size(spec: ParameterSpec) -> int:
            held = 0 if copy and spec.name == "embedding.weight" else self.held(spec)
            return held * (self.sizes.tp if spec.split is not None else 1) * (self.dtypes.of(spec).itemsize + moments)

        moments, shares = len(AdamW.names) * self.word, self.sizes.tp * self.sizes.dp_replicate
        return self.sum(units, size) // shares if self.recipe.checkpoint.asynchronous else 0

    def building(self, units: list[Unit]) -> int:
        """Whole FP32 tensors that model/init.py draws of what is sharded or rounded, one after the other."""
        specs = (spec for unit in units for spec in unit.specs)
        drawn = (s for s in specs if self.held(s) < s.num_elements or self.dtypes.of(s).itemsize < 4)
        return 4 * max((spec.num_elements for spec in drawn), default=0)
