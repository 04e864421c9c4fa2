"""The activation with its bias in Triton: one pass forward, one backward. Computed in FP32, rounded once.

h + bias is rounded to h's type before it is activated, as the reference rounds it. A program has a tile of rows and
columns; in backward several tiles, one below the other, whose sums for the bias it writes as one row of FP32. These
rows are added in a fixed order: no atomics.

M rows   N columns of y (h has 2 N with a gate, the gate first)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.activation import GATED
from megaresnorm.kernels.custom_op import launcher

CURVES = {"gelu": 0, "geglu": 0, "gelu_tanh": 1, "geglu_tanh": 1, "relu": 2, "swiglu": 3}
BLOCK_M, BLOCK_N = 8, 256  # 16 numbers a thread of 4 warps: 128-bit accesses
TILES = 16  # of a program that sums for a bias: its sums are one row of FP32 for 128 rows of dh


@triton.jit
def _sigmoid(z):
    """s = 1 / (1 + exp(-z)) and s (1 - s); no exponential is of a positive number, and 1 - s is no difference."""
    e = tl.exp(-tl.abs(z))
    reciprocal = 1.0 / (1.0 + e)
    return tl.where(z >= 0.0, 1.0, e) * reciprocal, e * reciprocal * reciprocal


@triton.jit
def _value(x, CURVE: tl.constexpr):
    """The curve: GELU (0), its tanh approximation (1), ReLU (2) or SiLU (3)."""
    if CURVE == 0:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CURVE == 1:  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        s, _ = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = x * s
    elif CURVE == 2:
        y = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    else:
        s, _ = _sigmoid(x)
        y = x * s
    return y


@triton.jit
def _slope(x, CURVE: tl.constexpr):
    """The curve's derivative."""
    if CURVE == 0:
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif CURVE == 1:
        s, product = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * product * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif CURVE == 2:
        y = tl.where(x <= 0.0, 0.0, 1.0)
    else:
        s, product = _sigmoid(x)
        y = s + x * product
    return y


@triton.jit
def _with_bias(h, bias, at, cols, mask):
    """h + bias in FP32, rounded as h is stored."""
    x = tl.load(h + at, mask=mask, other=0.0)
    if bias is not None:
        b = tl.load(bias + cols[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + b).to(h.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def _place(columns, BLOCK_N: tl.constexpr):
    """This program's number among those one below the other, in int64, and its columns; neighbours share rows."""
    across = tl.cdiv(columns, BLOCK_N)
    below = tl.program_id(0) // across
    return below.to(tl.int64), (tl.program_id(0) - below * across) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    h, bias, y, rows, columns, CURVE: tl.constexpr, GATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """y = curve(h + bias), times (up + its bias) with a gate. ``columns`` are those of y; bias may be None.

    Reads h and writes y, each once: in BF16 4 bytes an element of y, 6 with a gate.
    """
    program, cols = _place(columns, BLOCK_N)
    row = program * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (row < rows)[:, None] & (cols < columns)[None, :]
    pitch = 2 * columns if GATE else columns
    at = row[:, None] * pitch + cols[None, :]
    v = _value(_with_bias(h, bias, at, cols, mask), CURVE)
    if GATE:
        v = v * _with_bias(h, bias, at + columns, cols + columns, mask)
    tl.store(y + (row[:, None] * columns + cols[None, :]), v.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy, h, bias, dh, partial, rows, columns,
    CURVE: tl.constexpr, GATE: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh, and this program's share of the bias's gradient as a row of ``partial`` [programs, N or 2 N]; None without.

    Reads dy and h and writes dh, each once: in BF16 6 bytes an element of y, 10 with a gate.
    """
    program, cols = _place(columns, BLOCK_N)
    pitch = 2 * columns if GATE else columns
    a_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    a_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(TILES):
        row = (program * TILES + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (cols < columns)[None, :]
        at = row[:, None] * pitch + cols[None, :]
        g = tl.load(dy + (row[:, None] * columns + cols[None, :]), mask=mask, other=0.0).to(tl.float32)
        x = _with_bias(h, bias, at, cols, mask)
        if GATE:
            up = _with_bias(h, bias, at + columns, cols + columns, mask)
            d_up = g * _value(x, CURVE)
            g = g * up
            tl.store(dh + (at + columns), d_up.to(dh.dtype.element_ty), mask=mask)
            if partial is not None:
                a_up += d_up
        dx = g * _slope(x, CURVE)
        tl.store(dh + at, dx.to(dh.dtype.element_ty), mask=mask)
        if partial is not None:
            a_gate += dx
    if partial is not None:
        tl.store(partial + program * pitch + cols, tl.sum(a_gate, 0), mask=cols < columns)
        if GATE:
            tl.store(partial + program * pitch + columns + cols, tl.sum(a_up, 0), mask=cols < columns)


def forward(h: Tensor, bias: Tensor | None, kind: str, y: Tensor) -> None:
    """Fill y, as ``ActivationBackend.forward``."""
    rows, columns = y.shape
    if y.numel() == 0:
        return
    launcher(forward_kernel)[(triton.cdiv(rows, BLOCK_M) * triton.cdiv(columns, BLOCK_N),)](
        h, bias, y, rows, columns, CURVES[kind], kind in GATED, BLOCK_M, BLOCK_N, num_warps=4
    )


def backward(dy: Tensor, h: Tensor, bias: Tensor | None, kind: str, dh: Tensor) -> Tensor | None:
    """Fill dh and return the bias's gradient, as ``ActivationBackend.backward``."""
    rows, columns = dy.shape
    tiles = 1 if bias is None else TILES
    programs = triton.cdiv(rows, tiles * BLOCK_M)
    partial = None if bias is None else h.new_empty((programs, h.shape[1]), dtype=torch.float32)
    if dy.numel():
        launcher(backward_kernel)[(programs * triton.cdiv(columns, BLOCK_N),)](
            dy, h, bias, dh, partial, rows, columns, CURVES[kind], kind in GATED, tiles, BLOCK_M, BLOCK_N, num_warps=4
        )
    return None if partial is None else partial.sum(0)
