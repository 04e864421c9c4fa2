"""The two passes of the loss over the outputs of the output matrix, in Triton; kernels/cross_entropy.py has the loss.

A program has one row and goes over it a block at a time. A thread's numbers are 8 neighbours and more of them further
on (BLOCK_M groups of 8): each group has a largest number and a sum of its own, so that a number costs one exponential
and threads meet once a row.

T rows (tokens)   V columns (vocabulary)
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaresnorm.kernels.cross_entropy import LogitForm
from megaresnorm.kernels.custom_op import FLOATS

GROUP = 8  # neighbours: 16 bytes of BF16
GROUPS = 1024  # in a block
WARPS = 8
LEAST = -3.0e38  # below all logits, and finite: what is not a token has no share of a sum


@triton.jit
def _block(outputs, row, start, width, pitch, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """The columns of a block [m, GROUP], where in memory they are, and which of them exist."""
    cols = start + tl.arange(0, BLOCK_M)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    return cols, outputs + row * pitch + cols, cols < width


@triton.jit
def _logits(x, scale, softcap, CAPPED: tl.constexpr):
    """The logits of outputs x, and their slope."""
    v, slope = x * scale, x * 0.0 + scale
    if CAPPED:
        ratio = 1.0 - 2.0 / (tl.exp(v * (2.0 / softcap)) + 1.0)  # tanh
        v, slope = softcap * ratio, scale * (1.0 - ratio * ratio)
    return v, slope


@triton.jit(do_not_specialize=["columns"])
def statistics_kernel(
    outputs, labels, sums, columns, width, pitch, scale, softcap, LEAST: tl.constexpr,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """sums [T, 3]: the largest logit l of a row, the sum of exp(l - largest), the logit at the label or 0.

    The first ``columns`` of ``width`` are tokens. Reads the outputs once: 2 bytes an element in BF16.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    here = (label >= 0) & (label < columns)
    at_label, _slope_there = _logits(
        tl.load(outputs + row * pitch + tl.where(here, label, 0)).to(tl.float32), scale, softcap, CAPPED
    )
    largest = tl.full([BLOCK_M], LEAST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, width, BLOCK_M * GROUP):
        cols, places, mask = _block(outputs, row, start, width, pitch, BLOCK_M, GROUP)
        v, _slope = _logits(tl.load(places, mask=mask, other=0.0).to(tl.float32), scale, softcap, CAPPED)
        v = tl.where(cols < columns, v, LEAST)
        larger = tl.maximum(largest, tl.max(v, 1))
        share = tl.where(cols < columns, tl.exp(v - larger[:, None]), 0.0)
        total = total * tl.exp(largest - larger) + tl.sum(share, 1)
        largest = larger
    top = tl.max(largest, 0)
    tl.store(sums + 3 * row, top)
    tl.store(sums + 3 * row + 1, tl.sum(total * tl.exp(largest - top), 0))
    tl.store(sums + 3 * row + 2, tl.where(here, at_label, 0.0))


@triton.jit(do_not_specialize=["columns"])
def gradient_kernel(
    outputs, labels, coefficients, columns, width, pitch, scale, softcap,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """outputs = (exp(l - log Z) factor, less the share at the label) slope, and 0 in the padding.

    ``coefficients`` [T, 3] are log Z, the factor and the share; a row whose factor is 0 becomes 0. Reads and writes the
    outputs once: 4 bytes an element in BF16.
    """
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    log_z = tl.load(coefficients + 3 * row)
    factor = tl.load(coefficients + 3 * row + 1)
    share = tl.load(coefficients + 3 * row + 2)
    for start in range(0, width, BLOCK_M * GROUP):
        cols, places, mask = _block(outputs, row, start, width, pitch, BLOCK_M, GROUP)
        v, slope = _logits(tl.load(places, mask=mask, other=0.0).to(tl.float32), scale, softcap, CAPPED)
        gradient = (tl.exp(v - log_z) * factor - tl.where(cols == label, share, 0.0)) * slope
        gradient = tl.where((cols < columns) & (cols * 0.0 + factor != 0.0), gradient, 0.0)
        tl.store(places, gradient.to(outputs.dtype.element_ty), mask=mask)


def pieces(
    outputs_TV: Tensor, labels_T: Tensor, form: LogitForm, writes: bool
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """``LossPieces`` for FP32 and BF16 outputs.

    Raises:
        TypeError: the outputs have another type.
        ValueError: they are not rows of neighbours.
    """
    if outputs_TV.dtype not in FLOATS:
        raise TypeError(f"cross_entropy/triton: {outputs_TV.dtype}, wanted float32, bfloat16 or float16; take another")
    if outputs_TV.stride(1) != 1 or labels_T.shape != outputs_TV.shape[:1]:
        raise ValueError("cross_entropy/triton: wanted rows whose numbers are neighbours, and a label for each row")
    (rows, width), pitch = outputs_TV.shape, outputs_TV.stride(0)
    capped = form.softcap is not None
    form_of = form.columns, width, pitch, form.scale, form.softcap if capped else 1.0
    groups = min(GROUPS, max(32, triton.next_power_of_2(triton.cdiv(width, GROUP))))
    labels_T = labels_T.contiguous()
    statistics_T3 = outputs_TV.new_empty((rows, 3), dtype=torch.float32)
    if rows:
        statistics_kernel[(rows,)](
            outputs_TV, labels_T, statistics_T3, *form_of, LEAST, capped, groups, GROUP, num_warps=WARPS
        )

    def write(coefficients_T3: Tensor) -> None:
        if not rows:
            return
        with torch.cuda.device_of(outputs_TV):
            gradient_kernel[(rows,)](
                outputs_TV, labels_T, coefficients_T3.float().contiguous(), *form_of, capped, groups, GROUP,
                num_warps=WARPS,
            )  # fmt: skip

    return statistics_T3, write
