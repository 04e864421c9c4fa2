"""Products of linear layers whose operands are looked at, or changed, on the way."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megaresnorm.parallel.linear_kernel import LinearOver

Function = Callable[[Tensor], Tensor]


def as_it_is(x: Tensor) -> Tensor:
    """The same tensor."""
    return x


class Through(LinearOver):
    """Plain products on one rank, whose operands pass through functions that gradients know nothing of.

    Args:
        rows: what inputs pass through.
        gradient: what gradients of outputs pass through.
    """

    def __init__(self, rows: Function = as_it_is, gradient: Function = as_it_is) -> None:
        super().__init__()
        self._rows, self._gradient = rows, gradient

    def rows(self, x: Any) -> Tensor:
        """See ``LinearKernel``."""
        return self._rows(x)

    def gradient(self, dy: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return self._gradient(dy)


class Keeping(Through):
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
