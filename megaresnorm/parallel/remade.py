"""Branch inputs that are made again in backward, of what is kept in any case, or that are read once more there.

T tokens   D model dim   d columns of this rank
"""

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput, NormWeights
from megaresnorm.kernels.add_norm.sharded import ShardedNormKernels
from megaresnorm.kernels.fp8.formats import Rows, rows_of, tensors_of
from megaresnorm.parallel.branch_input import BranchInput


class Remakes(Enum):
    """What a branch input may be made of again.

    Attributes:
        NOTHING: it is kept.
        ROWS: it is kept, as whole rows once they are gathered: within a recomputation that drops them.
        STORED: the stored sum, where a norm or an add keeps it for its own gradient.
        TRUNK: also the trunk itself, which whoever asks keeps.
    """

    NOTHING = "nothing"
    ROWS = "rows"
    STORED = "stored"
    TRUNK = "trunk"

    @property
    def of_what_is_kept(self) -> bool:
        """Whether it is made again. A compiler would take what is made twice for one, and keep that."""
        return self in (Remakes.STORED, Remakes.TRUNK) and not torch.compiler.is_compiling()


def remade_by_kernel(
    u: BranchInput,
    out: AddNormOutput,
    kernel: AddNormKernel,
    args: AddNormArgs,
    remakes: Remakes,
    read: Callable[[Tensor], Rows] | None = None,
) -> BranchInput:
    """The branch input of ``kernel(args)``, made again by the same kernel of the stored sum; u where it cannot be.

    Statistics are taken from the stored sum, so it is the same to the bit.

    Args:
        u: this rank's whole rows, of all tokens or its share of them.
        out: the results of the call.
        read: makes what ``u.part`` is of its values; None: there is none.
    """
    norm, next_norm, out_dtype = args.norm, args.next_norm, args.out_dtype
    if not remakes.of_what_is_kept or out.stored is None or out_dtype not in _MADE:
        return u
    if norm is None and next_norm is None:  # the stored sum itself, or rounded
        is_kept = args.delta is not None or remakes is Remakes.TRUNK
        if out_dtype == args.residual_dtype or not is_kept:
            return u
    stored_dtype = args.residual_dtype

    def remake(sources: Sequence[Tensor]) -> Rows:
        z, *vectors = sources
        again = AddNormArgs(
            z,
            norm=_with(norm, vectors),
            next_norm=_with(next_norm, vectors),
            residual_dtype=stored_dtype,
            out_dtype=out_dtype,
        )
        made = kernel(again).branch_input
        assert made is not None
        return made if read is None else read(made)

    norm, next_norm = _bare(norm), _bare(next_norm)
    vectors = [*_vectors(args.norm), *_vectors(args.next_norm)]
    return u._replace(sources=(out.stored, *vectors), remake=remake)


def remade_of_columns(
    u: BranchInput,
    z: Tensor,
    statistics: Tensor,
    norm: NormWeights,
    kernels: ShardedNormKernels,
    dtype: torch.dtype,
    read: Callable[[Tensor], Rows] | None = None,
) -> BranchInput:
    """The branch input that is the norm of this rank's columns with merged statistics; nothing is merged again.

    Args:
        u: gathers these columns.
        z: [T, d], as stored.
        statistics: [T, 2], merged.
        dtype: in which the norm was rounded, before it was cast to the type of the branch input.
        read: as of ``remade_by_kernel``.
    """
    bare, out_dtype = _bare(norm), u.local.dtype

    def remake(sources: Sequence[Tensor]) -> Rows:
        z, statistics, *vectors = sources
        again = _with(bare, vectors)
        assert again is not None
        made = kernels.apply(z, statistics, again.weight, again.bias, again.kind, dtype)
        made = made if made.dtype == out_dtype else made.to(out_dtype)
        return made if read is None else read(made)

    return u._replace(sources=(z.detach(), statistics, *_vectors(norm)), remake=remake)


_MADE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _vectors(norm: NormWeights | None) -> list[Tensor]:
    return [] if norm is None else [v.detach() for v in (norm.weight, norm.bias) if v is not None]


def _bare(norm: NormWeights | None) -> NormWeights | None:
    """The same without its tensors' graph: what it has of them are places."""
    if norm is None:
        return None
    nothing = norm.weight.new_empty(0)
    return norm._replace(weight=nothing, bias=None if norm.bias is None else nothing)


def _with(norm: NormWeights | None, vectors: list[Tensor]) -> NormWeights | None:
    """A norm with the next vectors of a list, which it takes from it."""
    if norm is None:
        return None
    weight = vectors.pop(0)
    return norm._replace(weight=weight, bias=None if norm.bias is None else vectors.pop(0))


def read_twice(
    u: BranchInput, keep: Callable[[Tensor], Callable[[], Tensor]]
) -> tuple[BranchInput, Callable[[], BranchInput]]:
    """For a branch that is run again in backward: what it reads now, and what makes what it reads then.

    In both runs the linear saves whole rows, which the recomputation drops, and no run gathers them twice.

    Args:
        u: the branch input.
        keep: tensor -> what returns it in backward, without a graph. The sources are kept so, or whole rows if
            ``u.keeps``. What is made of them has a gradient where u has one.

    Communication:
        That of ``BranchInput.whole``, and of what is returned that of ``BranchInput.restart``, or none if ``u.keeps``.
    """
    if u.is_local:
        local = keep(u.local)
        return u, lambda: BranchInput(local())
    form = None if u.part is None else u.part.form
    now = u._replace(rows=u.whole(), keeps=True)
    start = None if u.keeps else u.restart()
    collective, axis, wants, dtype = u.collective, u.axis, u.local.requires_grad, u.local.dtype
    fetches = [keep(source) for source in (tensors_of(now.whole()) if u.keeps else u.sources)]

    def again() -> BranchInput:
        with torch.no_grad():
            sources = tuple(fetch() for fetch in fetches)
            whole = rows_of(sources, form) if start is None else start(sources)()
        if isinstance(whole, Tensor):
            return BranchInput(whole.detach().requires_grad_(wants), collective, axis, (), True, whole, _never)
        local, part = stand_in(whole.codes, dtype), whole
        return BranchInput(local.requires_grad_(wants), collective, axis, (), True, whole, _never, part)

    return now, again


def stand_in(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """What autograd sees in the place of codes: their shape, in the type of their gradient, without memory."""
    return codes.new_empty((1, 1), dtype=dtype).expand(codes.shape)


def _never(sources: tuple[Tensor, ...]) -> Tensor:
    raise AssertionError("the rows have been made")
