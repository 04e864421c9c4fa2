"""The products of a linear layer: an interface, and the plain ones.

T tokens
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput
from megaresnorm.kernels.fp8.formats import Rows
from megaresnorm.parallel.mesh import Axis


class LinearKernel(Protocol):
    """The three products of a linear layer, and how they read its input and its output's gradient.

    One object serves all layers of a model, so that equal blocks share code; but each layer in FP8 has its own, which
    has its weight. An operand is the weight as products read it: the weight itself, or what a layer keeps beside it.
    """

    def write(self, add_norm: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
        """What ``add_norm`` makes of whole rows, with the input in FP8 where the kernel may write it so at once.

        Args:
            args: with an ``out_dtype``.
        """

    def rows(self, x: Rows) -> Any:
        """An input as products read it: whole rows [T, in_dim], or this rank's columns where inputs are sharded.

        Args:
            x: values, or what this has made of them.

        Communication:
            One all-gather of a number where inputs are sharded and share one scale.
        """

    def part(self, x: Tensor, axis: Axis, dim: int) -> Rows:
        """This rank's part of an input, which ``rows`` would read when it is gathered, as it is sent.

        Args:
            axis: over which the input is sharded.
            dim: 0 where rows are, 1 where columns are.

        Communication:
            One all-gather of the largest numbers that scales are for, where ranks share scales.
        """

    def gradient(self, dy: Tensor) -> Any:
        """An output's gradient [T, out_dim] as the next two read it.

        Communication:
            One all-gather of a number where outputs are sharded and share one scale.
        """

    def forward(self, x: Any, operand: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b [T, out_dim], in x's type, or BF16."""

    def input_grad(self, dy: Any, operand: Tensor) -> Tensor:
        """dy W [T, in_dim], in dy's type."""

    def weight_grad(self, dy: Any, x: Any, dtype: torch.dtype) -> Tensor:
        """dy^T x [out_dim, in_dim], in ``dtype``."""

    def add_weight_grad(self, total: Tensor, dy: Any, x: Any) -> None:
        """Add dy^T x to ``total``, in its type and in place."""


class PlainLinear:
    """Products in the type of the input; a weight of another type is cast for each of them."""

    def write(self, add_norm: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
        """See ``LinearKernel``."""
        return add_norm(args)

    def rows(self, x: Rows) -> Rows:
        """See ``LinearKernel``."""
        return x

    def part(self, x: Tensor, axis: Axis, dim: int) -> Tensor:
        """See ``LinearKernel``."""
        return x

    def gradient(self, dy: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return dy

    def forward(self, x: Tensor, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        return F.linear(x, operand.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def input_grad(self, dy: Tensor, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return dy @ operand.to(dy.dtype)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.t() @ x).to(dtype)

    def add_weight_grad(self, total: Tensor, dy: Tensor, x: Tensor) -> None:
        """See ``LinearKernel``."""
        if total.dtype == dy.dtype == x.dtype:
            total.addmm_(dy.t(), x)
        else:
            total += self.weight_grad(dy, x, total.dtype)


PLAIN = PlainLinear()


class LinearOver:
    """The products of another kernel, for those who see or change some of what passes.

    Args:
        kernel: makes the products.
    """

    def __init__(self, kernel: LinearKernel = PLAIN) -> None:
        self._kernel = kernel

    def write(self, add_norm: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
        """See ``LinearKernel``."""
        return self._kernel.write(add_norm, args)

    def rows(self, x: Rows) -> Any:
        """See ``LinearKernel``."""
        return self._kernel.rows(x)

    def part(self, x: Tensor, axis: Axis, dim: int) -> Rows:
        """See ``LinearKernel``."""
        return self._kernel.part(x, axis, dim)

    def gradient(self, dy: Tensor) -> Any:
        """See ``LinearKernel``."""
        return self._kernel.gradient(dy)

    def forward(self, x: Any, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        return self._kernel.forward(x, operand, bias)

    def input_grad(self, dy: Any, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return self._kernel.input_grad(dy, operand)

    def weight_grad(self, dy: Any, x: Any, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return self._kernel.weight_grad(dy, x, dtype)

    def add_weight_grad(self, total: Tensor, dy: Any, x: Any) -> None:
        """See ``LinearKernel``."""
        self._kernel.add_weight_grad(total, dy, x)
