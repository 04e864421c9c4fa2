"""What every backend of add_norm is held to, against FP64 from the same stored sum."""

import functools

import torch

from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights, add_norm
from megaresnorm.kernels.dropout import Dropout

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
# branch_norm, norm, next_norm: the patterns of the topologies, and all at once.
PATTERNS = {
    "pre": (None, None, "layernorm"),
    "pre, rms": (None, None, "rmsnorm"),
    "post": (None, "layernorm", None),
    "post, rms": (None, "rmsnorm", None),
    "keel": (None, "rmsnorm", "rmsnorm"),
    "sandwich": ("layernorm", None, "layernorm"),
    "all": ("rmsnorm", "layernorm", "rmsnorm"),
    "none": (None, None, None),
}
GATES = ("number", "scalar", "vector", "no delta")
DTYPES = {  # stream, delta, residual, branch input
    "fp32": (F32, F32, F32, F32),
    "bf16 on fp32": (F32, BF16, F32, BF16),
    "bf16": (BF16, BF16, BF16, BF16),
}
WITHOUT_C = {"fp16 on fp32": (F32, F16, F32, F16)}  # the C kernels have no FP16
# Rounding at most 1.5 times as far from FP64 as rounding FP64 once is.
ROUNDING = 1.5
FP32_OF_ROW = 5e-7
SUMS = 1e-5


def make_norm(kind, columns, g, device="cpu"):
    if kind is None:
        return None
    draw = functools.partial(torch.randn, columns, generator=g, device=g.device)
    weight = (1 + 0.3 * draw()).to(device).requires_grad_()
    bias = (0.3 * draw()).to(device).requires_grad_() if kind == "layernorm" else None
    return NormWeights(kind, weight, bias, 1e-5)


def textbook_norm(x, norm, weights):
    """In FP64. weights: the norm's tensors in FP64, by the id of the FP32 ones."""
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weights[id(norm.weight)]
    return y if norm.bias is None else y + weights[id(norm.bias)]


def scale_of_row(x, norm):
    """The largest |x| of a row in units of its deviation: what FP32 can tell apart is relative to it."""
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    return x.abs().amax(-1, keepdim=True) / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()


class Stored(torch.autograd.Function):
    """A value that was stored in the place of the exact one; gradients pass."""

    @staticmethod
    def forward(ctx, exact, stored):
        return stored.double()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def check(kernel, rows, columns, pattern, gate_kind, dtypes, alpha=2.5, device="cpu", drops=False, separate=False):
    """Values and gradients of one call, with ``drops`` of one with dropout. Raises AssertionError.

    Args:
        separate: whether add and norms are functions of their own: a gradient between two of them is rounded to the
            residual's type, up to four times in all.
    """
    g = torch.Generator(device).manual_seed(rows * 31 + columns)  # on the device: a CPU would draw for minutes
    draw = functools.partial(torch.randn, rows, columns, generator=g, device=device)
    x_dtype, delta_dtype, residual_dtype, out_dtype = (DTYPES | WITHOUT_C)[dtypes]
    x = draw().to(x_dtype).requires_grad_()
    delta = None if gate_kind == "no delta" else draw().to(delta_dtype).requires_grad_()
    gates = {"scalar": torch.tensor([0.7]), "vector": torch.linspace(0.5, 1.5, columns), "one": 1.0}
    gate = gates.get(gate_kind, 0.3)
    if isinstance(gate, torch.Tensor):
        gate = gate.to(device).requires_grad_()
    branch_norm, norm, next_norm = (make_norm(kind, columns, g, device) for kind in PATTERNS[pattern])
    branch_norm = None if delta is None else branch_norm
    dropout = None
    if drops and delta is not None:
        numbers = torch.arange(rows, device=device) * 3 + (1 << 33)
        dropout = Dropout(0.3, torch.tensor(-0x123456789ABCDEF, device=device), numbers, first_column=5)
    out = kernel(AddNormArgs(
        x, delta, alpha=alpha, gate=gate, branch_norm=branch_norm, norm=norm, next_norm=next_norm,
        residual_dtype=residual_dtype, out_dtype=out_dtype, dropout=dropout,
    ))  # fmt: skip
    assert out.trunk.dtype == residual_dtype and out.branch_input.dtype == out_dtype
    # The stored sum: by the same kernel without the norms behind it.
    stored = kernel(
        AddNormArgs(
            x,
            delta,
            alpha=alpha,
            gate=gate,
            branch_norm=branch_norm,
            residual_dtype=residual_dtype,
            out_dtype=None,
            dropout=dropout,
        )
    ).trunk

    weights = [w for n in (branch_norm, norm, next_norm) if n is not None for w in (n.weight, n.bias) if w is not None]
    leaves = [x, *([] if delta is None else [delta]), *([gate] if isinstance(gate, torch.Tensor) else []), *weights]
    wide = {id(leaf): leaf.detach().double().requires_grad_() for leaf in leaves}
    branch = None if delta is None else wide[id(delta)]
    if branch_norm is not None:
        branch = textbook_norm(branch, branch_norm, wide)
    if dropout is not None:
        branch = dropout(branch)
    z = wide[id(x)] if branch is None else alpha * wide[id(x)] + wide.get(id(gate), gate) * branch
    near(
        stored, z, residual_dtype, scale=alpha * x.detach().double().abs().amax(-1, keepdim=True)
    )  # its terms may cancel
    z = Stored.apply(z, stored.detach())
    trunk = z
    if norm is not None:
        trunk = textbook_norm(z, norm, wide)
        near(out.trunk, trunk, residual_dtype, scale=scale_of_row(z, norm))
        trunk = Stored.apply(trunk, out.trunk.detach())
    want = trunk if next_norm is None else textbook_norm(trunk, next_norm, wide)
    near(out.branch_input, want, out_dtype, scale=None if next_norm is None else scale_of_row(trunk, next_norm))
    if columns <= 3 and any(PATTERNS[pattern]):
        # One or two normalised columns are a constant or signs, and three nearly so: gradients are rounding alone.
        return
    d_trunk, d_branch = draw().to(residual_dtype), draw().to(out_dtype)
    # Where both outputs are one tensor its gradient is one too: adding two in BF16 is not the kernel's doing.
    several = 2 if out.branch_input is not out.trunk else 1
    got = torch.autograd.grad((out.trunk, out.branch_input)[:several], leaves, (d_trunk, d_branch)[:several])
    sums, rounding = (2**-7, 4.0) if separate and residual_dtype == BF16 else (SUMS, ROUNDING)
    wide_leaves = [wide[id(leaf)] for leaf in leaves]
    exact = torch.autograd.grad((trunk, want)[:several], wide_leaves, (d_trunk.double(), d_branch.double())[:several])
    for leaf, a, b in zip(leaves, got, exact, strict=True):
        assert a is not None and a.dtype == leaf.dtype
        if leaf is x or leaf is delta:
            near(a, b, a.dtype, slack=8.0, rounding=rounding)  # in FP32: a difference of terms of its own size
        else:
            scale = max(b.abs().max().item(), rows**0.5)  # a sum of ``rows`` terms of size 1 may come out near 0
            scale = max(scale, (rows * columns) ** 0.5) if leaf.numel() == 1 else scale
            assert (a.double() - b).abs().max().item() <= sums * scale, (pattern, gate_kind, dtypes, a.shape)


def near(got, want, dtype, *, scale=None, slack=1.0, rounding=ROUNDING):
    """Check that values of ``dtype`` are within the project's bounds.

    Args:
        scale: [rows, 1], the size of FP32 rows where it is not their own.
    """
    want = want.detach()
    error = (got.double() - want).abs()
    if dtype == F32:
        size = want.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        size = size if scale is None else torch.maximum(size, scale.detach())
        worst = (error / size).max().item() if error.numel() else 0.0
        assert worst <= slack * FP32_OF_ROW, worst
    else:
        once = (want.to(dtype).double() - want).norm().item()
        assert error.norm().item() <= rounding * once + 1e-30, (error.norm().item(), once)


def check_fp8(kernel, rows, columns, pattern, device="cpu"):
    """FP8 under a scale that saturates a few values, its amax, and the gradient that passes."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=g).to(device, BF16).requires_grad_()
    delta = torch.randn(rows, columns, generator=g).to(device, BF16).requires_grad_()
    _, norm, next_norm = (make_norm(kind, columns, g, device) for kind in PATTERNS[pattern])
    scale = torch.tensor(448.0 / 2.5, device=device)
    settings = {"alpha": 1.0, "norm": norm, "next_norm": next_norm, "residual_dtype": BF16}
    out = kernel(AddNormArgs(x, delta, **settings, out_dtype=FP8, fp8_scale=scale))
    exact = add_norm(AddNormArgs(x, delta, **settings, out_dtype=F32))
    want = exact.branch_input.detach().double()
    error = (out.branch_input.double() - (want * scale).clamp(-448, 448)).norm()
    once = ((want * scale).clamp(-448, 448).float().to(FP8).double() - (want * scale).clamp(-448, 448)).norm()
    assert error <= ROUNDING * once + 1e-30
    assert torch.equal(out.trunk, exact.trunk) or (out.trunk.double() - exact.trunk.double()).abs().max() < 0.04
    torch.testing.assert_close(out.amax.double(), want.abs().max(), rtol=1e-2 if norm is not None else 1e-5, atol=0)
    d = torch.randn(rows, columns, generator=g).to(device)
    got = torch.autograd.grad(out.branch_input, (x, delta), d.to(FP8))
    wanted = torch.autograd.grad(exact.branch_input, (x, delta), d.to(FP8).float())
    for a, b in zip(got, wanted, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()
