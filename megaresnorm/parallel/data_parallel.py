"""Data parallelism: DistributedDataParallel and FSDP2 around a model. Gradients are sums over the data ranks, not means."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.parallel.sharding import row_chunk


def shard_model(
    model: nn.Module, parts: Iterable[nn.Module], context: ParallelContext, *, reshard_after_forward: bool
) -> None:
    """FSDP2 (fully_shard) of each part and of the rest, on the meta device. reshard_after_forward: free gathered weights.

    Weights are gathered in their own type, FP32, and the stream is never cast: what a rank computes is what one process would.
    """
    assert context.mesh is not None
    # The logits are a view where the vocabulary is padded; the loss writes its gradient there, which no hook needs to see.
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
    """Let FSDP2 pad, now, what does not divide evenly over ``axis``: local tensors stay in place from then on."""
    for module in model.modules():
        if isinstance(module, FSDPModule) and any(p.dim() and p.shape[0] % axis.size for p in module.parameters()):
            module.unshard()
            module.reshard()


def placed_like(value: Tensor, parameter: nn.Parameter, axis: Axis) -> nn.Parameter:
    """A parameter of this value, divided as ``parameter`` (on the meta device) is: over ``axis``, or not at all."""
    if not isinstance(parameter, DTensor):
        return nn.Parameter(value)
    mine = row_chunk(value, axis).clone()
    mesh, placements = parameter.device_mesh, parameter.placements
    placed = DTensor.from_local(
        mine, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(placed)


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor that FSDP2 may have divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def replicate_model(model: nn.Module, data: Axis) -> DistributedDataParallel:
    """DistributedDataParallel that adds gradients up."""
    ddp = DistributedDataParallel(model, process_group=data.group, init_sync=False)
    ddp.register_comm_hook(data.group, _sum)
    return ddp


def _sum(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def accumulate_in_shards(model: FSDPModule, last: bool, *, sharded: bool) -> None:
    """Set what FSDP2 does with the gradients of the next backward pass; arguments as of ``grad_sync``."""
    model.set_requires_gradient_sync(last or sharded)
    model.set_requires_all_reduce(last)


@contextmanager
def grad_sync(model: nn.Module, last: bool, *, sharded: bool) -> Iterator[None]:
    """Around the forward and backward pass of one microbatch: what is done with its gradients over the data ranks.

    DDP reduces them in the last microbatch of a step. FSDP2 does so too unless ``sharded``, and keeps whole gradients until then;
    with it, it reduces and scatters those of every microbatch, so that a rank never keeps more than its shard of them. The replicas
    of a sharded group are added up in the last microbatch in either case.
    """
    if isinstance(model, FSDPModule):
        accumulate_in_shards(model, last, sharded=sharded)
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
