"""Products of linear layers whose operands are looked at, or changed, on the way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megaresnorm.parallel.linear_kernel import PLAIN
from megaresnorm.parallel.mesh import Axis

Function = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    """The same tensor."""
    return x


class Through:
    """Plain products on one rank, whose operands pass through functions that gradients know nothing of.

    Args:
        rows: what inputs pass through.
        gradient: what gradients of outputs pass through.
    """

    def __init__(self, rows: Function = as_it_is, gradient: Function = as_it_is) -> None:
        self._rows, self._gradient = rows, gradient

    def output(self) -> None:
        """See ``LinearKernel``."""

    def saw(self, amax: Tensor) -> None:
        """See ``LinearKernel``."""

    def rows(self, x: Any) -> Tensor:
        """See ``LinearKernel``."""
        return self._rows(x)

    def part(self, x: Tensor, axis: Axis, dim: int) -> Tensor:
        """See ``LinearKernel``."""
        return x

    def gradient(self, dy: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return self._gradient(dy)

    def forward(self, x: Tensor, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        return PLAIN.forward(x, operand, bias)

    def input_grad(self, dy: Tensor, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return PLAIN.input_grad(dy, operand)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return PLAIN.weight_grad(dy, x, dtype)

    def add_weight_grad(self, total: Tensor, dy: Tensor, x: Tensor) -> None:
        """See ``LinearKernel``."""
        PLAIN.add_weight_grad(total, dy, x)


class Watched(Through):
    """Products that keep their operands.

    Attributes:
        x: the input.
        dy: the gradient of the output.
    """

    x: Tensor
    dy: Tensor

    def __init__(self) -> None:
        super().__init__(self._keep_input, self._keep_gradient)

    def _keep_input(self, x: Tensor) -> Tensor:
        self.x = x
        return x

    def _keep_gradient(self, dy: Tensor) -> Tensor:
        self.dy = dy.clone()
        return dy
