"""Where the residual stream lives on the ranks of a tensor-parallel axis: whole, divided by token, or divided by column.

A branch always reads whole rows of all tokens, and the gradient that it sends back is this rank's partial sum; what it returns is a
partial sum, too. A layout is how the stream turns into the one and the other into the stream: a branch names no collective. Its
first linear starts the one that its input's gradient goes through (``Gathered``) before it computes its weight's gradient.

T tokens   D model dim   p ranks
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormKernel
from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels
from megaresnorm.parallel import branch_input
from megaresnorm.parallel.branch_input import COPY, GATHER_ROWS, Collective, Gathered
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.sharded_norm import StreamAddNorm, StreamOutput, columns_add_norm


class TensorLayout(ABC):
    """One of the three; on an axis of one rank they are all the same."""

    name: str

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    @abstractmethod
    def add_norm(self, kernel: AddNormKernel) -> StreamAddNorm:
        """``kernel`` for a stream in this layout, whose branch input is what a branch reads."""

    @abstractmethod
    def reduce(self, y_TD: Tensor) -> Tensor:
        """The stream's share of the sum of all ranks' partial sums y [T, D]."""

    @abstractmethod
    def token_weights(self, t_T1: Tensor) -> Tensor:
        """Of one number a token, computed by every rank from whole rows: those of the stream's tokens."""

    def tokens(self, x_T: Tensor) -> Tensor:
        """Of something that every token has, what belongs to this rank's tokens."""
        return x_T

    def width(self, dim: int) -> int:
        """Columns of the stream on this rank."""
        return dim

    def first_column(self, width: int) -> int:
        """The global number of this rank's first column, of ``width``."""
        return 0


class FullLayout(TensorLayout):
    """Every rank has the whole stream, and computes its norms anew."""

    name = "full"

    def add_norm(self, kernel: AddNormKernel) -> StreamAddNorm:
        return _gathering(kernel, COPY, self.axis)

    def reduce(self, y_TD: Tensor) -> Tensor:
        return branch_input.reduce(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        return branch_input.share(t_T1, self.axis)


class TokensLayout(TensorLayout):
    """Every rank has its share of the tokens (sequence parallel, arXiv:2205.05198, section 4.2.2)."""

    name = "tokens"

    def add_norm(self, kernel: AddNormKernel) -> StreamAddNorm:
        return _gathering(kernel, GATHER_ROWS, self.axis)

    def reduce(self, y_TD: Tensor) -> Tensor:
        return branch_input.scatter_rows(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        return self.tokens(t_T1)

    def tokens(self, x_T: Tensor) -> Tensor:
        return x_T.chunk(self.axis.size)[self.axis.rank]


class ColumnsLayout(TensorLayout):
    """Every rank has its share of the columns of all tokens; norms merge their statistics or gather their input."""

    name = "columns"

    def __init__(self, axis: Axis, *, gather: bool, norm_kernels: ShardedNormKernels) -> None:
        super().__init__(axis)
        self.gather, self.norm_kernels = gather, norm_kernels

    def add_norm(self, kernel: AddNormKernel) -> StreamAddNorm:
        if self.axis.size == 1:
            return kernel
        return columns_add_norm(kernel, self.axis, gather=self.gather, norm_kernels=self.norm_kernels)

    def reduce(self, y_TD: Tensor) -> Tensor:
        return branch_input.scatter_columns(y_TD, self.axis)

    def token_weights(self, t_T1: Tensor) -> Tensor:
        return t_T1

    def width(self, dim: int) -> int:
        return dim // self.axis.size

    def first_column(self, width: int) -> int:
        return width * self.axis.rank


def tensor_layout(
    name: str, axis: Axis, *, gather: bool = True, norm_kernels: ShardedNormKernels = REFERENCE
) -> TensorLayout:
    """full, tokens or columns. gather: of columns, where the stored type allows it.
    norm_kernels: of norms over a sharded hidden dimension.
    """
    if name == "columns":
        return ColumnsLayout(axis, gather=gather, norm_kernels=norm_kernels)
    return {"full": FullLayout, "tokens": TokensLayout}[name](axis)


def _gathering(kernel: AddNormKernel, collective: Collective, axis: Axis) -> StreamAddNorm:
    """``kernel`` whose branch input goes through a collective."""
    if axis.size == 1:
        return kernel

    def run(*arguments: Any, **options: Any) -> StreamOutput:
        trunk, u, *_ = kernel(*arguments, **options)
        return StreamOutput(trunk, None if u is None else Gathered.of(u, collective, axis))

    return run
