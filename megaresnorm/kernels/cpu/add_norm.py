"""add_norm by the C kernel: hands it the tensors' addresses."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.op import register_add_norm
from megaresnorm.kernels.add_norm.spec import SUMS, AddNormBackend, AddNormSpec, Inputs, Outputs, Saved
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.sharded import SHARDED

KINDS = {"none": 0, "rmsnorm": 1, "layernorm": 2}
STREAM_ELEMENTS = 1 << 21  # above this, what is written has left the second-level cache before it is read
ROWS_PER_BLOCK = 256  # weight gradients are summed within a block of rows, then over the blocks

_pointer, _long, _double = ctypes.c_void_p, ctypes.c_long, ctypes.c_double


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _pointer), ("bias", _pointer), ("statistics", _pointer), ("kind", _long), ("eps", _double)]


def _fields(pointers: str, numbers: str) -> list[tuple]:
    """The fields that both structures of add_norm.c have, in their order."""
    return [
        *((name, _pointer) for name in pointers.split()),
        *((name, _Norm) for name in ("branch_norm", "norm", "next_norm")),
        *((name, _long) for name in numbers.split()),
        ("alpha", _double),
        ("scale", _double),
    ]


class _Forward(ctypes.Structure):
    _fields_ = _fields(
        "x delta gate z trunk branch amax fp8_scale",
        "columns gate_size x_type delta_type residual_type branch_type stream",
    )


class _Backward(ctypes.Structure):
    _fields_ = _fields(
        "d_trunk d_branch z trunk delta gate dx d_delta partial",
        "rows rows_per_block columns gate_size "
        "d_trunk_type d_branch_type residual_type delta_type dx_type d_delta_type stream",
    )


def _forward(inputs: Inputs, spec: AddNormSpec, outputs: Outputs) -> None:
    x, delta, gate, fp8_scale, _, _, weights = inputs
    z, trunk, branch, *statistics, amax = outputs
    rows, columns = x.shape
    at, type_of = build.address, build.type_of
    argument = _Forward(
        at(x), at(delta), at(gate), at(z), at(trunk), at(branch), at(amax), at(fp8_scale),
        *_norms(spec, weights, statistics), columns, 0 if gate is None else gate.numel(),
        type_of(x), type_of(delta), build.number_of(spec.residual_dtype), type_of(branch),
        rows * columns > STREAM_ELEMENTS, spec.alpha, spec.constant_gate,
    )  # fmt: skip
    build.call(build.load().add_norm_forward, argument, rows, rows * columns)


def _backward(
    d_trunk: Tensor | None, d_branch: Tensor | None, saved: Saved, spec: AddNormSpec, dx: Tensor, d_delta: Tensor | None
) -> Tensor:
    z, trunk, delta, gate, _, _, weights, statistics = saved
    rows, columns = z.shape
    blocks = -(-rows // ROWS_PER_BLOCK)
    partial = z.new_empty((blocks, SUMS, columns), dtype=torch.float32)
    at, type_of = build.address, build.type_of
    argument = _Backward(
        at(d_trunk), at(d_branch), at(z), at(trunk), at(delta), at(gate), at(dx), at(d_delta), at(partial),
        *_norms(spec, weights, statistics), rows, ROWS_PER_BLOCK, columns, 0 if gate is None else gate.numel(),
        *map(type_of, (d_trunk, d_branch, z, delta, dx, d_delta)), rows * columns > STREAM_ELEMENTS,
        spec.alpha, spec.constant_gate,
    )  # fmt: skip
    build.call(build.load().add_norm_backward, argument, blocks, rows * columns)
    return partial[0] if blocks == 1 else partial.sum(0)


def _norms(spec: AddNormSpec, weights: Sequence[Tensor | None], statistics: Sequence[Tensor | None]) -> list[_Norm]:
    at = build.address
    return [
        _Norm(at(weights[2 * i]), at(weights[2 * i + 1]), at(statistics[i]), KINDS[kind], eps)
        if kind != "none" else _NO_NORM
        for i, (kind, eps) in enumerate(zip(spec.kinds, spec.eps, strict=True))
    ]  # fmt: skip


_NO_NORM = _Norm()


register_add_norm("cpu", AddNormBackend(_forward, _backward, SHARDED), requires=build.requires)
