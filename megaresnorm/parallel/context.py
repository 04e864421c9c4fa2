"""Parallelism as an object: one Axis per kind of parallelism, handed to whoever needs it."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh of ranks: how many ranks it has and which one this is."""

    name: str
    size: int = 1
    rank: int = 0


@dataclass(frozen=True)
class ParallelContext:
    """The axes of a run, outermost first. An object, never a global."""

    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis

    @classmethod
    def single(cls) -> "ParallelContext":
        """One process: every axis has size 1. The reference of every parallel test.

        >>> ParallelContext.single().is_first_rank
        True
        """
        return cls(*(Axis(field.name) for field in fields(cls)))

    @property
    def is_first_rank(self) -> bool:
        """True on the one rank that logs and writes metrics."""
        return all(getattr(self, field.name).rank == 0 for field in fields(self))

    @property
    def num_data_ranks(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate.size * self.dp_shard.size

    @property
    def data_rank(self) -> int:
        """Which of those this is."""
        return self.dp_replicate.rank * self.dp_shard.size + self.dp_shard.rank
