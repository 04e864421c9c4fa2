"""Collectives that make whole rows of FP8 codes and scales: one byte an element, and one for each scale.

T tokens   D columns   p ranks of the axis
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megaresnorm.kernels.fp8.formats import Form, Fp8, Rows, exponents, rows_of, scales
from megaresnorm.parallel.branch_input import COPY, GATHER_COLUMNS, GATHER_ROWS, BranchInput, Collective, PendingRows
from megaresnorm.parallel.collectives import blocks_to_columns, start_all_gather
from megaresnorm.parallel.linear_kernel import LinearKernel
from megaresnorm.parallel.mesh import Axis


def in_fp8(collective: Collective, form: Form) -> Collective:
    """A collective of ``branch_input`` for codes and inverse scales of this form. Its transpose is the same.

    Scales that ranks share (``Form.spans``) are not sent. Others are powers of two, whose exponents travel as a byte
    each beside the codes of their row.

    Communication:
        For ``GATHER_ROWS`` one all-gather of [T/p, D + s] bytes, where a row has s scales of its own; for
        ``GATHER_COLUMNS`` of [T, D/p + s].
    """
    dim = {GATHER_ROWS: 0, GATHER_COLUMNS: 1}.get(collective)
    if dim is None:
        assert collective is COPY
        return Collective(lambda sources, axis: lambda: rows_of(sources, form), collective.start_transpose)
    shared = form.spans(dim)

    def start(sources: tuple[Tensor, ...], axis: Axis) -> PendingRows:
        codes, inverse = sources
        width, dtype = codes.shape[1], codes.dtype
        sent = codes.view(torch.uint8)
        arriving = start_all_gather(sent if shared else torch.cat((sent, exponents(inverse)), 1), axis)

        def finish() -> Fp8:
            everyone = arriving()
            whole = [
                part.flatten(0, 1).contiguous() if dim == 0 else blocks_to_columns(part)
                for part in (everyone[:, :, :width], everyone[:, :, width:])
            ]
            return Fp8(whole[0].view(dtype), inverse if shared else scales(whole[1]), form)

        return finish

    return Collective(start, collective.start_transpose)


def sent(u: BranchInput, reader: LinearKernel, dim: int) -> tuple[BranchInput, Callable[[Tensor], Rows] | None]:
    """A branch input as its reader wants it sent, and what makes its ``part`` of its values; None: there is none.

    Args:
        u: its collective gathers values.
        dim: 0 where this rank has rows, 1 where it has columns.

    Communication:
        That of ``LinearKernel.part``, and in backward the same again of what is returned.
    """
    axis, collective = u.axis, u.collective
    assert axis is not None and collective is not None

    def read(values: Tensor) -> Rows:
        return reader.part(values, axis, dim)

    part = read(u.local.detach())
    if isinstance(part, Tensor):
        return u, None
    return u._replace(collective=in_fp8(collective, part.form), sources=part.tensors, part=part), read
