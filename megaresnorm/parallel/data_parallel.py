"""Data parallelism: DistributedDataParallel and FSDP2 around a model. Gradients are sums over dp, not means.

FSDP2 and DTensor take a second to import, so that is done only where a model is sharded; elsewhere their objects are
known by their methods.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.sharding import row_chunk

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def shard_model(
    model: nn.Module, parts: Iterable[nn.Module], context: ParallelContext, *, reshard_after_forward: bool
) -> None:
    """Apply FSDP2 (fully_shard) to each part of a model and to the rest, on the meta device.

    Weights are gathered in their own type, FP32, and the stream is never cast: a rank computes what one process would.

    Args:
        parts: modules whose weights are gathered together.
        reshard_after_forward: free gathered weights after forward, and gather them again for backward.

    Communication:
        Nothing yet. In training each part and the rest make one all-gather of their weights over dp_shard in forward,
        and with ``reshard_after_forward`` another in backward; ``grad_sync`` has their gradients.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    assert context.mesh is not None
    # The logits are a view where the vocabulary is padded. The loss writes its gradient there, which no hook needs to
    # see.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    names = ("dp_replicate", "dp_shard") if context.dp_replicate.size > 1 else ("dp_shard",)
    options: dict[str, Any] = {
        "mesh": context.mesh[names],
        "reshard_after_forward": reshard_after_forward,
        "mp_policy": MixedPrecisionPolicy(cast_forward_inputs=False),
    }
    for module in (*parts, model):
        fully_shard(module, **options)
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def pad_uneven_shards(model: nn.Module, axis: Axis) -> None:
    """Let FSDP2 pad, now, the parameters that do not divide evenly over ``axis``. Collective.

    From then on local tensors stay in place.

    Communication:
        One all-gather of the weights of each module with such a parameter.
    """
    for module in model.modules():
        sharded = _as_sharded(module)
        if sharded is not None and any(p.dim() and p.shape[0] % axis.size for p in module.parameters()):
            sharded.unshard()
            sharded.reshard()


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


def _as_sharded(module: nn.Module) -> "FSDPModule | None":
    """A module that ``fully_shard`` has been applied to; None for any other."""
    return cast("FSDPModule", module) if hasattr(module, "set_requires_gradient_sync") else None


def replicate_model(model: nn.Module, data: Axis) -> DistributedDataParallel:
    """Wrap a model in DistributedDataParallel that sums gradients.

    Communication:
        In the backward pass of a step's last microbatch (``grad_sync``) one all-reduce of each of DDP's buckets, which
        together are all gradients.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 renames the option; 2.11 does not know the new name
        # Buffers are copies of weights, which every rank renews itself.
        ddp = DistributedDataParallel(model, process_group=data.group, init_sync=False, broadcast_buffers=False)
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
        DDP makes all-reduces of all gradients over dp in the last microbatch. FSDP2 makes one reduce-scatter over
        dp_shard for each part of ``shard_model``, in every microbatch if ``sharded``, else in the last. The replicas of
        a sharded group are summed over dp_replicate in the last microbatch in either case.
    """
    if (sharded_model := _as_sharded(model)) is not None:
        accumulate_in_shards(sharded_model, last, sharded=sharded)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
