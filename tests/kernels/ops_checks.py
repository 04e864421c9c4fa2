"""What every backend of the activation and of rotary is held to, against FP64."""

import torch
from add_norm_checks import BF16, F16, F32, SUMS, Stored, make_norm, near, textbook_norm

from megaresnorm.kernels.activation import GATED, activation
from megaresnorm.kernels.rotary import rotate

FLOATS = {"fp32": F32, "bf16": BF16}
WITHOUT_C = {"fp16": F16}  # the C kernels have none
KINDS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu", "geglu_tanh")


def check_activation(kernel, rows, width, kind, bias, dtype, device="cpu", strided=False):
    """Values and gradients of one call; with ``strided`` neither h nor the gradient is contiguous."""
    g = torch.Generator(device).manual_seed(rows + width)
    dtype, columns = (FLOATS | WITHOUT_C)[dtype], width * (1 + (kind in GATED))

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


def tables_of(shape, rotated, g):
    """cos and sin [..., H] as model/rotary.py makes them; only the first ``rotated`` angles of a half are not 0."""
    *rows, width = shape
    angles = torch.zeros(*rows, width // 2, dtype=torch.float64, device=g.device)
    angles[..., :rotated] = 3 * torch.randn(*rows, width // 2, generator=g, device=g.device)[..., :rotated]
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def check_rotary(
    kernel, heads, kv_heads, width, norm, tables, dtype, *, batch=2, seq=5, device="cpu", given=(0, 1, 2), strided=False
):
    """Values and gradients of one call.

    Args:
        norm: rmsnorm, layernorm, or None.
        tables: none, row ([S, H]), batch ([B, S, H]) or partial (half of the columns).
        given: the outputs that have a gradient.
        strided: neither qkv nor the gradients are contiguous.
    """
    g, dtype = torch.Generator(device).manual_seed(heads + width), (FLOATS | WITHOUT_C)[dtype]

    def draw(number):
        made = torch.randn(batch, number, seq, width, generator=g, device=device).to(dtype).transpose(1, 2)
        return made if strided else made.contiguous()

    qkv = draw(heads + 2 * kv_heads).requires_grad_()
    norms = [make_norm(norm, width, g, device) for _ in range(2)]
    cos = sin = None
    if tables != "none":
        rows = (batch, seq) if tables == "batch" else (seq,)
        cos, sin = tables_of((*rows, width), width // (4 if tables == "partial" else 2), g)
    got = kernel(qkv, kv_heads, cos=cos, sin=sin, q_norm=norms[0], k_norm=norms[1])
    weights = [w for n in norms if n is not None for w in (n.weight, n.bias) if w is not None]
    leaves = [qkv, *weights]
    wide = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
    want = list(wide[id(qkv)].split((heads, kv_heads, kv_heads), dim=2))
    for i, one in enumerate(norms):
        if one is not None:
            want[i] = textbook_norm(want[i], one, wide)
        if cos is not None:
            if one is not None:  # it is rounded in between
                want[i] = Stored.apply(want[i], want[i].detach().to(dtype))
            want[i] = rotate(want[i], cos.double(), sin.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        near(a, b, dtype, slack=2.0 if norm else 1.0)
    d = [draw(t.shape[2]) for t in want]
    kept = [leaf for leaf in leaves if leaf is qkv or set(given) & {0, 1}]
    gradients = torch.autograd.grad([got[i] for i in given], kept, [d[i] for i in given], allow_unused=True)
    wanted = torch.autograd.grad(
        [want[i] for i in given], [wide[id(t)] for t in kept], [d[i].double() for i in given], allow_unused=True
    )
    for leaf, a, b in zip(kept, gradients, wanted, strict=True):
        assert a.dtype == leaf.dtype
        b = torch.zeros_like(a, dtype=torch.float64) if b is None else b
        if leaf is qkv:
            near(a, b, dtype, slack=8.0)
        else:
            scale = max(b.abs().max().item(), (batch * seq * heads) ** 0.5)
            assert (a.double() - b).abs().max().item() <= SUMS * scale
