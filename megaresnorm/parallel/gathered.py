"""All-gathers in BF16 or FP16 of weights that FSDP2 shards and products read so: half the bytes, the same numbers.

FSDP2's own ``param_dtype`` would cast norms, gates and embeddings as well, and round the gradients of weights.
"""

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh

from megaresnorm.parallel.data_parallel import is_sharded
from megaresnorm.parallel.linear import Linear


def gather_in(dtype: torch.dtype, model: nn.Module, but: Collection[nn.Parameter] = ()) -> None:
    """Let FSDP2 send the weights of linear layers in BF16 or FP16, before it gathers any.

    For models whose linear layers read their weight in that type alone: it is rounded before it is sent instead of
    after, so that every product is bit for bit what it was. All else is sent as it is, in the same message; so is a
    weight that is also another module's, as a tied embedding is, whose rows the stream reads in FP32.

    A gathered weight is an FP32 tensor of 16-bit numbers, of which FSDP2 reduces FP32 gradients that nothing rounds.
    Shards stay plain FP32 tensors: what FSDP2 calls hangs on each of them.

    Args:
        model: sharded (``shard_model``), with memory and initial values, its shards padded (``pad_uneven_shards``).
        but: weights that are gathered otherwise.

    Communication:
        None. From now on the all-gather of a module has 2 bytes for each element of these weights, not 4.

    Raises:
        ValueError: nothing is sharded.
    """
    if not any(is_sharded(module) for module in model.modules()):
        raise ValueError("the model is not sharded: there is nothing to gather")
    linears = [m for m in model.modules() if isinstance(m, Linear) and m.weight not in but]
    others = (module for module in model.modules() if not isinstance(module, Linear))
    read_otherwise = {parameter for module in others for parameter in module.parameters(recurse=False)}
    for module in linears:
        if module.weight not in read_otherwise and module.weight.dtype == torch.float32:
            shard = cast(
                Any, module.weight
            )._local_tensor  # the tensor that FSDP2 gathers; to_local may be a view of it
            set_gather(shard, *_hooks(shard.detach(), module.weight.shape[0], dtype))


def set_gather(shard: Tensor, before: Any, after: Any) -> None:
    """Let FSDP2 call these before and after it gathers a shard.

    Args:
        shard: the tensor that it gathers.
    """
    for name, function in zip(_HOOKS, (before, after), strict=True):
        setattr(shard, name, function)


_HOOKS = ("fsdp_pre_all_gather", "fsdp_post_all_gather")  # by which FSDP2 knows them (its all-gather extensions)


def _hooks(shard: Tensor, num_rows: int, sent: torch.dtype) -> tuple[Any, Any]:
    """What FSDP2 calls before and after the all-gather of a weight.

    Args:
        shard: the rows of this rank, another tensor over the same memory: a tensor that its own attribute refers to
            would be freed late.
        num_rows: those of the whole weight.
        sent: the type in which it travels.
    """

    def pre_all_gather(
        mesh: DeviceMesh, size: torch.Size, stride: tuple[int, ...], module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """The shard as it is sent, filled up with rows of zeros where other ranks have more."""
        rows = -(-num_rows // mesh.size())
        if len(shard) == rows:
            return (shard.to(sent),), None
        padded = shard.new_zeros((rows, *shard.shape[1:]), dtype=sent)
        padded[: len(shard)] = shard
        return (padded,), None

    @torch.no_grad()
    def post_all_gather(
        gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight in FP32: the first time in a tensor that FSDP2 then keeps, later written into ``out``."""
        (rounded,) = gathered
        whole = rounded[:num_rows].to(dtype) if out is None else None
        if out is not None:
            with _unsafe_preserve_version_counter(out):  # as FSDP2 writes what autograd has kept
                out.copy_(rounded[:num_rows])
        rounded.untyped_storage().resize_(0)  # FSDP2 gives it memory again before it gathers
        return None if whole is None else (whole, (whole,))

    return pre_all_gather, post_all_gather
