"""From a layer's fused q, k, v to heads that attention reads: norms of q and k, then rotary positions.

B batch   S seq   J all heads, N of queries and 2 K of keys and values   H head width
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm import reference
from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, NormWeights
from megaresnorm.kernels.custom_op import FLOATS, CustomOp, check_fp32
from megaresnorm.kernels.registry import Refusal, kernel_named, register_kernel


class RotaryKernel(Protocol):
    """A backend of rotary."""

    def __call__(
        self,
        qkv_BSJH: Tensor,
        kv_heads: int,
        /,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        q_norm: NormWeights | None = None,
        k_norm: NormWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalize every head of q and k, and rotate it by its position.

        Args:
            qkv_BSJH: [B, S, J, H], heads of q, then of k, then of v; J is N + 2 kv_heads.
            cos: [S, H] or [B, S, H], as model/rotary.py makes it, with equal halves along H; None for no rotation.
            sin: likewise; its halves are opposite, the first one negative.
            q_norm: of every head of q, with weights [H]; its output is rounded to qkv's type. None for no norm.
            k_norm: likewise, of the same kind.

        Returns:
            q [B, S, N, H], k and v [B, S, K, H] in qkv's type; the reference's may be views of qkv.
        """


def rotate(x_BSNH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotate every head by its position; computed in the tables' type, returned in x's.

    Args:
        cos_SH: [S, H] or [B, S, H].
        sin_SH: likewise; its first half along H is negative, as model/rotary.py makes it.
    """
    exchanged = x_BSNH.roll(x_BSNH.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_BSNH * cos_SH.unsqueeze(-2), exchanged, sin_SH.unsqueeze(-2)).to(x_BSNH.dtype)


def rotary_after(add_norm: AddNormKernel) -> RotaryKernel:
    """Rotary in eager PyTorch, after norms by a backend of add_norm."""

    def normalize(x_BSNH: Tensor, norm: NormWeights | None) -> Tensor:
        if norm is None:
            return x_BSNH
        rows = x_BSNH.reshape(-1, x_BSNH.shape[-1])
        return add_norm(AddNormArgs(rows, norm=norm, residual_dtype=rows.dtype, out_dtype=None)).trunk.view(
            x_BSNH.shape
        )

    def rotary(
        qkv_BSJH: Tensor,
        kv_heads: int,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        q_norm: NormWeights | None = None,
        k_norm: NormWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv_BSJH.shape[2] - 2 * kv_heads
        qk_BSJH, v_BSKH = qkv_BSJH.split((heads + kv_heads, kv_heads), dim=2)
        if q_norm is not None or k_norm is not None:
            q, k = qk_BSJH.split((heads, kv_heads), dim=2)
            qk_BSJH = torch.cat((normalize(q, q_norm), normalize(k, k_norm)), dim=2)
        if cos is not None and sin is not None:
            qk_BSJH = rotate(qk_BSJH, cos, sin)
        q_BSNH, k_BSKH = qk_BSJH.split((heads, kv_heads), dim=2)
        return q_BSNH, k_BSKH, v_BSKH

    return rotary


register_kernel("rotary", "reference")(rotary_after(reference.add_norm))


# --- the operator of fused backends -----------------------------------------------------------------------------------


class RotarySpec(NamedTuple):
    """All arguments of a call that are not tensors.

    Attributes:
        norm: none, rmsnorm or layernorm, of q and k alike.
        biased: whether those have biases.
        backend: name of the fused backend.
    """

    kv_heads: int
    norm: str
    biased: bool
    eps: float
    backend: str

    def values(self) -> tuple:
        """As the schema has them."""
        return tuple(self)

    @property
    def implementation(self) -> "RotaryBackend":
        """Of the backend."""
        return kernel_named("rotary", self.backend).implementation


class RotaryBackend(NamedTuple):
    """A fused backend in Triton: all tensors are contiguous, FP32, BF16 or FP16; tables, weights and biases are FP32.

    Attributes:
        forward: called with (qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, spec, q, k, v). Fills the last three.
        backward: called with (dq, dk, dv, qkv, cos, sin, q_weight, k_weight, spec, d_qkv); qkv is None without norms.
            Fills d_qkv, and returns the gradients of q_weight and k_weight, then with biases theirs; () without norms.
    """

    forward: Callable[..., None]
    backward: Callable[..., tuple[Tensor, ...]]


def fused_rotary(backend: str) -> RotaryKernel:
    """Rotary by the fused backend of that name, for FP32, BF16 and FP16; what it returns is contiguous."""

    def run(
        qkv_BSJH: Tensor,
        kv_heads: int,
        *,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        q_norm: NormWeights | None = None,
        k_norm: NormWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind_q, q_weight, q_bias, eps = q_norm or _NO_NORM
        kind_k, k_weight, k_bias, k_eps = k_norm or _NO_NORM
        if (kind_q, q_bias is None, eps) != (kind_k, k_bias is None, k_eps):
            raise ValueError(f"rotary/{backend}: norms of q and k are {kind_q}, {kind_k}; wanted two alike, or none")
        spec = RotarySpec(kv_heads, kind_q, q_bias is not None, eps, backend)
        q, k, v = _rotary(qkv_BSJH, cos, sin, q_weight, q_bias, k_weight, k_bias, spec)
        return q, k, v

    return run


def register_rotary(name: str, backend: RotaryBackend, requires: Refusal) -> None:
    """Register a fused backend."""
    register_kernel("rotary", name, requires, implementation=backend)(fused_rotary(name))


_NO_NORM = NormWeights("none", None, None, 0.0)  # type: ignore[arg-type]


def _forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tensors, spec = rest
    _check(qkv, *tensors, spec)
    outputs = _fake(qkv, *rest)
    cos, sin, *weights = tensors
    spec.implementation.forward(qkv.contiguous(), _contiguous(cos), _contiguous(sin), *weights, spec, *outputs)
    return outputs


def _contiguous(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.contiguous()


def _check(qkv: Tensor, *rest: Any) -> None:
    cos, sin, *weights, spec = rest
    name = f"rotary/{spec.backend}"
    if qkv.dtype not in FLOATS:
        raise TypeError(f"{name}: qkv is {qkv.dtype}, wanted float32, bfloat16 or float16; take the reference")
    batch, seq, all_heads, width = qkv.shape
    if spec.kv_heads < 1 or all_heads <= 2 * spec.kv_heads or width % 2:
        raise ValueError(f"{name}: {all_heads} heads of width {width}, of which {spec.kv_heads} are keys'")
    if (cos is None) != (sin is None):
        raise ValueError(f"{name}: wanted both of cos and sin, or neither")
    for table in (cos, sin):
        check_fp32(f"{name}: a table", _contiguous(table), (seq, width), (batch, seq, width))
    for weight in weights:
        check_fp32(f"{name}: a norm's weight", weight, (width,))


def _fake(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    (batch, seq, all_heads, width), kv_heads = qkv.shape, rest[-1].kv_heads
    heads = (all_heads - 2 * kv_heads, kv_heads, kv_heads)
    return tuple([qkv.new_empty((batch, seq, number, width)) for number in heads])


def _save(ctx: Any, arguments: tuple, results: tuple[Tensor, ...]) -> None:
    qkv, cos, sin, q_weight, _, k_weight, _, ctx.spec = arguments
    ctx.save_for_backward(qkv if q_weight is not None else None, cos, sin, q_weight, k_weight)


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple:
    d_qkv, *d_weights = _rotary_backward(*gradients, *ctx.saved_tensors, ctx.spec)
    d_q_weight, d_k_weight, d_q_bias, d_k_bias = (*d_weights, None, None, None, None)[:4]
    return d_qkv, None, None, d_q_weight, d_q_bias, d_k_weight, d_k_bias


def _backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    cos, sin, q_weight, k_weight, spec = rest
    d_qkv, *_ = _fake_backward(dq, dk, dv, qkv, *rest)
    gradients = [d if d.dtype in FLOATS else d.float() for d in (dq, dk, dv)]
    d_weights = spec.implementation.backward(
        *[d.contiguous() for d in gradients],
        _contiguous(qkv), _contiguous(cos), _contiguous(sin), q_weight, k_weight, spec, d_qkv,
    )  # fmt: skip
    return d_qkv, *d_weights


def _fake_backward(dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    (batch, seq, heads, width), spec = dq.shape, rest[-1]
    sums = 0 if spec.norm == "none" else 4 if spec.biased else 2
    d_qkv = dq.new_empty((batch, seq, heads + 2 * spec.kv_heads, width))
    return d_qkv, *(dq.new_empty((width,), dtype=torch.float32) for _ in range(sums))


_SPEC = "int kv_heads, str norm, bool biased, float eps, str backend"
_rotary = CustomOp(
    "rotary(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, "
    f"{_SPEC}) -> Tensor[]",
    7,
    RotarySpec,
    _forward,
    _fake,
    _save,
    _differentiate,
    is_triton=lambda spec: True,
)
_rotary_backward = CustomOp(
    "rotary_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor? cos, Tensor? sin, Tensor? q_weight, "
    f"Tensor? k_weight, {_SPEC}) -> Tensor[]",
    8,
    RotarySpec,
    _backward,
    _fake_backward,
    is_triton=lambda spec: True,
)
