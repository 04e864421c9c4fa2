"""The activation between the matrices of a feed-forward branch: the reference that other backends are held to.

T rows (tokens)   F ffn dim
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import register_kernel


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
