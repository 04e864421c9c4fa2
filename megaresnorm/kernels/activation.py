"""The activation between the matrices of a feed-forward branch: the reference, and one operator for all fused backends.

T rows (tokens)   F ffn dim
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.custom_op import FLOATS, CustomOp, check_fp32
from megaresnorm.kernels.registry import Refusal, kernel_named, register_kernel

GATED = ("swiglu", "geglu", "geglu_tanh")


class ActivationKernel(Protocol):
    """A backend of the activation, called as the reference below."""

    def __call__(self, h_TF: Tensor, bias: Tensor | None, kind: str, /) -> Tensor:
        """See ``activation``."""


@register_kernel("activation", "reference")
def activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Activation of h + bias.

    ``gelu`` is the exact one, ``gelu_tanh`` its tanh approximation. With gate, up = h + bias, ``swiglu`` is
    silu(gate) * up; ``geglu`` and ``geglu_tanh`` have GELU in the place of SiLU.

    Args:
        h_TF: [T, F], or [T, 2 F] with a gate, the gate first.
        bias: as a row of h, in any type, or None.
        kind: one of recipe.Activation.
    Returns:
        [T, F].
    Source:
        GELU: arXiv:1606.08415. Gated activations: arXiv:2002.05202.
    """
    if bias is not None:
        wide = torch.promote_types(h_TF.dtype, torch.float32)  # the bias's gradient is summed in this type, too
        h_TF = (h_TF.to(wide) + bias.to(wide)).to(h_TF.dtype)
    approximate = "tanh" if kind.endswith("_tanh") else "none"
    match kind:
        case "gelu" | "gelu_tanh":
            return F.gelu(h_TF, approximate=approximate)
        case "relu":
            return F.relu(h_TF)
    gate_TF, up_TF = h_TF.chunk(2, dim=-1)
    return (F.silu(gate_TF) if kind == "swiglu" else F.gelu(gate_TF, approximate=approximate)) * up_TF


# --- the operator of fused backends -----------------------------------------------------------------------------------


class ActivationBackend(NamedTuple):
    """A fused backend: all tensors are contiguous, FP32, BF16 or (not in C) FP16, and bias FP32.

    Attributes:
        forward: called with (h, bias, kind, y). Fills y.
        backward: called with (dy, h, bias, kind, dh). Fills dh, and returns the bias's gradient, a sum over rows in
            FP32; None without a bias.
        kinds: the activations that it has.
        is_triton: as of ``CustomOp``.
    """

    forward: Callable[[Tensor, Tensor | None, str, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensor | None, str, Tensor], Tensor | None]
    kinds: tuple[str, ...]
    is_triton: bool = False


class _Call(NamedTuple):
    kind: str
    backend: str

    def values(self) -> tuple:
        return tuple(self)

    @property
    def implementation(self) -> ActivationBackend:
        return kernel_named("activation", self.backend).implementation


def fused_activation(backend: str) -> ActivationKernel:
    """``activation`` by the fused backend of that name, for FP32, BF16 and FP16; bias in FP32, contiguous."""

    def run(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        return _activation(h_TF, bias, _Call(kind, backend))

    return run


def register_activation(name: str, backend: ActivationBackend, requires: Refusal) -> None:
    """Register a fused backend."""
    register_kernel("activation", name, requires, kinds=backend.kinds, implementation=backend)(fused_activation(name))


def _forward(h: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    (kind, name), backend = call, call.implementation
    if h.dtype not in FLOATS:
        raise TypeError(f"activation/{name}: h is {h.dtype}, wanted float32, bfloat16 or float16; take the reference")
    if kind not in backend.kinds or (kind in GATED and h.shape[1] % 2):
        wanted = ", ".join(backend.kinds)
        raise ValueError(
            f"activation/{name}: {kind!r} of {h.shape[1]} columns; wanted one of {wanted}; with a gate an even number"
        )
    check_fp32(f"activation/{name}: bias", bias, (h.shape[1],))
    y = _fake(h, bias, call)
    backend.forward(h.contiguous(), bias, kind, y)
    return y


def _fake(h: Tensor, bias: Tensor | None, call: _Call) -> Tensor:
    return h.new_empty((h.shape[0], h.shape[1] // 2 if call.kind in GATED else h.shape[1]))


def _save(ctx: Any, arguments: tuple, results: Tensor) -> None:
    *tensors, ctx.call = arguments
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: Tensor) -> tuple:
    dh, *d_bias = _activation_backward(dy, *ctx.saved_tensors, ctx.call)
    return dh, d_bias[0] if d_bias else None


def _backward(dy: Tensor, h: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, ...]:
    h, dy = h.contiguous(), dy.to(h.dtype).contiguous()
    dh = torch.empty_like(h)
    d_bias = call.implementation.backward(dy, h, bias, call.kind, dh)
    return (dh,) if d_bias is None else (dh, d_bias)


def _fake_backward(dy: Tensor, h: Tensor, bias: Tensor | None, call: _Call) -> tuple[Tensor, ...]:
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    return (dh,) if bias is None else (dh, torch.empty_like(bias))


_activation = CustomOp(
    "activation(Tensor h, Tensor? bias, str kind, str backend) -> Tensor",
    2,
    _Call,
    _forward,
    _fake,
    _save,
    _differentiate,
    is_triton=lambda call: call.implementation.is_triton,
)
_activation_backward = CustomOp(
    "activation_backward(Tensor dy, Tensor h, Tensor? bias, str kind, str backend) -> Tensor[]",
    3,
    _Call,
    _backward,
    _fake_backward,
    is_triton=lambda call: call.implementation.is_triton,
)
