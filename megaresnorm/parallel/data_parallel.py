"""Data parallelism: DistributedDataParallel and FSDP2 around a model. Gradients are sums over dp, not means.

FSDP2 and DTensor take a second to import, so that is done only where a model is sharded; elsewhere their objects are
known by their methods.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.replicas import Replicas
from megaresnorm.parallel.sharding import row_chunk

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# Elements that FSDP2 gathers ahead of the module that runs. A block of fewer computes for less time than the host takes
# to start the next gather and the network to begin it: a GPU would wait for every one. 16 Mi elements are 32 MiB in
# BF16, which a link of 50 GB/s sends in under a millisecond; more would only take memory.
PREFETCHED = 1 << 24


def shard_model(
    model: nn.Module, parts: Iterable[nn.Module], context: ParallelContext, *, reshard_after_forward: bool
) -> None:
    """Apply FSDP2 (fully_shard) to each part of a model and to the rest, on the meta device.

    Weights are gathered in their own type, FP32 (but see ``gather_in``), and the stream is never cast: a rank
    computes what one process would. On GPUs small parts gather those that follow (``prefetch``).

    Args:
        parts: modules whose weights are gathered together, in the order in which they run.
        reshard_after_forward: free gathered weights after forward, and gather them again for backward.

    Communication:
        Nothing yet. In training each part and the rest make one all-gather of their weights over dp_shard in forward,
        and with ``reshard_after_forward`` another in backward; ``grad_sync`` has their gradients.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    assert context.mesh is not None
    # Logits are a view where the vocabulary is padded; only generation asks for them, and nobody writes there.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    names = ("dp_replicate", "dp_shard") if context.dp_replicate.size > 1 else ("dp_shard",)
    options: dict[str, Any] = {
        "mesh": context.mesh[names],
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
    }
    parts = list(parts)
    for module in (*parts, model):
        fully_shard(module, **options)
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    if context.mesh.device_type != "cpu":  # where a gather is waited for at once
        prefetch(parts, backward=reshard_after_forward)


def prefetch(parts: Sequence[nn.Module], *, backward: bool, num_elements: int = PREFETCHED) -> None:
    """Let parts that FSDP2 has sharded start the gathers of those that run after them (``parts_ahead``).

    Args:
        parts: in the order in which they run.
        backward: also in backward, where weights are gathered again.

    Communication:
        What there was, earlier.
    """
    for ordered, directions in ((list(parts), "forward"), (list(reversed(parts)), "backward" if backward else "")):
        sizes = [sum(p.numel() for p in part.parameters()) for part in ordered]
        for part, ahead in zip(ordered, parts_ahead(sizes, num_elements), strict=True):
            if directions and ahead and (sharded := _as_sharded(part)) is not None:
                getattr(sharded, f"set_modules_to_{directions}_prefetch")([ordered[i] for i in ahead])


def parts_ahead(sizes: Sequence[int], num_elements: int = PREFETCHED) -> list[range]:
    """For each part the next ones whose gathers it starts: as many as have ``num_elements``, but at least one.

    A part of so many elements starts none; FSDP2 gathers the next one while it runs.

    >>> parts_ahead([50, 4, 4, 4, 4, 50], 10)
    [range(1, 1), range(2, 4), range(3, 5), range(4, 5), range(5, 6), range(6, 6)]
    """
    found = []
    for here, size in enumerate(sizes):
        first, total = here + 1, 0
        end = first
        while size < num_elements and end < len(sizes) and (end == first or total + sizes[end] <= num_elements):
            total += sizes[end]
            end += 1
        found.append(range(first, end))
    return found


def pad_uneven_shards(model: nn.Module) -> None:
    """Let FSDP2 pad, now, the shards of parameters that do not divide evenly. From then on local tensors stay in place.

    FSDP2 does it after each loading of a state dict, and of one without tensors as well.
    """
    model.load_state_dict({}, strict=False)


def placed_like(value: Tensor, parameter: nn.Parameter, axis: Axis) -> nn.Parameter:
    """A parameter of this value, sharded as ``parameter`` (on the meta device) is: over ``axis``, or not at all."""
    if not hasattr(parameter, "device_mesh"):
        return nn.Parameter(value)
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mine = row_chunk(value, axis).clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    placed = DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(placed)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor that FSDP2 has sharded; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a module."""
    return _as_sharded(module) is not None


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """The weights of a module that FSDP2 or ZeRO-3 has sharded are whole within. They stay so where they are already.

    Communication:
        One all-gather of its weights over dp_shard, or with ZeRO-3 over dp, if they are not whole.
    """
    absent: list[Any] = [p for p in module.parameters() if hasattr(p, "ds_status") and p.ds_status.name != "AVAILABLE"]
    if absent:
        absent[0].all_gather(absent)
        try:
            yield
        finally:
            absent[0].partition(absent)
        return
    sharded = _as_sharded(module)
    if sharded is None or not any(hasattr(parameter, "device_mesh") for parameter in module.parameters()):
        yield
        return
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def _as_sharded(module: nn.Module) -> "FSDPModule | None":
    """A module that ``fully_shard`` has been applied to; None for any other."""
    return cast("FSDPModule", module) if hasattr(module, "set_requires_gradient_sync") else None


def replicate_model(model: nn.Module, data: Axis) -> DistributedDataParallel | Replicas:
    """Wrap a model in DistributedDataParallel that sums gradients, or in ``Replicas``.

    The latter for weights in BF16; and for three copies or more on CPUs. DDP makes its buckets anew after the first
    step of a process, and where three ranks add, a gradient's place in its bucket decides in which order: a run that
    resumes would differ from one that never stopped in the last bits of one step.

    Gradients become views of DDP's buckets once they are summed: they are not copied back. Until then those of earlier
    microbatches are beside the buckets.

    Communication:
        In the backward pass of a step's last microbatch (``grad_sync``) one all-reduce of each of DDP's buckets, which
        together are all gradients.
    """
    parameters = list(model.parameters())
    on_cpus = data.size > 2 and parameters[0].device.type == "cpu"
    if on_cpus or any(parameter.dtype == torch.bfloat16 for parameter in parameters):
        return Replicas(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option; 2.11 does not know the new name
        # Buffers are copies of weights, which every rank renews itself.
        ddp = DistributedDataParallel(
            model,
            process_group=data.group,
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    ddp.register_comm_hook(data.group, _sum)
    return ddp


def _sum(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def accumulate_in_shards(model: "FSDPModule", last: bool, *, sharded: bool) -> None:
    """Set what FSDP2 does with the gradients of the next backward pass. The arguments are those of ``grad_sync``."""
    model.set_requires_gradient_sync(last or sharded)
    model.set_requires_all_reduce(last)


@contextmanager
def grad_sync(model: nn.Module, last: bool, *, sharded: bool) -> Iterator[None]:
    """Reduce the gradients of one microbatch over dp, or not yet. Goes around its forward and backward pass.

    Args:
        last: whether it is the last microbatch of the step.
        sharded: with FSDP2, whether the gradients of every microbatch are reduced and scattered, so that a rank never
            keeps more than its shard of them. Otherwise it keeps whole gradients until the last microbatch.

    Communication:
        DDP and ``Replicas`` make all-reduces of all gradients over dp in the last microbatch. FSDP2 makes one
        reduce-scatter over dp_shard for each part of ``shard_model``, in every microbatch if ``sharded``, else in the
        last. The replicas of a sharded group are summed over dp_replicate in the last microbatch in either case.
    """
    if (sharded_model := _as_sharded(model)) is not None:
        accumulate_in_shards(sharded_model, last, sharded=sharded)
        yield
    elif isinstance(model, Replicas):
        with model.summed(last):
            yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
