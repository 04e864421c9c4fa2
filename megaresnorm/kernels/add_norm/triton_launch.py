"""Launches the Triton kernels of add_norm: which ones a call takes, in which tiles, on how many programs.

M rows   N columns
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megaresnorm.kernels.add_norm import triton_rows, triton_wide, triton_wide_forward
from megaresnorm.kernels.add_norm.spec import FORMS, SUMS, AddNormSpec, Inputs, Outputs, Saved
from megaresnorm.kernels.custom_op import launcher
from megaresnorm.kernels.dropout import factor_of, threshold_of
from megaresnorm.kernels.fp8.formats import E4M3
from megaresnorm.kernels.fp8.triton_quantize import group_of, note_amax

MAX_FORWARD = 16384  # columns of a row in registers, with one norm; half as many with several
MAX_BACKWARD = 8192  # likewise in backward, however many norms
MAX_WITH_SUMS = 8192  # likewise beside the column sums of one norm; half as many with several
KINDS = {"none": 0, "rmsnorm": 1, "layernorm": 2}
NUMBER, SCALAR, VECTOR = 0, 1, 2  # forms of a gate: constant, learned [1], learned [N]


class Shape(NamedTuple):
    """A program's tile of block_m rows and block_n columns, and its warps of 32 threads."""

    block_m: int
    block_n: int
    warps: int


WIDE = Shape(1, 4096, 8)  # of rows that are read a block of columns at a time
WIDE_BACKWARD = Shape(1, 2048, 8)
COLUMNS = Shape(8, 128, 4)  # of the column sums of rows that have kept none
SUMS_TILE = Shape(32, 64, 4)  # of the partial sums of all programs
COLUMNS_ROWS = 256  # rows of a program of the former


def forward_shape(columns: int, norms: int, drops: bool = False) -> Shape | None:
    """Tiles of rows in registers: 2048 numbers or one row, 16 numbers a thread, 32 in the widest.

    With several norms 1024 numbers: the weights of one row are then a tile as the row is.

    Returns:
        None for rows that are read a block of columns at a time.
    """
    block_n, several = triton.next_power_of_2(columns), norms + drops > 1
    if block_n * (1 + several) > MAX_FORWARD:
        return None
    block_m = max(1, 2048 // (1 + several) // block_n)
    return Shape(block_m, block_n, min(16, max(4, block_m * block_n // 512)))


def backward_shape(columns: int, norms: int, drops: bool = False) -> Shape | None:
    """Tiles of the kernel that keeps column sums; None where they would not fit in registers beside a row.

    One norm: 4096 numbers or one row, 16 a thread. A thread of two or three norms, each with a tensor, a weight and a
    sum of its own, has 8. Dropout counts as a norm: its mask is 32-bit arithmetic on every number.

    tests/kernels/registers.json has the registers that each kernel may use.
    """
    block_n, several = triton.next_power_of_2(columns), norms + drops > 1
    if block_n * (1 + several) > MAX_WITH_SUMS:
        return None
    block_m = max(1, 4096 // (1 + several) // block_n)
    return Shape(block_m, block_n, min(16, max(4, block_m * block_n // (256 if several else 512))))


def shape_without_sums(columns: int) -> Shape | None:
    """Tiles of one row in registers; None for rows that are read a block of columns at a time."""
    block_n = triton.next_power_of_2(columns)
    return None if block_n > MAX_BACKWARD else Shape(1, block_n, min(16, max(4, block_n // 512)))


def forward(inputs: Inputs, spec: AddNormSpec, outputs: Outputs) -> None:
    """Fill ``outputs``, as ``AddNormBackend.forward``."""
    x, delta, gate, given, key, numbers, w = inputs
    rows, columns = x.shape
    shape = forward_shape(columns, *_work(spec))
    kernel = triton_wide_forward.forward_kernel if shape is None else triton_rows.forward_kernel
    shape = shape or WIDE
    z, trunk, branch, codes, inverse, branch_statistics, statistics, next_statistics, amax = outputs
    group = group_of(FORMS[spec.form], columns, shape.block_n) if spec.writes_fp8 else 0
    own = None if amax is None else x.new_empty(rows, dtype=torch.float32)
    if rows:
        launcher(kernel)[(triton.cdiv(rows, shape.block_m),)](
            x, delta, gate, z, trunk, None if spec.writes_fp8 else branch, codes, inverse, given, own, key, numbers,
            w[0], w[1], branch_statistics, w[2], w[3], statistics, w[4], w[5], next_statistics,
            rows, columns, spec.alpha, spec.constant_gate, factor_of(spec.probability), spec.first_column, *spec.eps,
            *_kinds(spec), _kind_of_gate(gate), group, threshold_of(spec.probability),
            shape.block_m, shape.block_n, num_warps=shape.warps,
        )  # fmt: skip
    if own is not None and given is not None and amax is not None and inverse is not None:
        note_amax(own, given, amax, inverse, E4M3)


def backward(
    d_trunk: Tensor | None, d_branch: Tensor | None, saved: Saved, spec: AddNormSpec, dx: Tensor, d_delta: Tensor | None
) -> Tensor:
    """Fill dx and d_delta and return the column sums, as ``AddNormBackend.backward``."""
    z, trunk, delta, gate, key, numbers, w, (branch_statistics, statistics, next_statistics) = saved
    rows, columns = z.shape
    if d_branch is None:
        spec = spec.without_next_norm()
    used = [i for i, there in enumerate(_sums(saved, spec)) if there]
    sums = z.new_empty((SUMS, columns), dtype=torch.float32)
    if rows == 0:
        return sums.zero_()
    shape = backward_shape(columns, *_work(spec))
    apart = shape is None  # column sums by a kernel of their own
    shape = shape or shape_without_sums(columns)
    each, programs = split_rows(rows, shape or WIDE, multiprocessors(z.device))
    coefficients = z.new_zeros((rows, 6), dtype=torch.float32) if apart else None
    each_of_columns = COLUMNS_ROWS if apart else each
    parts, partial = _parts(z, used, triton.cdiv(rows, each_of_columns))
    kinds = *_kinds(spec), _kind_of_gate(gate), threshold_of(spec.probability)
    numeric = spec.constant_gate, factor_of(spec.probability), spec.first_column
    if shape is not None:
        launcher(triton_rows.backward_kernel)[(programs,)](
            d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta, coefficients, key, numbers,
            w[0], w[1], branch_statistics, w[2], statistics, w[4], next_statistics,
            *((None,) * SUMS if apart else parts),
            rows, columns, each, spec.alpha, *numeric, *kinds, shape.block_m, shape.block_n, num_warps=shape.warps,
        )  # fmt: skip
    else:
        wide = WIDE_BACKWARD
        launcher(triton_wide.rows_kernel)[(rows,)](
            d_trunk, d_branch, z, trunk, delta, gate, dx, d_delta, coefficients, key, numbers,
            w[0], branch_statistics, w[2], statistics, w[4], next_statistics,
            rows, columns, spec.alpha, *numeric, *kinds, wide.block_m, wide.block_n, num_warps=wide.warps,
        )  # fmt: skip
    if apart and used:
        launcher(triton_wide.columns_kernel)[(triton.cdiv(rows, COLUMNS_ROWS), triton.cdiv(columns, COLUMNS.block_n))](
            d_trunk, d_branch, z, trunk, delta, gate, coefficients, key, numbers,
            w[0], w[1], branch_statistics, w[2], statistics, w[4], next_statistics, *parts,
            rows, columns, COLUMNS_ROWS, *numeric, *kinds, COLUMNS.block_m, COLUMNS.block_n, num_warps=COLUMNS.warps,
        )  # fmt: skip
    launcher(triton_rows.sum_kernel)[(triton.cdiv(columns, SUMS_TILE.block_n), SUMS)](
        partial, sums, triton.cdiv(rows, each_of_columns), columns, sum(1 << i for i in used),
        SUMS_TILE.block_m, SUMS_TILE.block_n, num_warps=SUMS_TILE.warps,
    )  # fmt: skip
    return sums


def _parts(z: Tensor, used: Sequence[int], programs: int) -> tuple[list[Tensor | None], Tensor]:
    """Where each of the SUMS column sums is stored by the programs, [programs, N] or None; and all of it."""
    partial = z.new_empty((max(1, len(used)), programs, z.shape[1]), dtype=torch.float32)
    parts: list[Tensor | None] = [None] * SUMS
    for slot, i in enumerate(used):
        parts[i] = partial[slot]
    return parts, partial


def split_rows(rows: int, shape: Shape, processors: int) -> tuple[int, int]:
    """Rows of a program and number of programs, as many of them as run at the same time.

    Two programs of eight warps fit on a multiprocessor: their partial sums are then two percent of the bytes moved.

    >>> split_rows(8192, Shape(1, 4096, 8), 132)
    (32, 256)
    """
    programs = min(triton.cdiv(rows, shape.block_m), max(1, 16 // shape.warps) * processors)
    each = triton.cdiv(triton.cdiv(rows, programs), shape.block_m) * shape.block_m
    return each, triton.cdiv(rows, each)


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 elsewhere, where an interpreter runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _work(spec: AddNormSpec) -> tuple[int, bool]:
    """Number of norms, and whether there is dropout."""
    return sum(kind != "none" for kind in spec.kinds), spec.probability > 0.0


def _kinds(spec: AddNormSpec) -> list[int]:
    return [KINDS[kind] for kind in spec.kinds]


def _kind_of_gate(gate: Tensor | None) -> int:
    return NUMBER if gate is None else SCALAR if gate.numel() == 1 else VECTOR


def _sums(saved: Saved, spec: AddNormSpec) -> Sequence[bool]:
    """Which of the SUMS column sums exist."""
    weights = [w is not None and spec.kinds[i // 2] != "none" for i, w in enumerate(saved.weights)]
    return *weights, saved.gate is not None
