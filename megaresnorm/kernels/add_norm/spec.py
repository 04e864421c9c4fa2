"""The specification of one fused ``add_norm`` call beside its tensors, and the interface of a backend.

T rows (tokens)   D columns (model dim)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels
from megaresnorm.kernels.fp8.formats import BLOCK, MX, ROW, TENSOR
from megaresnorm.kernels.registry import kernel_named

# Forms of FP8 that a fused backend may write at once; a tensor's with an amax of earlier steps.
FORMS = {"row": ROW, "block": BLOCK, "mx": MX, "tensor": TENSOR}
SUMS = 7  # column sums of the backward pass: gradients of weight and bias of the three norms, and of the gate


class AddNormSpec:
    """All arguments of a call that are not tensors. ``make_spec`` gives equal ones as one object.

    Args:
        kinds: none, rmsnorm or layernorm for the norm of the branch, of the sum and the next norm.
        eps: of the same three norms.
        constant_gate: the gate where it is a number; 1 for a learned gate.
        out_dtype: of the branch input; None where nobody reads it.
        backend: name of the fused backend.
        probability: of dropout of the branch; 0 for none.
        first_column: the global number of the first column, for the mask of dropout.
        form: of ``FORMS``, in which the branch input is written in FP8 instead; none where it is not.

    Attributes:
        branch_norm, norm, next_norm: whether there is that norm.
        writes_branch: whether the branch input is a tensor of its own, not the trunk. With FP8 it has no values.
        writes_fp8: whether the branch input is written in FP8.
    """

    def __init__(
        self,
        kinds: tuple[str, str, str],
        eps: tuple[float, float, float],
        alpha: float,
        constant_gate: float,
        residual_dtype: torch.dtype,
        out_dtype: torch.dtype | None,
        backend: str,
        probability: float = 0.0,
        first_column: int = 0,
        form: str = "none",
    ) -> None:
        self.kinds, self.eps, self.alpha, self.constant_gate = kinds, eps, alpha, constant_gate
        self.residual_dtype, self.out_dtype, self.backend = residual_dtype, out_dtype, backend
        self.probability, self.first_column, self.form = probability, first_column, form
        self.branch_norm, self.norm, self.next_norm = (kind != "none" for kind in kinds)
        self.writes_branch = out_dtype is not None and (self.next_norm or out_dtype != residual_dtype)
        self.writes_fp8 = form != "none"

    def values(self) -> tuple:
        """The constructor's arguments, in the order of the operator's schema."""
        return (
            self.kinds, self.eps, self.alpha, self.constant_gate, self.residual_dtype, self.out_dtype, self.backend,
            self.probability, self.first_column, self.form,
        )  # fmt: skip

    def without_next_norm(self) -> "AddNormSpec":
        """The same spec without ``next_norm``, for the backward pass when the branch input has no gradient."""
        return make_spec((*self.kinds[:2], "none"), self.eps, *self.values()[2:])

    def stores_sum(self, x: Tensor, delta: Tensor | None) -> bool:
        """Whether the stored sum is a tensor of its own; without an add it can be x."""
        return delta is not None or x.dtype != self.residual_dtype


_one_spec = functools.lru_cache(maxsize=4096)(AddNormSpec)


def make_spec(kinds: Sequence[str], eps: Sequence[float], *rest: Any) -> AddNormSpec:
    """The one ``AddNormSpec`` with these arguments, from a cache; sequences may be lists, as operators give them."""
    return _one_spec(tuple(kinds), tuple(eps), *rest)


class Inputs(NamedTuple):
    """All tensor arguments of a call.

    Attributes:
        x, delta: the residual stream and the branch's output [T, D]; delta is None where nothing is added.
        gate: learned gate, FP32 [1] or [D].
        amax: FP32 [1, 1], for whose scale a whole tensor is written in FP8.
        key, rows: of dropout, as in ``kernels.dropout.Dropout``; None without it.
        weights: weight and bias of the three norms, FP32 [D] or None, six in all.
    """

    x: Tensor
    delta: Tensor | None
    gate: Tensor | None
    amax: Tensor | None
    key: Tensor | None
    rows: Tensor | None
    weights: Sequence[Tensor | None]


class Outputs(NamedTuple):
    """Results of the forward pass; None for those that a call does not have.

    Attributes:
        z: the stored sum; None too where x itself is the stored sum.
        trunk: the output of ``norm``.
        branch: the branch input, where it is not the trunk. With FP8 it has no values, and a backend leaves it alone.
        codes, inverse: the branch input in FP8, as in ``Fp8``.
        branch_statistics, statistics, next_statistics: [T, 2] FP32 of each norm, mean and 1 / deviation.
        amax: FP32 [1, 1], the largest |branch input|, where that of earlier steps is given.
    """

    z: Tensor | None
    trunk: Tensor | None
    branch: Tensor | None
    codes: Tensor | None
    inverse: Tensor | None
    branch_statistics: Tensor | None
    statistics: Tensor | None
    next_statistics: Tensor | None
    amax: Tensor | None


class Saved(NamedTuple):
    """Tensors that the backward pass reads.

    Attributes:
        z: the stored sum.
        trunk: the trunk between two norms, else None.
        delta: the branch's output, for a learned gate or a norm of its own, else None.
        gate, key, rows, weights: as in ``Inputs``. The mask of dropout is computed anew.
        statistics: of the branch's norm, of ``norm`` and of ``next_norm``, as in ``Outputs``.
    """

    z: Tensor
    trunk: Tensor | None
    delta: Tensor | None
    gate: Tensor | None
    key: Tensor | None
    rows: Tensor | None
    weights: Sequence[Tensor | None]
    statistics: Sequence[Tensor | None]


class AddNormBackend(NamedTuple):
    """The functions of a fused backend of add_norm.

    Attributes:
        forward: called with (inputs, spec, outputs); fills ``outputs``.
        backward: called with (d_trunk, d_branch, saved, spec, dx, d_delta); fills dx and d_delta and returns the column
            sums [SUMS, D] in FP32, 0 for those that a call does not have. d_delta is None where it equals dx or nothing
            was added.
        drops: whether it computes dropout of the branch; otherwise it is given what eager PyTorch has dropped.
        sharded: kernels of its norm over a sharded hidden dimension.
        writes_fp8: called with a device: whether it writes the branch input in ``FORMS`` of FP8 there, in the place of
            BF16; otherwise it is quantized behind it.
    """

    forward: Callable[[Inputs, AddNormSpec, Outputs], None]
    backward: Callable[[Tensor | None, Tensor | None, Saved, AddNormSpec, Tensor, Tensor | None], Tensor]
    sharded: ShardedNormKernels = REFERENCE
    drops: bool = False
    writes_fp8: Callable[[torch.device], bool] = lambda device: False


def backend_named(name: str) -> AddNormBackend:
    """The implementation of a registered fused backend."""
    return kernel_named("add_norm", name).implementation


def sharded_norm_kernels(backend: str) -> ShardedNormKernels:
    """The sharded-norm kernels of a backend of add_norm; the reference's where it has none."""
    implementation = kernel_named("add_norm", backend).implementation
    return REFERENCE if implementation is None else implementation.sharded


class AddNormGradSpec:
    """All arguments of a backward pass that are not tensors. ``make_grad_spec`` gives equal ones as one object.

    Args:
        spec: of the forward pass; kept as ``forward``.
        delta_dtype: None where nothing was added.

    Attributes:
        shared: whether the gradient of delta is the very tensor of x's gradient, given a constant gate.
    """

    def __init__(self, spec: AddNormSpec, x_dtype: torch.dtype, delta_dtype: torch.dtype | None) -> None:
        self.forward, self.x_dtype, self.delta_dtype = spec, x_dtype, delta_dtype
        # The gradients of x and delta are then g times the same factor, in the same type.
        plain = not spec.branch_norm and not spec.probability
        self.shared = plain and spec.alpha == spec.constant_gate and x_dtype == delta_dtype

    def values(self) -> tuple:
        """The operator's constants, in the order of its schema."""
        return *self.forward.values(), self.x_dtype, self.delta_dtype


_one_grad_spec = functools.lru_cache(maxsize=4096)(AddNormGradSpec)


def make_grad_spec(*values: Any) -> AddNormGradSpec:
    """The one ``AddNormGradSpec`` whose ``values()`` these are, from a cache."""
    return _one_grad_spec(make_spec(*values[:10]), *values[10:])
