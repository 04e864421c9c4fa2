"""Linear layers whose weights are sharded over a tensor-parallel axis; on one rank they are the plain ones.

T tokens   D model dim   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.data_parallel import is_sharded
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.mesh import Axis


class LinearKernel(Protocol):
    """The three products of a linear layer. Each layer has a kernel of its own, chosen when the model is built."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b [T, out_dim], in x's type."""

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """dy W [T, in_dim], in dy's type."""

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """dy^T x [out_dim, in_dim], in ``dtype``."""


class PlainLinear:
    """Products in the type of the input; a weight of another type is cast for each of them."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        return F.linear(x, self.operand(weight, x.dtype), None if bias is None else bias.to(x.dtype))

    def input_grad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return dy @ self.operand(weight, dy.dtype)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.t() @ x).to(dtype)

    def operand(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in the type of a product."""
        return weight.to(dtype)


class WeightGradQueue:
    """Weight gradients that backward passes have left for later.

    A layer with a queue computes its input's gradient in backward and puts the product for its weight here, with what
    it needs: the output's gradient, and the sources of its input (whole rows with ``BranchInput.keeps``), which it
    gathers when the product runs. So all ranks of tp run their queues in the same order.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        """Leave a gradient for later.

        Args:
            compute: makes the gradient, in the weight's type.
        """
        self._waiting.append((weight, compute))

    def clear(self) -> None:
        """Forget what waits, which an error has left."""
        self._waiting.clear()

    @torch.no_grad()
    def run(self) -> None:
        """Compute what waits, in the order in which it came, and add it to the weights' ``grad``. Collective.

        Communication:
            One all-gather for each weight whose layer gathers its input again.
        """
        waiting, self._waiting = self._waiting, []
        for weight, compute in waiting:
            gradient = compute()
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


def linear(
    x: BranchInput | Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: LinearKernel | None = None,
    queue: WeightGradQueue | None = None,
) -> Tensor:
    """x W^T + b. Gradients of weight and bias arrive in their own types.

    Args:
        x: [T, in_dim], or the input of a branch, whose rows are gathered here.
        kernel: None for ``PlainLinear``.
        queue: takes the weight's gradient; None: it is computed in backward.

    Communication:
        Where x is a ``BranchInput`` with a collective: in forward that of ``BranchInput.whole``; in backward one
        reduce-scatter or all-reduce of [T, in_dim], and unless x keeps its rows one more all-gather of its sources.
    """
    kernel = kernel or PlainLinear()
    local, source = (x, None) if isinstance(x, Tensor) else (x.local, x)
    alone = source is None or source.collective is None
    if alone and queue is None and local.dtype == weight.dtype and isinstance(kernel, PlainLinear):
        return F.linear(local, weight, bias)
    return _Linear.apply(local, weight, bias, None if alone else source, kernel, queue)


class _Linear(torch.autograd.Function):
    """A product of whole rows, of which backward keeps the sources or the rows themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: BranchInput | None,
        kernel: LinearKernel,
        queue: WeightGradQueue | None,
    ) -> Tensor:
        x = local if source is None else source.whole()
        again = source is not None and not source.keeps
        ctx.save_for_backward(weight, *(source.sources if source is not None and again else (x,)))
        ctx.kernel, ctx.queue, ctx.bias_dtype = kernel, queue, None if bias is None else bias.dtype
        collective, axis = (None, None) if source is None else (source.collective, source.axis)
        ctx.start_gather = collective.start if again and collective is not None else _kept
        ctx.start_transpose = None if collective is None else collective.start_transpose
        ctx.axis = axis
        return kernel.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        (dy,), (weight, *sources) = grads, ctx.saved_tensors
        d_bias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
        kernel, axis, start_gather = ctx.kernel, ctx.axis, ctx.start_gather
        if ctx.queue is not None:
            dtype = weight.dtype
            ctx.queue.put(weight, lambda: kernel.weight_grad(dy, start_gather(tuple(sources), axis)(), dtype))
            dx = kernel.input_grad(dy, weight)
            return _sent(dx, ctx.start_transpose, axis)(), None, d_bias, None, None, None
        rows = start_gather(tuple(sources), axis)  # under the product for the input's gradient
        dx = kernel.input_grad(dy, weight)
        x = rows()
        arriving = _sent(dx, ctx.start_transpose, axis)  # under the product for the weight's gradient
        d_weight = kernel.weight_grad(dy, x, weight.dtype)
        return arriving(), d_weight, d_bias, None, None, None


def _kept(sources: tuple[Tensor, ...], axis: Axis | None) -> Callable[[], Tensor]:
    return lambda: sources[0]


def _sent(dx: Tensor, start: Callable | None, axis: Axis | None) -> Callable[[], Tensor]:
    return (lambda: dx) if start is None else start(dx, axis)


class ColumnLinear(nn.Module):
    """y = x W^T + b with weight [out_dim / p, in_dim]: every rank computes its share of the outputs.

    The parameters are left uninitialised (see model/init.py).

    Attributes:
        kernel: its products.
        queue: takes the weight's gradients; None: backward computes them (``queue_weight_grads``).
    """

    def __init__(
        self, in_dim: int, out_dim: int, axis: Axis, *, bias: bool = False, kernel: LinearKernel | None = None
    ) -> None:
        super().__init__()
        assert out_dim % axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim // axis.size, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim // axis.size)) if bias else None
        self.kernel = kernel or PlainLinear()
        self.queue: WeightGradQueue | None = None

    def forward(self, x: BranchInput) -> Tensor:
        """This rank's outputs [T, out_dim / p].

        Communication:
            As ``linear``.
        """
        return linear(x, self.weight, self.bias, self.kernel, self.queue)

    def without_bias(self, x: BranchInput) -> Tensor:
        """x W^T, for a kernel that adds the bias itself.

        Communication:
            As ``forward``.
        """
        return linear(x, self.weight, None, self.kernel, self.queue)


class RowLinear(nn.Module):
    """y = x W^T + b with weight [out_dim, in_dim / p]: every rank computes a partial sum, which ``layout`` adds up.

    Attributes:
        bias: in the stream's layout, [out_dim] or this rank's columns of it.
        kernel, queue: as in ``ColumnLinear``.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        layout: TensorLayout,
        *,
        bias: bool = False,
        kernel: LinearKernel | None = None,
    ) -> None:
        super().__init__()
        assert in_dim % layout.axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim // layout.axis.size))
        self.bias = nn.Parameter(torch.empty(layout.width(out_dim))) if bias else None
        self.kernel, self.layout = kernel or PlainLinear(), layout
        self.queue: WeightGradQueue | None = None

    def forward(self, x: Tensor) -> Tensor:
        """y in the stream's layout.

        Args:
            x: [T, in_dim / p], this rank's columns.

        Communication:
            One ``layout.reduce`` of [T, out_dim].
        """
        if self.layout.axis.size == 1:
            return linear(x, self.weight, self.bias, self.kernel, self.queue)
        y = self.layout.reduce(linear(x, self.weight, None, self.kernel, self.queue))
        return y if self.bias is None else (y.to(self.bias.dtype) + self.bias).to(y.dtype)


Linear = ColumnLinear | RowLinear


def queue_weight_grads(model: nn.Module, queue: WeightGradQueue | None) -> None:
    """Let every linear of a model leave its weight's gradient in ``queue``; None: compute it in backward again.

    Not for a model inside DistributedDataParallel, whose hooks see no gradient that is added later.

    Raises:
        ValueError: FSDP2 has sharded the weights; the same holds for its hooks.
    """
    if queue is not None and any(is_sharded(module) for module in model.modules()):
        raise ValueError("weight gradients that FSDP2 reduces cannot be left for later")
    for module in model.modules():
        if isinstance(module, Linear):
            module.queue = queue
