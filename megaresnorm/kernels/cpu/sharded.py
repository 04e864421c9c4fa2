"""A norm sharded over the hidden dimension by the C kernels: hands them the tensors' addresses."""

import ctypes

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.sharded import ShardedNormKernels, empty_sums
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.custom_op import check_fp32

ROWS_PER_BLOCK = 256  # weight gradients are summed within a block of rows, then over the blocks


class _Shard(ctypes.Structure):
    """The structure of sharded.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("z", "dy", "weight", "bias", "statistics", "sums", "out", "partial")),
        *(
            (name, ctypes.c_long)
            for name in (
                "rows", "rows_per_block", "columns", "whole_columns", "layernorm", "z_type", "dy_type", "out_type",
            )
        ),
    ]  # fmt: skip


def _run(
    function: str, z: Tensor, kind: str, *, count: int | None = None, whole_columns: int = 0, **tensors: Tensor | None
) -> None:
    rows, columns = z.shape
    get, at = tensors.get, build.address
    for name, shape in (("weight", (columns,)), ("bias", (columns,)), ("statistics", (rows, 2))):
        check_fp32(f"{function}: {name}", get(name), shape)
    check_fp32(f"{function}: sums", get("sums"), (rows, 1 + (kind == "layernorm")))
    for name, tensor in (("z", z), ("dy", get("dy")), ("out", get("out"))):
        if tensor is not None and (tensor.dtype not in build.FLOATS or tensor.shape != z.shape):
            raise TypeError(
                f"{function}: {name} is {tensor.dtype} {list(tensor.shape)}; wanted float32 or bfloat16 {list(z.shape)}"
            )
    argument = _Shard(
        at(z), *(at(get(name)) for name in ("dy", "weight", "bias", "statistics", "sums", "out", "partial")),
        rows, ROWS_PER_BLOCK, columns, whole_columns, kind == "layernorm",
        build.type_of(z), build.type_of(get("dy")), build.type_of(get("out")),
    )  # fmt: skip
    build.call(getattr(build.load(), function), argument, rows if count is None else count, rows * columns)


def stats(z: Tensor, kind: str) -> Tensor:
    """``sharded.shard_stats``."""
    found = empty_sums(z, kind)
    _run("shard_stats", z.contiguous(), kind, sums=found)
    return found


def apply(
    z: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, kind: str, out_dtype: torch.dtype
) -> Tensor:
    """``sharded.shard_apply``."""
    out = torch.empty(z.shape, dtype=out_dtype)
    _run("shard_apply", z.contiguous(), kind, weight=weight, bias=bias, statistics=statistics, out=out)
    return out


def grad_sums(dy: Tensor, z: Tensor, statistics: Tensor, weight: Tensor, kind: str) -> Tensor:
    """``sharded.shard_grad_sums``."""
    found = empty_sums(z, kind)
    _run("shard_grad_sums", z.contiguous(), kind, dy=dy.contiguous(), weight=weight, statistics=statistics, sums=found)
    return found


def grad_weights(dy: Tensor, z: Tensor, statistics: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``sharded.shard_grad_weights``."""
    rows, columns = z.shape
    blocks = -(-rows // ROWS_PER_BLOCK)
    partial = torch.empty((blocks, 2, columns), dtype=torch.float32)
    _run(
        "shard_grad_weights", z.contiguous(), kind, count=blocks, dy=dy.contiguous(), statistics=statistics,
        partial=partial,
    )  # fmt: skip
    d_weight, d_bias = (partial[0] if blocks == 1 else partial.sum(0)).unbind(0)
    return d_weight, d_bias


def grad_apply(
    dy: Tensor, z: Tensor, statistics: Tensor, sums: Tensor, weight: Tensor, kind: str, columns: int
) -> Tensor:
    """``sharded.shard_grad_apply``."""
    out = torch.empty(z.shape, dtype=z.dtype)
    _run(
        "shard_grad_apply", z.contiguous(), kind, whole_columns=columns, dy=dy.contiguous(), weight=weight,
        statistics=statistics, sums=sums.contiguous(), out=out,
    )  # fmt: skip
    return out


SHARDED = ShardedNormKernels(stats, apply, grad_sums, grad_weights, grad_apply)
