"""Tensor layouts: the residual stream whole on every rank of tp, or sharded over tokens or the hidden dimension.

A branch always reads whole rows of all tokens, and the gradient that it sends back is this rank's partial sum; what it
returns is a partial sum, too. A layout turns the stream into a branch's input and a branch's output into the stream, so
that no branch names a collective. The first linear of a branch gathers its input (``BranchInput``), and in backward
starts the collective that its input's gradient goes through before it computes its weight's gradient; only under
``columns``, gather, the norm gathers, and sends that gradient itself when the linear is done.

T tokens   D model dim   p ranks   d = D/p columns of a rank
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel
from megaresnorm.kernels.fp8.formats import Rows
from megaresnorm.parallel import branch_input
from megaresnorm.parallel.branch_input import COPY, GATHER_ROWS, BranchInput, Collective
from megaresnorm.parallel.fp8_wire import in_fp8, sent
from megaresnorm.parallel.linear_kernel import PLAIN, LinearKernel
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.remade import Remakes, remade_by_kernel
from megaresnorm.parallel.sharded_norm import ShardedNorm, columns_add_norm


class TensorLayout(ABC):
    """One of the three layouts; on an axis of one rank they are all the same.

    Attributes:
        name: as in the recipe.
        axis: the tensor-parallel axis.
        keeps: whether linears keep gathered rows for backward, or gather them again (recompute.gathered).
    """

    name: str

    def __init__(self, axis: Axis, *, keeps: bool = False) -> None:
        self.axis, self.keeps = axis, keeps

    @abstractmethod
    def add_norm(
        self,
        kernel: AddNormKernel,
        args: AddNormArgs,
        remakes: Remakes = Remakes.NOTHING,
        reader: LinearKernel = PLAIN,
    ) -> tuple[Tensor, BranchInput | None]:
        """``kernel`` on a stream in this layout. All tensors and weights are this rank's part of them.

        Args:
            remakes: what the branch input may be made of again in backward, rather than kept. With whole rows kept
                (``keeps``) it has no effect.
            reader: the products that read the branch input.

        Returns:
            The trunk, in this layout, and what a branch reads; None where out_dtype is None.
        """

    @abstractmethod
    def reduce(self, y_TD: Tensor) -> Tensor:
        """The sum of all ranks' partial sums y [T, D], in the stream's layout."""

    @abstractmethod
    def token_weights(self, t_T1: Tensor) -> Tensor:
        """The weights of the stream's tokens.

        Args:
            t_T1: one number for each of all tokens, which every rank has computed from whole rows.
        """

    def tokens(self, x_T: Tensor) -> Tensor:
        """The entries of this rank's tokens in x, which has one for every token."""
        return x_T

    def width(self, dim: int) -> int:
        """Number of the stream's columns on this rank."""
        return dim

    def first_column(self, width: int) -> int:
        """Global index of this rank's first column, where it has ``width`` columns."""
        return 0


class FullLayout(TensorLayout):
    """Every rank has the whole stream, and computes all of its norms."""

    name = "full"

    def add_norm(
        self,
        kernel: AddNormKernel,
        args: AddNormArgs,
        remakes: Remakes = Remakes.NOTHING,
        reader: LinearKernel = PLAIN,
    ) -> tuple[Tensor, BranchInput | None]:
        """``kernel`` itself; only the gradient of its branch input is sent.

        Communication:
            Nothing in forward; in backward one all-reduce of [T, D].
        """
        return _read_through(COPY, self, kernel, args, remakes, reader)

    def reduce(self, y_TD: Tensor) -> Tensor:
        """The sum [T, D].

        Communication:
            One all-reduce of [T, D]; nothing in backward.
        """
        return branch_input.reduce(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        """All of them. The gradient is the same on every rank, and each sends back its p-th part."""
        return branch_input.split_gradient(t_T1, self.axis)


class TokensLayout(TensorLayout):
    """Every rank has its share of the tokens: sequence parallelism.

    Source:
        Korthikanti et al., arXiv:2205.05198, section 4.2.2.
    """

    name = "tokens"

    def add_norm(
        self,
        kernel: AddNormKernel,
        args: AddNormArgs,
        remakes: Remakes = Remakes.NOTHING,
        reader: LinearKernel = PLAIN,
    ) -> tuple[Tensor, BranchInput | None]:
        """``kernel`` on this rank's rows; the branch input is gathered by its reader.

        Communication:
            One all-gather of [T/p, D]; in backward one reduce-scatter of [T, D], and unless rows are kept one more
            all-gather.
        """
        return _read_through(GATHER_ROWS, self, kernel, args, remakes, reader)

    def reduce(self, y_TD: Tensor) -> Tensor:
        """This rank's rows [T/p, D] of the sum.

        Communication:
            One reduce-scatter of [T, D]; in backward one all-gather of [T/p, D].
        """
        return branch_input.scatter_rows(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        """Those of this rank's tokens."""
        return self.tokens(t_T1)

    def tokens(self, x_T: Tensor) -> Tensor:
        """The ``rank``-th of p equal chunks."""
        return x_T.chunk(self.axis.size)[self.axis.rank]


class ColumnsLayout(TensorLayout):
    """Sharded over the hidden dimension: every rank has d columns of all tokens.

    A norm needs statistics of whole rows, and a branch reads whole rows. So for each branch a rank sends something of
    its columns to the others, in one of two forms (parallel/sharded_norm.py):

    * ``merge``: it sends the statistics of its columns, normalizes its columns with the merged ones, and then sends the
      normalized columns.
    * ``gather``: it sends its columns as they are stored, and with them its slices of the norm's weight and bias; then
      every rank normalizes whole rows. There is no message for the norm alone.

    Args:
        axis: the tensor-parallel axis.
        gather: whether the form is ``gather``, which needs a stream stored in the type of the branch input.
        norm: the norm over the axis.

    Communication:
        What a rank gives to the others for one branch of a pre-norm block. Statistics and row sums are n = 2 numbers a
        row for LayerNorm and n = 1 for RMSNorm, in FP32 (FP64 in an FP64 model). All else is in the type of the branch
        input. Weight and bias fill k rows: one each, or two each where the stream is BF16.

                              merge                        gather
        forward   all-gather  [T, n] statistics
                  all-gather  [T, d] normalized columns    [T + k, d] stored columns, weight, bias
              reduce-scatter  [T, D] branch output         [T, D] branch output
        backward  all-gather  [T, d] output's gradient     [T, d] output's gradient
                  all-gather  what was gathered, once more, unless it is kept
              reduce-scatter  [T, D] input's gradient      [T, D + p n] input's gradient, row sums
                  all-reduce  [T, n] row sums

        Under ``gather`` the row sums of a BF16 stream travel apart, to stay FP32: a reduce-scatter of [T, D] and an
        all-reduce of [T, n]. With T = 4096, D = 8192, p = 8, LayerNorm and BF16 the columns [T, d] are 8 MiB, the
        statistics 32 KiB and the k = 4 rows 8 KiB.
    """

    name = "columns"

    def __init__(self, axis: Axis, *, gather: bool, norm: ShardedNorm, keeps: bool = False) -> None:
        super().__init__(axis, keeps=keeps)
        self.gather, self.norm = gather, norm

    def add_norm(
        self,
        kernel: AddNormKernel,
        args: AddNormArgs,
        remakes: Remakes = Remakes.NOTHING,
        reader: LinearKernel = PLAIN,
    ) -> tuple[Tensor, BranchInput | None]:
        """``columns_add_norm`` in the chosen form.

        Communication:
            That of the class without the branch output and its gradient.
        """
        if self.axis.size == 1:
            return _read_through(None, self, kernel, args, remakes, reader)
        keeps = self.keeps or remakes is Remakes.ROWS
        return columns_add_norm(
            kernel, args, self.norm, gather=self.gather, keeps=keeps, remakes=remakes, reader=reader
        )

    def reduce(self, y_TD: Tensor) -> Tensor:
        """This rank's columns [T, d] of the sum.

        Communication:
            One reduce-scatter of [T, D]; in backward one all-gather of [T, d].
        """
        return branch_input.scatter_columns(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        """All of them. Each rank's gradient is a partial sum over its columns already."""
        return t_T1

    def width(self, dim: int) -> int:
        """The p-th part of ``dim``."""
        return dim // self.axis.size

    def first_column(self, width: int) -> int:
        """That of the ``rank``-th shard."""
        return width * self.axis.rank


def tensor_layout(
    name: str, axis: Axis, *, gather: bool = True, norm: ShardedNorm | None = None, keeps: bool = False
) -> TensorLayout:
    """The layout of a name.

    Args:
        name: full, tokens or columns.
        gather: as of ``ColumnsLayout``; the other layouts do not need it.
        norm: likewise.
        keeps: as of ``TensorLayout``.
    """
    if name == "columns":
        return ColumnsLayout(axis, gather=gather, norm=norm or ShardedNorm(axis), keeps=keeps)
    return {"full": FullLayout, "tokens": TokensLayout}[name](axis, keeps=keeps)


def _read_through(
    collective: Collective | None,
    layout: TensorLayout,
    kernel: AddNormKernel,
    args: AddNormArgs,
    remakes: Remakes,
    reader: LinearKernel,
) -> tuple[Tensor, BranchInput | None]:
    """The results of a kernel, of which a branch reads its input through a collective; on one rank as it is."""
    at_once = None if args.out_dtype is None else reader.output()
    out = kernel(args if at_once is None else replace(args, fp8=at_once))
    if out.branch_input is None:
        return out.trunk, None
    read: Callable[[Tensor], Rows] | None = reader.rows if out.fp8 is not None else None
    u = BranchInput(out.branch_input)
    if collective is not None and layout.axis.size > 1:
        keeps = layout.keeps or remakes is Remakes.ROWS
        u = BranchInput(out.branch_input, collective, layout.axis, (out.branch_input.detach(),), keeps)
        if out.fp8 is None and collective is GATHER_ROWS:
            u, read = sent(u, reader, 0)
    if out.fp8 is not None:
        if out.amax is not None:
            reader.saw(out.amax)
        through = None if u.collective is None else in_fp8(u.collective, out.fp8.form)
        u = u._replace(collective=through, sources=out.fp8.tensors, part=out.fp8)
    return out.trunk, u if u.keeps else remade_by_kernel(u, out, kernel, args, remakes, read)
