"""What every backend of the activation and of rotary is held to, against FP64."""

import torch
from add_norm_checks import BF16, F32, SUMS, Stored, near

from megaresnorm.kernels.activation import GATED, activation

FLOATS = {"fp32": F32, "bf16": BF16}
KINDS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh")


def check_activation(kernel, rows, width, kind, bias, dtype, device="cpu", strided=False):
    """Values and gradients of one call; with ``strided`` neither h nor the gradient is contiguous."""
    g = torch.Generator(device).manual_seed(rows + width)
    dtype, columns = FLOATS[dtype], width * (1 + (kind in GATED))

    def draw(columns, scale):
        made = scale * torch.randn(rows, columns * (1 + strided), generator=g, device=device)
        return made.to(dtype)[:, :: 1 + strided]

    h = draw(columns, 3.0).requires_grad_()
    b = torch.randn(columns, generator=g, device=device).requires_grad_() if bias else None
    leaves = [h] if b is None else [h, b]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    total = wide[0]
    if b is not None:  # the sum is stored in h's type, and is what is activated
        total = Stored.apply(wide[0] + wide[1], (h.detach().float() + b.detach()).to(dtype))
    got, want = kernel(h, b, kind), activation(total, None, kind)
    assert got.dtype == dtype and got.is_contiguous()
    size = torch.ones(rows, 1, device=device, dtype=torch.float64)
    near(got, want, dtype, scale=size)
    d = draw(width, 1.0)
    gradients = torch.autograd.grad(got, leaves, d)
    wanted = torch.autograd.grad(want, wide, d.double())
    assert gradients[0].dtype == dtype
    near(gradients[0], wanted[0], dtype, scale=size, slack=2.0)
    if b is not None:
        assert gradients[1].dtype == F32
        scale = max(wanted[1].abs().max().item(), rows**0.5)
        assert (gradients[1].double() - wanted[1]).abs().max().item() <= SUMS * scale
