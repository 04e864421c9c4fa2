"""Memory that a recipe takes on each rank, computed before anything is built.

Everything here is arithmetic on the recipe and the ranks: no tensor is made. What is allocated for certain is counted
as the code allocates it; activations are an estimate. Units are bytes.
"""

from megaresnorm.memory.accounts import MemoryAccounts, memory_of_stages, memory_per_rank
from megaresnorm.memory.kinds import NOTHING, PROCESS, RESERVE, MemoryPerRank, Need

__all__ = [
    "NOTHING",
    "PROCESS",
    "RESERVE",
    "MemoryAccounts",
    "MemoryPerRank",
    "Need",
    "memory_of_stages",
    "memory_per_rank",
]
