"""Memory of all ranks of a recipe, under whatever engine."""

from typing import Protocol

from megaresnorm.activation_memory import ActivationMemory, Segments
from megaresnorm.layout import check_layout
from megaresnorm.memory.kinds import MemoryPerRank
from megaresnorm.memory.native import NativeMemory
from megaresnorm.memory.zero import ZeroMemory
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_budget import Held, Plan, TooSmall, solve
from megaresnorm.recompute_plan import segments_of


class States(Protocol):
    """What an engine keeps beside activations."""

    def of_rank(self, rank: int) -> MemoryPerRank:
        """Kinds of memory of a pp rank, without activations and sums."""

    def added_up(self, memory: MemoryPerRank, held: Held, offloaded: int) -> MemoryPerRank:
        """Add activations, and what device and host need, as the largest sum over a few moments of what exists then.

        Args:
            memory: of ``of_rank``.
            offloaded: of the activations, those that are in host memory instead of a GPU's.
        """


class MemoryAccounts:
    """Sums for one recipe in one layout."""

    def __init__(self, recipe: Recipe, sizes: Sizes, device_type: str) -> None:
        self.recipe, self.sizes = recipe, sizes
        self.on_cpu = device_type == "cpu"
        self.activations = ActivationMemory(recipe, sizes, device_type)
        native = recipe.engine.name == "native"
        self.states: States = NativeMemory(self.activations) if native else ZeroMemory(self.activations)

    def of_ranks(self, segments: Segments | None) -> list[MemoryPerRank]:
        """Memory by pp rank."""
        return [self.of_rank(rank, segments or self._named_segments(rank)) for rank in range(self.sizes.pp)]

    def of_rank(self, rank: int, segments: Segments) -> MemoryPerRank:
        """Memory of a pp rank whose stages recompute as ``segments`` say."""
        held, offloaded = self.activations.of_rank(rank, segments)
        return self.states.added_up(self.states.of_rank(rank), held, offloaded)

    def plan(self, rank: int, budget: int) -> Plan:
        """A choice of recomputation for the stages of a pp rank.

        Raises:
            TooSmall: a rank needs more in any case.
        """
        others, costs = self.states.of_rank(rank), [*map(self.activations.stage, self.activations.stages_of(rank))]

        def need(held: Held) -> int:
            memory = self.states.added_up(others, held, 0)
            return (memory.host if self.on_cpu else memory.device).likely

        return solve(costs, need, budget)

    def _named_segments(self, rank: int) -> Segments:
        recompute, stages = self.recipe.recompute, self.activations.stages
        if recompute.policy != "auto":
            return {n: segments_of(recompute, stages[n].blocks) for n in self.activations.stages_of(rank)}
        try:
            least = self.plan(rank, 0)
        except TooSmall as e:
            least = e.plan
        return self.activations.segments(rank, least)


def memory_per_rank(recipe: Recipe, ranks: int | Sizes, *, device_type: str = "cpu") -> MemoryPerRank:
    """Memory of the rank that needs most. ``recipe`` must be resolved: model.vocab_size is set.

    Raises:
        ConfigError: the layout does not fit the number of ranks.
    """
    return max(memory_of_stages(recipe, ranks, device_type=device_type), key=lambda memory: memory.needed)


def memory_of_stages(
    recipe: Recipe, ranks: int | Sizes, *, device_type: str = "cpu", segments: Segments | None = None
) -> list[MemoryPerRank]:
    """Memory by pp rank. Along the other axes it is that of the rank that needs most.

    Args:
        segments: of every stage; None: as the recipe names them, for policy auto those that need least.
    """
    sizes = check_layout(recipe, ranks) if isinstance(ranks, int) else ranks
    return MemoryAccounts(recipe, sizes, device_type).of_ranks(segments)
