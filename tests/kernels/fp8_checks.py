"""What kernels that write FP8 are held to: the bits of kernels/fp8/formats.py."""

import functools
from dataclasses import replace

import torch
from add_norm_checks import BF16, DTYPES, F32, PATTERNS, make_norm

from megaresnorm.kernels.add_norm.reference import AddNormArgs, with_fp8
from megaresnorm.kernels.add_norm.spec import FORMS
from megaresnorm.kernels.dropout import Dropout
from megaresnorm.kernels.fp8.formats import (
    E4M3,
    TENSOR,
    Fp8Output,
    amax_of,
    dequantize,
    quantize,
    quantize_delayed,
    quantize_transposed,
)

STREAMS = {name: dtypes[:3] for name, dtypes in DTYPES.items()}  # stream, delta, residual


def same(got, want):
    """Check scales and codes, where their scale is finite: then the codes are all that is read."""
    assert got.form == want.form and got.codes.dtype == want.codes.dtype and got.inverse.dtype == F32
    torch.testing.assert_close(got.inverse, want.inverse, rtol=0, atol=0, equal_nan=True)
    assert got.codes.shape == want.codes.shape
    finite = dequantize(want._replace(codes=torch.ones(want.codes.shape))).isfinite()
    a, b = (q.codes.view(torch.uint8).where(~q.codes.float().isnan(), 0x7F)[finite] for q in (got, want))
    assert torch.equal(a, b)


def numbers(rows, columns, dtype, device="cpu", bad=True):
    """Of many sizes: a row of zeros, subnormal numbers, and with ``bad`` some that are not finite."""
    g = torch.Generator(device).manual_seed(rows * 31 + columns)
    x = torch.randn(rows, columns, generator=g, device=device)
    x *= torch.randn(rows, columns, generator=g, device=device).mul(3).exp()
    if rows > 6:
        x[1], x[2] = 0.0, x[2] * 1e-39
        x[3] *= 1e30
        if bad:
            x[4, columns // 2], x[5, 0], x[6, -1] = torch.nan, torch.inf, -torch.inf
    return x.to(dtype)


def check_fp8(
    kernel, rows, columns, pattern, gate_kind, stream, form, *, drops=False, gradients=True, remade=True, device="cpu"
):
    """A branch input in FP8: the bits of the same kernel's, quantized behind it, and the gradients of that.

    Args:
        remade: whether it is also made again of the stored sum, as a recomputation does.
    """
    g = torch.Generator(device).manual_seed(rows * 31 + columns)
    draw = functools.partial(torch.randn, rows, columns, generator=g, device=device)
    x_dtype, delta_dtype, residual_dtype = STREAMS[stream]
    x = draw().to(x_dtype)
    x[0, columns // 2], x[1] = torch.nan, 0.0
    x = x.requires_grad_()
    delta = None if gate_kind == "no delta" else draw().to(delta_dtype).requires_grad_()
    gates = {"scalar": torch.tensor([0.7]), "vector": torch.linspace(0.5, 1.5, columns)}
    gate = gates.get(gate_kind, 0.3)
    if isinstance(gate, torch.Tensor):
        gate = gate.to(device).requires_grad_()
    norms = [make_norm(kind, columns, g, device) for kind in PATTERNS[pattern]]
    dropout = None
    if drops and delta is not None:
        dropout = Dropout(0.3, torch.tensor(-0x123456789ABCDEF, device=device), torch.arange(rows, device=device))
    given = torch.full((1, 1), 1.5, device=device) if form == "tensor" else None
    args = AddNormArgs(
        x, delta, alpha=1.5, gate=gate, branch_norm=None if delta is None else norms[0], norm=norms[1],
        next_norm=norms[2], residual_dtype=residual_dtype, out_dtype=BF16, fp8=Fp8Output(FORMS[form], given),
        dropout=dropout,
    )  # fmt: skip
    got, want = kernel(args), with_fp8(kernel, args)
    assert torch.equal(got.trunk[1:], want.trunk[1:])
    same(got.fp8, want.fp8)
    assert not got.fp8.inverse.isfinite()[0].any() or form in ("block", "mx")
    assert got.fp8.inverse.isnan().any() and (form == "tensor" or got.fp8.inverse[1:].isfinite().all())
    for a, b in ((got.amax, want.amax), (got.statistics, want.statistics)):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    if remade and dropout is None and got.stored is not None:
        again = replace(args, x=got.stored, delta=None, alpha=1.0, gate=1.0, branch_norm=None, fp8=None)
        values = kernel(again).branch_input.detach()
        same(got.fp8, quantize(values, FORMS[form]) if given is None else quantize_delayed(values, E4M3, given)[0])
    assert got.branch_input.shape == x.shape and got.branch_input.dtype == BF16
    leaves = [t for t in (x, delta, gate) if isinstance(t, torch.Tensor)]
    leaves += [
        w for n in norms if n is not None for w in n[1:3] if w is not None and (n is not norms[0] or delta is not None)
    ]
    if not gradients:
        return got
    several = 2 if want.branch_input is not want.trunk else 1
    d = [draw().to(residual_dtype), draw().to(BF16)][:several]
    found = [torch.autograd.grad((out.trunk, out.branch_input)[:several], leaves, d) for out in (got, want)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return got


def check_quantize(kernels, rows, columns, form, source=BF16, dtype=E4M3, device="cpu"):
    """The op of a backend, with every argument that it may have."""
    form, x = FORMS[form], numbers(rows, columns, source, device)
    factor = torch.exp2(torch.arange(columns, device=device) % 7 - 3.0)
    amax = amax_of(x, form).nan_to_num(3.0, 3.0, 3.0) * 0.75
    if form == TENSOR:
        amax = torch.full((1, 1), 20.0, device=device)
        q, own = kernels.delayed(x, dtype, amax)
        want, wanted = quantize_delayed(x, dtype, amax)
        same(q, want)
        torch.testing.assert_close(own, wanted, rtol=0, atol=0, equal_nan=True)
    for given in (None, amax):
        for columns_by in (None, factor):
            got = kernels.rows(x, form, dtype, amax=given, factor=columns_by)
            same(got, quantize(x, form, dtype, amax=given, factor=columns_by))


def check_transposed(kernels, rows, columns, form, source=BF16, dtype=E4M3, device="cpu"):
    """The transposing op: of values, or of FP8 in a form."""
    for bad in (False, True):
        x = numbers(rows, columns, BF16, device, bad)
        x = x if source == BF16 else quantize(x, FORMS[source])
        same(kernels.transposed(x, FORMS[form], dtype), quantize_transposed(x, FORMS[form], dtype))
