"""``add_norm`` in eager PyTorch: the specification that every other backend is compared with.

T rows (tokens)   D columns (model dim)
"""

from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaresnorm.kernels.dropout import Dropout
from megaresnorm.kernels.fp8.formats import TENSOR, Fp8, Fp8Output, amax_of, checked, quantize
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
        out_dtype: of the branch input; None where nobody reads it. With float8_e4m3fn the branch input is fp8_scale
            times the value, saturating at 448, and its gradient is taken to be that of the value. Autograd casts the
            gradient of an FP8 tensor to E4M3 without a scale, so gradients below 2^-10 would vanish; the consumer of
            FP8 must prevent that.
        fp8_scale: a scalar FP32.
        fp8: how the branch input, rounded to ``out_dtype``, is written in FP8 as well; None: it is not.
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
    fp8_scale: Tensor | None = None
    fp8: Fp8Output | None = None
    dropout: Dropout | None = None


class AddNormOutput(NamedTuple):
    """Results of ``add_norm``.

    Attributes:
        trunk: [T, D], the residual stream.
        branch_input: [T, D]; None where no out_dtype was asked for.
        statistics: [T, 2] FP32 of ``next_norm``, mean (0 for RMSNorm) and 1 / deviation of every row.
        amax: the largest |branch input| before the scale of FP8, a scalar FP32.
        stored: the stored sum z without a gradient, which backward keeps: the call without an add, on z in the place
            of x, gives the same branch input. None where a backend does not tell.
        fp8: the branch input in FP8, where ``fp8`` asks for it. Then ``branch_input`` may have no values, and stands
            for it in autograd alone.
    """

    trunk: Tensor
    branch_input: Tensor | None
    statistics: Tensor | None
    amax: Tensor | None
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

    The amax is computed for FP8, and for out_dtype None with a next_norm: then ``fp8.norm_quant`` can scale by it.

    Raises:
        ValueError: out_dtype is float8_e4m3fn and fp8_scale is None.
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
    if args.next_norm is None and out_dtype is None:
        return AddNormOutput(trunk, None, None, None)
    branch_input, statistics = stored, None
    if args.next_norm is not None:
        branch_input, statistics = normalize_with_statistics(stored, args.next_norm)
    if out_dtype is None:
        return AddNormOutput(trunk, None, statistics, largest(branch_input))
    if out_dtype == torch.float8_e4m3fn:
        if args.fp8_scale is None:
            raise ValueError("add_norm/reference: out_dtype=torch.float8_e4m3fn needs fp8_scale")
        return AddNormOutput(trunk, to_fp8(branch_input, args.fp8_scale), statistics, largest(branch_input))
    return AddNormOutput(trunk, in_type(branch_input, out_dtype), statistics, None, kept)


def with_fp8(kernel: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
    """The results of a kernel that does not write FP8, and its branch input in FP8."""
    assert args.fp8 is not None
    out = kernel(replace(args, fp8=None))
    assert out.branch_input is not None
    values, (form, amax) = out.branch_input.detach(), args.fp8
    if amax is None:
        return out._replace(fp8=quantize(values, form))
    own = amax_of(values, TENSOR)
    return out._replace(fp8=checked(quantize(values, form, amax=amax), own), amax=own)


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


def largest(x: Tensor) -> Tensor:
    """The largest |x|; 0 for an empty tensor. No gradient."""
    return x.detach().abs().amax() if x.numel() else x.new_zeros(())


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


def to_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """x times ``scale`` in saturating E4M3; NaN stays NaN. The output's gradient is passed on as the gradient of x."""
    return _ToFp8.apply(x, scale)


class _ToFp8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        return (x * scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].float(), None
