"""``add_norm`` in eager PyTorch: the specification that every other backend is compared with.

T rows (tokens)   D columns (model dim)
"""

import functools
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaresnorm.kernels.dropout import Dropout
from megaresnorm.kernels.fp8.formats import E4M3, TENSOR, Fp8, Fp8Output, quantize, quantize_delayed
from megaresnorm.kernels.registry import register_kernel


class NormWeights(NamedTuple):
    """A norm as plain values.

    Attributes:
        kind: layernorm or rmsnorm.
        weight, bias: [D]; bias may be None.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class AddNormArgs:
    """The arguments of one ``add_norm``, whatever backend computes it and in whatever tensor layout.

    Attributes:
        x: the residual stream [T, D], in any floating type.
        delta: a branch's output [T, D], in any floating type; None for no add.
        alpha: factor of x.
        gate: factor of the branch: a number, or a learned scalar [1] or vector [D].
        branch_norm: norm of delta before dropout and the gate.
        dropout: elements of the branch that are dropped before the gate; None for none.
        norm: norm of the sum, whose output is the trunk.
        next_norm: norm of the trunk, whose output is the branch input.
        residual_dtype: of the stored sum and the trunk.
        out_dtype: of the branch input; None where nobody reads it, and then there is no next_norm.
        fp8: how the branch input, rounded to ``out_dtype``, is written in FP8; None: it is not.
    """

    x: Tensor
    delta: Tensor | None = None
    _: KW_ONLY
    alpha: float = 1.0
    gate: float | Tensor = 1.0
    branch_norm: NormWeights | None = None
    norm: NormWeights | None = None
    next_norm: NormWeights | None = None
    residual_dtype: torch.dtype
    out_dtype: torch.dtype | None
    fp8: Fp8Output | None = None
    dropout: Dropout | None = None


class AddNormOutput(NamedTuple):
    """Results of ``add_norm``.

    Attributes:
        trunk: [T, D], the residual stream.
        branch_input: [T, D]; None where no out_dtype was asked for.
        statistics: [T, 2] FP32 of ``next_norm``, mean (0 for RMSNorm) and 1 / deviation of every row.
        amax: the largest |branch input|, FP32 [1, 1], where ``fp8`` has an amax of earlier steps.
        stored: the stored sum z without a gradient, which backward keeps: the call without an add, on z in the place
            of x, gives the same branch input. None where a backend does not tell.
        fp8: the branch input in FP8 (E4M3), where ``fp8`` asks for it. Then ``branch_input`` may have no values, and
            stands for it in autograd alone, so that its gradient is in ``out_dtype``: autograd casts the gradient of
            an FP8 tensor to FP8 without a scale, where most of it vanishes.
    """

    trunk: Tensor
    branch_input: Tensor | None = None
    statistics: Tensor | None = None
    amax: Tensor | None = None
    stored: Tensor | None = None
    fp8: Fp8 | None = None


class AddNormKernel(Protocol):
    """A backend of ``add_norm``; it computes what the reference below does."""

    def __call__(self, args: AddNormArgs, /) -> AddNormOutput:
        """See ``add_norm``."""


@register_kernel("add_norm", "reference")
def add_norm(args: AddNormArgs) -> AddNormOutput:
    """Close one residual connection and open the next: the one op that serves every topology.

        z      = alpha * x + gate * dropout(branch_norm(delta))   summed in FP32, rounded to ``residual_dtype``
        trunk  = norm(z), or z                                    in ``residual_dtype``
        branch = next_norm(trunk), or trunk                       in ``out_dtype``

    The statistics of a norm are taken in FP32 from the *stored* tensor before it, and its output is rounded once:
    each result is a function of what is stored, so recomputing it is exact. FP64 input is computed in FP64.
    """
    if args.fp8 is not None:
        return with_fp8(add_norm, args)
    x, delta, gate, residual_dtype, out_dtype = args.x, args.delta, args.gate, args.residual_dtype, args.out_dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x
    if delta is not None:
        branch = delta.to(wide)
        if args.branch_norm is not None:
            branch = normalize(branch, args.branch_norm)
        if args.dropout is not None:
            branch = args.dropout(branch)
        if not isinstance(gate, float):
            branch = branch * gate.to(wide)
        elif gate != 1.0:
            branch = branch * gate
        z = _scaled_add(branch, x.to(wide), args.alpha)
    stored = _stored(z.to(wide), residual_dtype)
    kept = None
    if args.norm is not None:
        kept = in_type(stored.detach(), residual_dtype)
        stored = _stored(normalize(stored, args.norm), residual_dtype)
    trunk = in_type(stored, residual_dtype)
    kept = trunk.detach() if kept is None else kept
    if out_dtype is None:
        assert args.next_norm is None
        return AddNormOutput(trunk)
    branch_input, statistics = stored, None
    if args.next_norm is not None:
        branch_input, statistics = normalize_with_statistics(stored, args.next_norm)
    return AddNormOutput(trunk, in_type(branch_input, out_dtype), statistics, None, kept)


def with_fp8(kernel: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
    """The results of a kernel that does not write FP8, and its branch input in FP8."""
    assert args.fp8 is not None
    out = kernel(replace(args, fp8=None))
    assert out.branch_input is not None
    values, (form, amax) = out.branch_input.detach(), args.fp8
    if amax is None:
        return out._replace(fp8=quantize(values, form))
    assert form == TENSOR
    q, own = quantize_delayed(values, E4M3, amax)
    return out._replace(fp8=q, amax=own)


def fp8_behind(kernel: AddNormKernel) -> AddNormKernel:
    """Decorator that lets a kernel that does not write FP8 take ``fp8``: its branch input is quantized behind it."""

    @functools.wraps(kernel)
    def add_norm(args: AddNormArgs) -> AddNormOutput:
        return kernel(args) if args.fp8 is None else with_fp8(kernel, args)

    return add_norm


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, without a ``to`` that does nothing.

    An autograd Function must return neither the result of such a ``to`` nor that of an in-place operation:
    torch.compile of 2.11 makes its gradients zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _scaled_add(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """a + alpha b. torch.compile (2.11 to 2.13) fuses ``add`` with a matrix product before it and drops alpha."""
    return a + alpha * b if torch.compiler.is_compiling() else torch.add(a, b, alpha=alpha)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to ``dtype`` but kept in its own type, so that its gradient is not rounded."""
    return x if x.dtype == dtype else _Rounded.apply(x, dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def normalize(x_TD: Tensor, norm: NormWeights) -> Tensor:
    """LayerNorm or RMSNorm of every row, in x's own type.

    Source:
        LayerNorm: arXiv:1607.06450, eq. 3. RMSNorm: arXiv:1910.07467, eq. 4.
    """
    return normalize_with_statistics(x_TD, norm)[0]


def normalize_with_statistics(x_TD: Tensor, norm: NormWeights) -> tuple[Tensor, Tensor]:
    """``normalize``, with the statistics of the rows.

    Returns:
        The output [T, D], and [T, 2]: the mean (0 for RMSNorm) and 1 / deviation of every row.
    """
    weight = norm.weight.to(x_TD.dtype)
    if norm.kind == "layernorm":
        bias = None if norm.bias is None else norm.bias.to(x_TD.dtype)
        y_TD, mean, reciprocal = torch.native_layer_norm(x_TD, x_TD.shape[-1:], weight, bias, norm.eps)
        return y_TD, torch.cat((mean, reciprocal), dim=-1).detach()
    y_TD, reciprocal = _RMSNorm.apply(x_TD, weight, norm.eps)
    return y_TD, torch.cat((torch.zeros_like(reciprocal), reciprocal), dim=-1)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with fewer elementwise operations than F.rms_norm is composed of on CPUs; keeps one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        reciprocal = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, reciprocal)
        ctx.mark_non_differentiable(reciprocal)
        return x * reciprocal * weight, reciprocal  # not in place, see in_type

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dy, (x, weight, reciprocal) = grads[0], ctx.saved_tensors
        unit = x * reciprocal
        product = dy * unit
        mean = (product @ weight).div_(x.shape[-1]).unsqueeze(-1)
        dx = (dy * weight).addcmul_(unit, mean, value=-1.0).mul_(reciprocal)
        return dx, product.sum_to_size(weight.shape), None
