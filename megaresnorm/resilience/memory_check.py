"""Whether a node can hold its ranks, checked before anything is built."""

import logging
from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch

from megaresnorm.activation_memory import Segments
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.errors import ConfigError
from megaresnorm.memory import MemoryPerRank, Need, memory_of_stages
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_auto import budget_in_bytes, memory_of_rank, plan_recompute
from megaresnorm.resilience.host import host_memory

log = logging.getLogger(__name__)


class Room(NamedTuple):
    """Memory of one kind in bytes: all there is, and what is free now."""

    kind: str
    total: int
    free: int


def check_memory(recipe: Recipe, sizes: Sizes, ranks_here: int, device: torch.device, *, first_rank: int = 0) -> None:
    """Check that this node can hold its ranks.

    Warns where memory suffices only if the activations turn out smaller than estimated, or other programs end.

    Args:
        recipe: resolved, so that model.vocab_size is set.
        ranks_here: how many ranks of this node share its memory.
        device: this rank's.
        first_rank: global number of the first of the node's ranks.

    Raises:
        ConfigError: what is allocated for certain is more than there is at all, or a rank needs more than
            recompute.budget in any case; the line has the figures.
    """
    segments = None
    if recipe.recompute.policy == "auto":
        memory = memory_of_rank(device, ranks_here)
        budget = budget_in_bytes(recipe, memory, on_gpu=device.type == "cuda")
        segments = plan_recompute(recipe, sizes, budget, device_type=device.type)
    if device.type == "cuda":
        own = first_rank + (device.index or 0)
        free, total = torch.cuda.mem_get_info(device)
        gpu = _Ranks(recipe, sizes, range(own, own + 1), device.type, True, segments)
        _check_room(gpu, Room("GPU memory", total, free))
    host = host_memory()
    if host is not None:
        here = range(first_rank, min(first_rank + ranks_here, sizes.num_ranks))
        _check_room(_Ranks(recipe, sizes, here, device.type, False, segments), Room("host memory", *host))


def need_of_host(recipe: Recipe, sizes: Sizes, ranks: Sequence[int], device: torch.device) -> Need:
    """What ranks take together of the memory of their host. Bytes.

    Args:
        recipe: resolved.
    """
    segments = None
    if recipe.recompute.policy == "auto":
        budget = budget_in_bytes(recipe, memory_of_rank(device, len(ranks)), on_gpu=device.type == "cuda")
        segments = plan_recompute(recipe, sizes, budget, device_type=device.type)
    return _Ranks(recipe, sizes, range(ranks[0], ranks[0] + len(ranks)), device.type, False, segments).need()[0]


class _Ranks(NamedTuple):
    """Ranks that share memory.

    Attributes:
        on_device: whether it is a GPU's memory; otherwise the host's.
        segments: as of ``memory_of_stages``.
    """

    recipe: Recipe
    sizes: Sizes
    ranks: range
    device_type: str
    on_device: bool
    segments: Segments | None = None

    def need(self) -> tuple[Need, MemoryPerRank]:
        """Sum over these ranks, and the memory of the one that needs most."""
        stages = memory_of_stages(self.recipe, self.sizes, device_type=self.device_type, segments=self.segments)
        each = [stages[rank // (self.sizes.num_ranks // self.sizes.pp)] for rank in self.ranks]
        needs = [memory.device if self.on_device else memory.host for memory in each]
        total = Need(sum(need.certain for need in needs), sum(need.likely for need in needs))
        return total, each[max(range(len(each)), key=lambda i: needs[i].likely)]


def _check_room(ranks: _Ranks, room: Room) -> None:
    (certain, likely), largest = ranks.need()
    if likely <= room.free:
        return
    who = "one rank" if len(ranks.ranks) == 1 else f"{len(ranks.ranks)} ranks of this node"
    kinds = f"of one rank: {largest.describe()}"
    if certain > room.total:
        raise ConfigError(
            f"the recipe does not fit: {who} need{'s' * (len(ranks.ranks) == 1)} at least {human_bytes(certain)} of "
            f"{room.kind}, there are {human_bytes(room.total)} ({kinds}); {_advice(ranks, certain, room)}"
        )
    log.warning(
        f"warning: memory may not suffice: {who} may need {human_bytes(likely)} of {room.kind}, at least "
        f"{human_bytes(certain)}; {human_bytes(room.free)} of {human_bytes(room.total)} are free ({kinds}); "
        f"{_less(ranks.recipe)} needs less"
    )


def _less(recipe: Recipe) -> str:
    again = "recompute=norm or block, or " if recipe.recompute.policies == {"none"} else ""
    return f"{again}a smaller train.micro_batch"


def _advice(ranks: _Ranks, certain: int, room: Room) -> str:
    """A setting that makes the recipe fit by itself; otherwise how many times as much hardware it needs."""
    settings = (
        ("checkpoint", "asynchronous", False),
        ("parallel", "accumulate", "sharded"),
        ("parallel", "reshard_after_forward", True),
        ("train", "micro_batch", 1),
    )
    for name, key, value in settings:
        section = getattr(ranks.recipe, name)
        if getattr(section, key) == value:
            continue
        changed = ranks.recipe.model_copy(update={name: section.model_copy(update={key: value})})
        if ranks._replace(recipe=changed).need()[0].certain <= room.total:
            return f"{name}.{key}={str(value).lower()} needs less, and can fit"
    return (
        f"divide the model over {ceil(certain / room.total)} times as many machines or more by parallel.dp_shard, "
        "tp or pp, or make it smaller"
    )
