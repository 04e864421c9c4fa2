"""What one call of a fused ``add_norm`` is, beside its tensors, and what a backend must bring along.

T rows (tokens)   D columns (model dim)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels
from megaresnorm.kernels.registry import kernel_named

FP8 = torch.float8_e4m3fn
SUMS = 7  # column sums of the backward pass: of weight and bias of the three norms, and of the gate


class AddNormSpec:
    """All of a call that is no tensor; equal ones are one object. The norms are the branch's, the sum's and the next one's."""

    def __init__(
        self,
        kinds: tuple[str, str, str],  # none, rmsnorm or layernorm
        eps: tuple[float, float, float],
        alpha: float,
        constant_gate: float,  # 1 for a learned gate
        residual_dtype: torch.dtype,
        out_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        self.kinds, self.eps, self.alpha, self.constant_gate = kinds, eps, alpha, constant_gate
        self.residual_dtype, self.out_dtype, self.backend = residual_dtype, out_dtype, backend
        self.branch_norm, self.norm, self.next_norm = (kind != "none" for kind in kinds)
        self.writes_branch = out_dtype is not None and (self.next_norm or out_dtype != residual_dtype)
        self.wants_amax = out_dtype == FP8 or (out_dtype is None and self.next_norm)

    def values(self) -> tuple:
        """As the operator's schema has them."""
        return self.kinds, self.eps, self.alpha, self.constant_gate, self.residual_dtype, self.out_dtype, self.backend

    def without_next_norm(self) -> "AddNormSpec":
        """For the backward pass where nothing came back for the branch input."""
        return make_spec((*self.kinds[:2], "none"), self.eps, *self.values()[2:])

    def stores_sum(self, x: Tensor, delta: Tensor | None) -> bool:
        """Whether the stored sum is a tensor of its own: without an add it can be x."""
        return delta is not None or x.dtype != self.residual_dtype


_one_spec = functools.lru_cache(maxsize=4096)(AddNormSpec)


def make_spec(kinds: Sequence[str], eps: Sequence[float], *rest: Any) -> AddNormSpec:
    return _one_spec(tuple(kinds), tuple(eps), *rest)


class Inputs(NamedTuple):
    """All tensors of a spec. weights: weight and bias of each norm, FP32 [D]."""

    x: Tensor
    delta: Tensor | None
    gate: Tensor | None
    fp8_scale: Tensor | None
    weights: Sequence[Tensor | None]


class Outputs(NamedTuple):
    """What forward returns; None for what the call has no use for. statistics: [T, 2] FP32, mean and 1 / deviation."""

    z: Tensor | None  # None too where x itself is the stored sum
    trunk: Tensor | None
    branch: Tensor | None
    branch_statistics: Tensor | None
    statistics: Tensor | None
    next_statistics: Tensor | None
    amax: Tensor | None  # [T]


class Saved(NamedTuple):
    """What backward reads: the stored sum; the trunk between two norms; delta for a learned gate or its own norm."""

    z: Tensor
    trunk: Tensor | None
    delta: Tensor | None
    gate: Tensor | None
    weights: Sequence[Tensor | None]
    statistics: Sequence[Tensor | None]


class AddNormBackend(NamedTuple):
    """What one entry of the registry brings along for add_norm.

    forward(inputs, spec, outputs) fills ``outputs``.
    backward(d_trunk, d_branch, saved, spec, dx, d_delta) fills dx and d_delta and returns the sums [SUMS, D], FP32.
    sharded: its norm over a sharded hidden dimension.
    """

    forward: Callable[[Inputs, AddNormSpec, Outputs], None]
    backward: Callable[[Tensor | None, Tensor | None, Saved, AddNormSpec, Tensor, Tensor | None], Tensor]
    sharded: ShardedNormKernels = REFERENCE


def backend_named(name: str) -> AddNormBackend:
    """Of a fused backend that is registered."""
    return kernel_named("add_norm", name).implementation


def sharded_norm_kernels(backend: str) -> ShardedNormKernels:
    """Those of a backend of add_norm that has any; the reference's otherwise."""
    implementation = kernel_named("add_norm", backend).implementation
    return REFERENCE if implementation is None else implementation.sharded


class AddNormGradSpec:
    """All of the backward pass that is no tensor."""

    def __init__(self, spec: AddNormSpec, x_dtype: torch.dtype, delta_dtype: torch.dtype | None) -> None:
        self.forward, self.x_dtype, self.delta_dtype = spec, x_dtype, delta_dtype
        # With the same factor and type the gradient of delta is the very tensor of x's.
        self.shared = not spec.branch_norm and spec.alpha == spec.constant_gate and x_dtype == delta_dtype

    def values(self) -> tuple:
        return *self.forward.values(), self.x_dtype, self.delta_dtype


_one_grad_spec = functools.lru_cache(maxsize=4096)(AddNormGradSpec)


def make_grad_spec(*values: Any) -> AddNormGradSpec:
    return _one_grad_spec(make_spec(*values[:7]), *values[7:])
