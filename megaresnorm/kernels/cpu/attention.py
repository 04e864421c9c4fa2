"""Attention by the C kernel: hands it the tensors' addresses."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.attention import Segments
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.custom_op import CustomOp, check_fp32
from megaresnorm.kernels.registry import register_kernel


class _Attention(ctypes.Structure):
    """The structure of attention.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "first_keys", "y", "log_sums", "dy", "d_qkv")),
        *(
            (name, ctypes.c_long)
            for name in ("batch", "seq", "heads", "kv_heads", "width", "type", "rotary_batch_stride")
        ),
        ("scale", ctypes.c_double),
    ]


class _Constants(NamedTuple):
    kv_heads: int
    scale: float

    def values(self) -> tuple:
        return tuple(self)


def fused_attention(
    qkv_BSJH: Tensor,
    kv_heads: int,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    segments: Segments | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``FusedAttention`` by the C kernel, computed in FP32. Nothing of size S x S is kept, nor made for segments."""
    cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
    constants = _Constants(kv_heads, qkv_BSJH.shape[-1] ** -0.5 if scale is None else scale)
    y, log_sums = _attention(qkv_BSJH, cos, sin, None if segments is None else segments.first, constants)
    return y, log_sums


def cpu_attention(
    q_BSNH: Tensor,
    k_BSKH: Tensor,
    v_BSKH: Tensor,
    *,
    segments: Segments | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``AttentionKernel`` by the same kernel, which is given all heads in one tensor.

    Raises:
        ValueError: softcap is given, or attention is not causal, which this kernel does not have.
    """
    if softcap is not None or not causal:
        raise ValueError(
            f"attention/cpu: softcap={softcap}, causal={causal} is not among what it can; take the reference"
        )
    qkv = torch.cat((q_BSNH, k_BSKH, v_BSKH), dim=2)
    return fused_attention(qkv, k_BSKH.shape[2], segments=segments, scale=scale)


def _run(function: str, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, first: Tensor | None,
         constants: _Constants, y: Tensor | None, log_sums: Tensor, dy: Tensor | None, d_qkv: Tensor | None,
         ) -> None:  # fmt: skip
    batch, seq, all_heads, width = qkv.shape
    kv_heads = constants.kv_heads
    heads = all_heads - 2 * kv_heads
    at = build.address
    argument = _Attention(
        at(qkv), at(cos), at(sin), at(first), at(y), at(log_sums), at(dy), at(d_qkv),
        batch, seq, heads, kv_heads, width, build.type_of(qkv),
        seq * width if cos is not None and cos.dim() == 3 else 0, constants.scale,
    )  # fmt: skip
    build.call(getattr(build.load(), function), argument, batch * kv_heads, batch * heads * seq * seq)


def _forward(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, first: Tensor | None, constants: _Constants
) -> tuple[Tensor, Tensor]:
    _check(qkv, cos, sin, first, constants.kv_heads)
    y, log_sums = _fake(qkv, cos, sin, first, constants)
    qkv, first = qkv.contiguous(), None if first is None else first.contiguous()
    _run("attention_forward", qkv, cos, sin, first, constants, y, log_sums, None, None)
    return y, log_sums


def _check(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, first: Tensor | None, kv_heads: int) -> None:
    if qkv.dtype not in build.FLOATS:
        raise TypeError(f"attention/cpu: qkv is {qkv.dtype}, wanted float32 or bfloat16; take another backend")
    batch, seq, all_heads, width = qkv.shape
    heads = all_heads - 2 * kv_heads
    if kv_heads < 1 or heads < 1 or heads % kv_heads or (cos is not None and width % 2):
        raise ValueError(f"attention/cpu: {heads} query heads of width {width} for {kv_heads} heads of keys and values")
    for name, table in (("cos", cos), ("sin", sin)):
        check_fp32(f"attention/cpu: {name}", table, (seq, width), (batch, seq, width))
    if first is not None and (first.dtype != torch.int64 or first.shape != (batch, seq)):
        raise TypeError(f"attention/cpu: first keys are {first.dtype} {list(first.shape)}; wanted int64 {[batch, seq]}")


def _fake(qkv: Tensor, cos: Any, sin: Any, first: Any, constants: _Constants) -> tuple[Tensor, Tensor]:
    batch, seq, all_heads, width = qkv.shape
    heads = all_heads - 2 * constants.kv_heads
    return qkv.new_empty((batch, seq, heads, width)), qkv.new_empty((batch, heads, seq), dtype=torch.float32)


def _save(ctx: Any, arguments: tuple, results: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.constants = arguments
    ctx.mark_non_differentiable(results[1])
    ctx.save_for_backward(*tensors, results[1])


def _differentiate(ctx: Any, dy: Tensor, _: Any) -> tuple:
    return _attention_backward(dy, *ctx.saved_tensors, ctx.constants), None, None, None


def _backward(
    dy: Tensor, qkv: Tensor, cos: Tensor | None, sin: Tensor | None, first: Tensor | None, log_sums: Tensor,
    constants: _Constants,
) -> Tensor:  # fmt: skip
    qkv, dy = qkv.contiguous(), dy.to(qkv.dtype).contiguous()
    d_qkv = torch.empty_like(qkv)
    first = None if first is None else first.contiguous()
    _run("attention_backward", qkv, cos, sin, first, constants, None, log_sums, dy, d_qkv)
    return d_qkv


_TABLES = "Tensor? cos, Tensor? sin, Tensor? first"
_attention = CustomOp(
    f"attention(Tensor qkv, {_TABLES}, int kv_heads, float scale) -> Tensor[]",
    4,
    _Constants,
    _forward,
    _fake,
    _save,
    _differentiate,
)
_attention_backward = CustomOp(
    f"attention_backward(Tensor dy, Tensor qkv, {_TABLES}, Tensor log_sums, int kv_heads, float scale) -> Tensor",
    6,
    _Constants,
    _backward,
    lambda dy, qkv, *rest: torch.empty_like(qkv, memory_format=torch.contiguous_format),
)


register_kernel("attention", "cpu", requires=build.requires, kinds=("plain",), implementation=fused_attention)(
    cpu_attention
)
