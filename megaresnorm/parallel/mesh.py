"""Parallelism as an object: one Axis per kind of parallelism, handed to whoever needs it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # private; torch 2.11 to 2.13 have nothing else for it

from megaresnorm.errors import ConfigError
from megaresnorm.parallel.shared_memory import SharedMemory
from megaresnorm.parallel.transport import Gloo, OneHost, Transport, transport_of

MESH_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")  # outermost first: neighbours in tp are neighbouring ranks
TIMEOUT = 1800.0  # seconds that ranks wait for each other where a program does not say


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh of ranks, or several taken together.

    Attributes:
        name: as in the recipe, or as in ``ParallelContext`` where several are taken together.
        size: number of its ranks.
        rank: index of this rank among them.
        group: their process group; None where the axis has one rank, so that nothing is sent.
        transport: how they send. Left None with a group, it becomes the one of the group's backend.
    """

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    transport: Transport | None = None

    def __post_init__(self) -> None:
        if self.group is not None and self.transport is None:
            object.__setattr__(self, "transport", transport_of(self.group, self.rank, self.size))


@dataclass(frozen=True)
class Sizes:
    """Number of ranks on each axis."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the whole mesh."""
        return prod(getattr(self, name) for name in MESH_AXES)

    @property
    def product(self) -> str:
        """The axes with more than one rank, as in ``dp_replicate 4 * tp 2``; empty where there is none."""
        return " * ".join(f"{name} {getattr(self, name)}" for name in MESH_AXES if getattr(self, name) > 1)


@dataclass(frozen=True)
class ParallelContext:
    """The axes of a run. An object, never a global.

    Attributes:
        pp, dp_replicate, dp_shard, cp, tp: the axes of the mesh.
        dp: dp_replicate and dp_shard together, whose ranks read different samples.
        model_shards: dp_shard and tp together, whose ranks hold parts of the same tensors.
        world: all ranks.
        embedding: the first and the last stage of a pipeline, which both have a tied embedding; size 1 elsewhere.
        control: all ranks, on CPUs whatever the device, for small agreements and for the thread that writes
            checkpoints.
        mesh: torch's own, for FSDP2; None in one process.
    """

    pp: Axis
    dp_replicate: Axis
    dp_shard: Axis
    cp: Axis
    tp: Axis
    dp: Axis
    model_shards: Axis
    world: Axis
    embedding: Axis
    control: Axis
    mesh: DeviceMesh | None = None

    @classmethod
    def single(cls) -> "ParallelContext":
        """One process: every axis has size 1. The reference of every parallel test.

        >>> ParallelContext.single().is_first_rank
        True
        """
        axes: dict[str, Any] = {field.name: Axis(field.name) for field in fields(cls) if field.name != "mesh"}
        return cls(**axes)

    @classmethod
    def create(cls, sizes: Sizes, device_type: str, timeout: float = TIMEOUT) -> "ParallelContext":
        """The context of this rank in the process group that ``start_process_group`` has made. Collective.

        Args:
            sizes: of the axes; they make up the number of ranks (``resolve_sizes``).
            timeout: seconds that ranks wait for each other in any of its groups, until ``set_timeouts``.

        Communication:
            Making the process groups of the axes; on CPUs also ``SharedMemory.open`` over tp.
        """
        if sizes.num_ranks == 1:
            return cls.single()
        shape = tuple(getattr(sizes, name) for name in MESH_AXES)
        urgent = urgent_options(device_type, timeout) if sizes.tp > 1 else None
        override: Any = None if urgent is None else {"tp": urgent}
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=MESH_AXES, backend_override=override)
        ranks = torch.arange(sizes.num_ranks).view(shape)
        axes = {
            name: Axis(name, size, mesh.get_local_rank(name), mesh.get_group(name)) if size > 1 else Axis(name)
            for name, size in zip(MESH_AXES, shape, strict=True)
        }
        together = {"dp": [1, 2], "model_shards": [2, 4], "world": [0, 1, 2, 3, 4]}
        axes |= {name: _axis(name, ranks, dims, timeout) for name, dims in together.items()}
        axes["embedding"] = _axis("embedding", ranks[[0, -1]], [0], timeout) if sizes.pp > 1 else Axis("embedding")
        axes = {name: _sending(axis, device_type) for name, axis in axes.items()}
        tp = axes["tp"]
        if isinstance(tp.transport, Gloo) and tp.group is not None:
            memory = SharedMemory.open(tp.group, tp.rank, tp.size)
            axes["tp"] = tp if memory is None else replace(tp, transport=OneHost(memory, tp.transport))
        everyone = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        axes["control"] = Axis("control", sizes.num_ranks, dist.get_rank(), everyone)
        context = cls(**axes, mesh=mesh)
        context.set_timeouts(timeout, timeout)  # those of the mesh have torch's own
        return context

    def set_timeouts(self, timeout: float, writing: float) -> None:
        """Change how long this rank waits for others, from its next message on.

        One message is the exception: what a stage of a pipeline receives over gloo. For that torch 2.13 keeps what the
        group was made with, and has half an hour of its own for a group of some of the ranks.

        Args:
            timeout: seconds.
            writing: seconds for ``control``, where ranks wait for the slowest to have written its part of a checkpoint.
        """
        for axis in vars(self).values():
            if isinstance(axis, Axis) and axis.group is not None:
                _set_pg_timeout(timedelta(seconds=writing if axis is self.control else timeout), axis.group)

    @property
    def is_first_rank(self) -> bool:
        """True on the one rank that logs and writes metrics."""
        return self.world.rank == 0


def urgent_options(device_type: str, timeout: float = TIMEOUT) -> Any | None:
    """Options of an nccl group whose kernels start before others that wait, on a stream of high priority.

    For tensor parallelism: its messages are started just before the products that hide them, whose thread blocks would
    fill the GPU first.

    Returns:
        None on CPUs, and where torch is built without nccl.
    """
    nccl = getattr(dist, "ProcessGroupNCCL", None)
    if device_type != "cuda" or nccl is None:
        return None
    options = nccl.Options(is_high_priority_stream=True)
    options._timeout = timedelta(seconds=timeout)  # with options a mesh takes theirs
    return options


def _sending(axis: Axis, device_type: str) -> Axis:
    """The axis with the transport for tensors of the run's device, whatever else its group could send."""
    if axis.group is None:
        return axis
    return replace(axis, transport=transport_of(axis.group, axis.rank, axis.size, device_type))


def _axis(name: str, ranks: torch.Tensor, dims: Sequence[int], timeout: float) -> Axis:
    """The axis made of some dims of the mesh, with this rank's group on it. Collective.

    Every group is made by all ranks, in the same order.
    """
    others = [d for d in range(ranks.dim()) if d not in dims]
    groups = ranks.permute(*others, *dims).reshape(-1, prod(ranks.shape[d] for d in dims))
    mine, found = dist.get_rank(), Axis(name)
    if groups.shape[1] == 1:
        return found
    for members in groups.tolist():
        group = dist.new_group(members, timeout=timedelta(seconds=timeout))
        if mine in members:
            found = Axis(name, len(members), members.index(mine), group)
    return found


def resolve_sizes(num_ranks: int, *, pp: int, dp_replicate: int | None, dp_shard: int, tp: int) -> Sizes:
    """Sizes of all axes.

    Args:
        dp_replicate: None takes the ranks that are left.

    Raises:
        ConfigError: the product is not ``num_ranks``. The line spells it out and says what would fit.
    """
    chosen = dp_replicate is not None
    if dp_replicate is None:
        dp_replicate = max(1, num_ranks // (pp * dp_shard * tp))
    sizes = Sizes(pp, dp_replicate, dp_shard, 1, tp)
    if sizes.num_ranks == num_ranks:
        return sizes
    spelled = f"pp {pp} * dp_replicate {dp_replicate} * dp_shard {dp_shard} * tp {tp} = {sizes.num_ranks}"
    data = dp_shard * (dp_replicate if chosen else 1)
    smaller = [
        f"tp={t} pp={p}"
        for t, p in ((tp, 1), (1, pp), (1, 1))
        if (t, p) != (tp, pp) and (num_ranks == t * p * data if chosen else num_ranks % (t * p * data) == 0)
    ]
    start = f"start {sizes.num_ranks} ranks"
    if num_ranks == 1:
        start += f" (megaresnorm launch RECIPE --gpus-per-node {sizes.num_ranks} ...)"
    rest = num_ranks // (pp * tp) if num_ranks % (pp * tp) == 0 else 0
    shards = [s for s in range(1, min(rest, 1024) + 1) if rest % s == 0] if dp_shard > 1 and not chosen else []
    offers = [start, *dict.fromkeys(smaller), *([f"parallel.dp_shard in {shards}"] if shards else [])]
    count = f"{num_ranks} rank{'s were' if num_ranks > 1 else ' was'} started"
    raise ConfigError(f"parallel: {spelled}, but {count}; {', or '.join(offers)}")


def usable_ranks(num_ranks: int, *, pp: int, dp_replicate: int | None, dp_shard: int, tp: int) -> int:
    """Number of an elastic job's ranks that can work: the largest multiple of a whole model.

    It is 0 where there are too few for one.

    >>> usable_ranks(56, pp=4, dp_replicate=None, dp_shard=1, tp=8)
    32
    >>> usable_ranks(3, pp=4, dp_replicate=None, dp_shard=1, tp=1)
    0
    """
    least = pp * (dp_replicate or 1) * dp_shard * tp
    return least * min(num_ranks // least, 1) if dp_replicate is not None else num_ranks // least * least


def start_process_group(device: torch.device, store: Store, rank: int, num_ranks: int, timeout: float) -> None:
    """Join the ranks that have met in ``store``: nccl on GPUs, gloo on CPUs. Collective.

    Args:
        timeout: seconds that they wait for each other.

    Communication:
        The ranks find each other's addresses through the store.
    """
    if dist.is_initialized():
        return
    options: dict[str, Any] = {"store": PrefixStore("group", store), "rank": rank, "world_size": num_ranks}
    options["timeout"] = timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)


def end_process_group() -> None:
    """Leave the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_contact(error: BaseException) -> str | None:
    """Why the process group cannot reach another rank, where that is the error or has caused it.

    Causes are looked through because torch's pipelines wrap errors into others. gloo has no type of its own for it.

    Returns:
        The reason in words; None for any other error.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, dist.DistError) or (
            isinstance(cause, RuntimeError)
            and ("connectFullMesh" in str(cause) or (dist.is_initialized() and "gloo" in str(cause)))
        ):
            return str(cause).rpartition(".cc:")[2].partition("] ")[2].partition(". ")[0] or str(cause).splitlines()[0]
        cause = cause.__cause__
    return None
