"""recompute.policy=auto: the memory that a rank may use, and the blocks that are recomputed so that it does."""

import json
import socket
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from megaresnorm.activation_memory import Segments
from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.errors import ConfigError
from megaresnorm.memory import RESERVE, MemoryAccounts, memory_of_stages
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.mesh import MESH_AXES, ParallelContext, Sizes
from megaresnorm.parallel.stages import stages_of_rank
from megaresnorm.reading import bytes_of_size
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.recompute import SHARE
from megaresnorm.recompute_budget import TooSmall
from megaresnorm.recompute_plan import Segment
from megaresnorm.resilience.host import host_memory

SCHEMA_VERSION = 1  # of RUN/recompute.json


def plan_recompute(recipe: Recipe, sizes: Sizes, budget: int, *, device_type: str = "cpu") -> dict[int, list[Segment]]:
    """Segments of every stage: the fastest that are found to fit.

    Args:
        budget: bytes that a rank may use in all, of a GPU's memory or on CPUs of the host's.

    Raises:
        ConfigError: a rank needs more in any case; the line has the figures.
    """
    accounts = MemoryAccounts(recipe, sizes, device_type)
    chosen: dict[int, list[Segment]] = {}
    for rank in range(sizes.pp):
        try:
            chosen |= accounts.activations.segments(rank, accounts.plan(rank, budget))
        except TooSmall as e:
            segments = accounts.activations.segments(rank, e.plan)
            least = accounts.of_rank(rank, segments)
            blocks = "; ".join(map(describe_segments, segments.values()))
            kinds = least.describe("all" if accounts.on_cpu else "device")
            given = recipe.recompute.budget
            asked = "recompute.policy=auto" if given is None else f"recompute.budget={given}"
            raise ConfigError(
                f"{asked}: a rank may use {human_bytes(budget)} and needs at least "
                f"{human_bytes(e.least, at_least=True)} ({kinds}) even with {blocks}; raise the budget, lower "
                "train.micro_batch, or divide the model over more ranks by parallel.dp_shard, tp or pp"
            ) from None
    return chosen


def budget_in_bytes(recipe: Recipe, memory: int | None, *, on_gpu: bool = False) -> int:
    """Bytes that a rank may use.

    Args:
        memory: that it has in all; None where it is not known.
        on_gpu: whether it is a GPU's, where ``RESERVE`` is left free unless a budget is given.

    Raises:
        ConfigError: the budget is a share of memory that is not known.
    """
    budget = SHARE if recipe.recompute.budget is None else recipe.recompute.budget
    if isinstance(budget, str):
        return bytes_of_size(budget)
    if budget > 1:
        return int(budget)
    if memory is None:
        raise ConfigError(
            f"recompute.budget={budget} is a share of this machine's memory, which is not known here; give a size, "
            "such as 20GiB"
        )
    unasked = recipe.recompute.budget is None and on_gpu
    return int(min(budget * memory, max(memory - RESERVE, memory // 2))) if unasked else int(budget * memory)


def memory_of_rank(device: torch.device, ranks_here: int) -> int | None:
    """Bytes of a rank's GPU, or on CPUs its part of this machine's memory; None where that is not known.

    Args:
        ranks_here: ranks that share this machine.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    host = host_memory()
    return None if host is None else host.total // ranks_here


def sizes_of(context: ParallelContext) -> Sizes:
    """The sizes of the axes of a context."""
    return Sizes(**{name: getattr(context, name).size for name in MESH_AXES})


def plan_on_all_ranks(recipe: Recipe, context: ParallelContext, device: torch.device) -> dict[int, list[Segment]]:
    """``plan_recompute`` for the rank with the least memory, so that all ranks have the same segments. Collective.

    Communication:
        Two ``all_gather_json`` over control: the machine of every rank, and the memory of each.

    Raises:
        ConfigError: as ``plan_recompute`` and ``budget_in_bytes``, on all ranks.
    """
    machine = socket.gethostname()
    ranks_here = all_gather_json(machine, context.control).count(machine)
    found = all_gather_json(memory_of_rank(device, ranks_here), context.control)
    least = None if None in found else min(found)
    budget = budget_in_bytes(recipe, least, on_gpu=device.type == "cuda")
    return plan_recompute(recipe, sizes_of(context), budget, device_type=device.type)


def describe_segments(segments: list[Segment]) -> str:
    """Segments in words.

    >>> describe_segments([Segment(range(0, 3), "every"), Segment(range(3, 6), "every"), Segment(range(6, 7), "none")])
    'blocks 0-5 every 3, 6 none'
    """
    parts = (f"{first}-{last}" if first < last else f"{first}" for first, last, _, _ in _merged(segments))
    words = (f"{policy} {every}" if every else policy for _, _, policy, every in _merged(segments))
    return "blocks " + ", ".join(f"{part} {word}" for part, word in zip(parts, words, strict=True))


def describe_recompute(recipe: Recipe, sizes: Sizes, segments: Segments, device_type: str) -> list[str]:
    """What is recomputed, a line for each stage, with the activations of its rank; nothing where nothing is.

    Args:
        segments: of all stages.
    """
    policy = recipe.recompute.policy
    if policy != "auto" and all(segment.policy == "none" for some in segments.values() for segment in some):
        return []
    memory = memory_of_stages(recipe, sizes, device_type=device_type, segments=segments)
    lines = []
    for number in sorted(segments):
        rank = memory[number % sizes.pp]
        given = f" within {recipe.recompute.budget or SHARE}" if policy == "auto" else ""
        which = f"{policy}{given}: " if number == 0 else ""
        stage = f"stage {number}: " if len(segments) > 1 else ""
        blocks = describe_segments(list(segments[number])) if segments[number] else "no blocks"
        away = f", {human_bytes(rank.offloaded)} in host memory" if rank.offloaded else ""
        shared = len(segments) > sizes.pp and number >= sizes.pp  # told with the rank's first stage
        told = "" if shared else f"; {human_bytes(rank.activations)} of activations{away}"
        lines.append(f"{which}{stage}{blocks}{told}")
    return lines


def recompute_file(recipe: Recipe, context: ParallelContext, segments: Segments, device_type: str) -> str:
    """The content of RUN/recompute.json."""
    sizes = sizes_of(context)
    memory = memory_of_stages(recipe, sizes, device_type=device_type, segments=segments)
    ranks = [
        {"stages": stages_of_rank(rank, sizes.pp, len(segments)), "activations": one.activations,
         "offloaded": one.offloaded, "memory": (one.host if device_type == "cpu" else one.device).likely}
        for rank, one in enumerate(memory)
    ]  # fmt: skip
    stages = [
        {"stage": number, "segments": [_entry(*one) for one in _merged(list(some))]}
        for number, some in sorted(segments.items())
    ]
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "policy": recipe.recompute.policy}
    return json.dumps(content | {"stages": stages, "ranks": ranks}, indent=1) + "\n"


def _entry(first: int, last: int, policy: str, every: int) -> dict[str, Any]:
    return {"first": first, "last": last, "policy": policy} | ({"every": every} if every else {})


def _merged(segments: list[Segment]) -> Iterator[tuple[int, int, str, int]]:
    """First and last block, policy and length of a span of segments that are alike; 0 where there are no spans."""

    def alike(segment: Segment) -> tuple[str, int]:
        every = len(segment.blocks) if segment.policy == "every" else 0
        return ("block", 0) if every == 1 else (segment.policy, every)

    for (policy, every), same in groupby(segments, key=alike):
        together = list(same)
        yield together[0].blocks.start, together[-1].blocks.stop - 1, policy, every
