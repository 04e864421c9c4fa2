"""The activation between the matrices of a feed-forward branch: the specification.

T rows (tokens)   F ffn dim
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import register_kernel


@register_kernel("activation", "reference")
def activation(h_TF: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """gelu(h + bias), the exact one (arXiv:1606.08415), gelu_tanh, its approximation there, or relu; swiglu: silu(gate) * up of
    gate, up = h + bias, geglu and geglu_tanh: the same with GELU for SiLU (arXiv:2002.05202).

    h_TF: [T, F], or [T, 2 F] with a gate, the gate first.   kind: one of recipe.Activation.
    bias: as a row of h, in any type, or None.   returns: [T, F].
    """
    if bias is not None:
        wide = torch.promote_types(h_TF.dtype, torch.float32)  # in which the bias's gradient is summed, too
        h_TF = (h_TF.to(wide) + bias.to(wide)).to(h_TF.dtype)
    approximate = "tanh" if kind.endswith("_tanh") else "none"
    match kind:
        case "gelu" | "gelu_tanh":
            return F.gelu(h_TF, approximate=approximate)
        case "relu":
            return F.relu(h_TF)
    gate_TF, up_TF = h_TF.chunk(2, dim=-1)
    return (F.silu(gate_TF) if kind == "swiglu" else F.gelu(gate_TF, approximate=approximate)) * up_TF
