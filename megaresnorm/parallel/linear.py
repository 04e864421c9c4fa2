"""Linear layers whose weights are sharded over a tensor-parallel axis; on one rank they are the plain ones.

T tokens   D model dim   p ranks of the axis
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.kernels.fp8.formats import Form, Fp8, Rows, rows_of, tensors_of
from megaresnorm.parallel.branch_input import BranchInput, PendingRows
from megaresnorm.parallel.data_parallel import is_sharded
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear_kernel import PLAIN, LinearKernel, PlainLinear
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.wide import gradient_dtype
from megaresnorm.recompute import saves_last


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
            compute: makes the gradient, in the type of the weight's ``grad``.
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
    kernel: LinearKernel = PLAIN,
    queue: WeightGradQueue | None = None,
    operand: Tensor | None = None,
) -> Tensor:
    """x W^T + b. Gradients of weight and bias arrive in their own types, that of a weight in BF16 in FP32.

    Args:
        x: [T, in_dim], or the input of a branch, whose rows are gathered here.
        queue: takes the weight's gradient; None: it is computed in backward.
        operand: the weight as ``kernel`` reads it; None: the weight itself.

    Communication:
        Where x is a ``BranchInput`` with a collective: in forward that of ``BranchInput.whole``; in backward one
        reduce-scatter or all-reduce of [T, in_dim], and unless x keeps its rows one more all-gather of its sources.
    """
    local, source = (x, None) if isinstance(x, Tensor) else (x.local, x)
    alone = source is None or source.is_local
    one_type = local.dtype == weight.dtype == gradient_dtype(weight.dtype)
    if alone and queue is None and one_type and isinstance(kernel, PlainLinear):
        return F.linear(local, weight, bias)
    return _Linear.apply(local, weight, operand, bias, None if alone else source, kernel, queue)


class _Linear(torch.autograd.Function):
    """A product of whole rows, of which backward keeps the sources or the rows themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        local: Tensor,
        weight: Tensor,
        operand: Tensor | None,
        bias: Tensor | None,
        source: BranchInput | None,
        kernel: LinearKernel,
        queue: WeightGradQueue | None,
    ) -> Tensor:
        again = source is not None and not source.keeps
        x = kernel.rows(local if source is None else source.whole())
        read = weight if operand is None else operand
        kept = None if queue is None else weight  # whose ``grad`` the queue adds to
        saved = read, kept, *(source.sources if source is not None and again else tensors_of(x))
        if any(ctx.needs_input_grad):  # else nothing is saved
            saves_last(*saved)
        ctx.save_for_backward(*saved)
        ctx.kernel, ctx.queue, ctx.dtype, ctx.bias_dtype = (
            kernel, queue, gradient_dtype(weight.dtype), None if bias is None else bias.dtype,
        )  # fmt: skip
        collective, axis = (None, None) if source is None else (source.collective, source.axis)
        form = x.form if isinstance(x, Fp8) else None
        ctx.start_gather = _read_again(source.restart(), kernel) if source is not None and again else _kept(form)
        ctx.start_transpose = None if collective is None else collective.start_transpose
        ctx.axis = axis
        return kernel.forward(x, read, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor | None, None, None, None]:
        (dy,), (operand, weight, *sources) = grads, ctx.saved_tensors
        d_bias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
        kernel, axis, start_gather, dtype = ctx.kernel, ctx.axis, ctx.start_gather, ctx.dtype
        read = kernel.gradient(dy)
        if ctx.queue is not None:
            ctx.queue.put(weight, lambda: kernel.weight_grad(read, start_gather(tuple(sources))(), dtype))
            dx = kernel.input_grad(read, operand)
            return _sent(dx, ctx.start_transpose, axis)(), None, None, d_bias, None, None, None
        rows = start_gather(tuple(sources))  # under the product for the input's gradient
        dx = kernel.input_grad(read, operand)
        x = rows()
        arriving = _sent(dx, ctx.start_transpose, axis)  # under the product for the weight's gradient
        d_weight = kernel.weight_grad(read, x, dtype)
        return arriving(), d_weight, None, d_bias, None, None, None


def _kept(form: Form | None) -> Callable[[tuple[Tensor, ...]], Callable[[], Rows]]:
    return lambda sources: lambda: rows_of(sources, form)


def _read_again(restart: Callable[[tuple[Tensor, ...]], PendingRows], kernel: LinearKernel) -> Callable:
    def start(sources: tuple[Tensor, ...]) -> Callable[[], Rows]:
        arriving = restart(sources)
        return lambda: kernel.rows(arriving())

    return start


def _sent(dx: Tensor, start: Callable | None, axis: Axis | None) -> Callable[[], Tensor]:
    return (lambda: dx) if start is None else start(dx, axis)


class ColumnLinear(nn.Module):
    """y = x W^T + b with weight [out_dim / p, in_dim]: every rank computes its share of the outputs.

    The parameters are left uninitialised (see model/init.py).

    Attributes:
        kernel: its products.
        queue: takes the weight's gradients; None: backward computes them (``queue_weight_grads``).
        operand: the weight as ``kernel`` reads it, which whoever changes the weight renews; None: the weight itself.
    """

    operand: Tensor | None

    def __init__(
        self, in_dim: int, out_dim: int, axis: Axis, *, bias: bool = False, kernel: LinearKernel = PLAIN
    ) -> None:
        super().__init__()
        assert out_dim % axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim // axis.size, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim // axis.size)) if bias else None
        self.kernel, self.axis = kernel, axis
        self.queue: WeightGradQueue | None = None
        self.register_buffer("operand", None, persistent=False)

    def forward(self, x: BranchInput) -> Tensor:
        """This rank's outputs [T, out_dim / p].

        Communication:
            As ``linear``.
        """
        return linear(x, self.weight, self.bias, self.kernel, self.queue, self.operand)

    def without_bias(self, x: BranchInput) -> Tensor:
        """x W^T, for a kernel that adds the bias itself.

        Communication:
            As ``forward``.
        """
        return linear(x, self.weight, None, self.kernel, self.queue, self.operand)


class RowLinear(nn.Module):
    """y = x W^T + b with weight [out_dim, in_dim / p]: every rank computes a partial sum, which ``layout`` adds up.

    Attributes:
        bias: in the stream's layout, [out_dim] or this rank's columns of it.
        kernel, queue, operand: as in ``ColumnLinear``.
    """

    operand: Tensor | None

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        layout: TensorLayout,
        *,
        bias: bool = False,
        kernel: LinearKernel = PLAIN,
    ) -> None:
        super().__init__()
        assert in_dim % layout.axis.size == 0, "checked with the recipe"
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim // layout.axis.size))
        self.bias = nn.Parameter(torch.empty(layout.width(out_dim))) if bias else None
        self.kernel, self.layout = kernel, layout
        self.queue: WeightGradQueue | None = None
        self.register_buffer("operand", None, persistent=False)

    def forward(self, x: BranchInput | Tensor) -> Tensor:
        """y in the stream's layout.

        Args:
            x: [T, in_dim / p], this rank's columns; as a ``BranchInput`` without a collective it can be remade.

        Communication:
            One ``layout.reduce`` of [T, out_dim].
        """
        if self.layout.axis.size == 1:
            return linear(x, self.weight, self.bias, self.kernel, self.queue, self.operand)
        y = self.layout.reduce(linear(x, self.weight, None, self.kernel, self.queue, self.operand))
        return y if self.bias is None else (y.to(self.bias.dtype) + self.bias).to(y.dtype)


Linear = ColumnLinear | RowLinear


def queue_weight_grads(model: nn.Module, queue: WeightGradQueue | None) -> None:
    """Let every linear of a model leave its weight's gradient in ``queue``; None: compute it in backward again.

    Not for a model inside DistributedDataParallel, whose hooks see no gradient that is added later.

    Raises:
        ValueError: FSDP2 has sharded the weights, the same holds for its hooks; or blocks are compiled, whose code
            would not see a queue.
    """
    if queue is not None and any(getattr(module, "compiled", None) is not None for module in model.modules()):
        raise ValueError("weight gradients of compiled blocks cannot be left for later")
    if queue is not None and any(is_sharded(module) for module in model.modules()):
        raise ValueError("weight gradients that FSDP2 reduces cannot be left for later")
    for module in model.modules():
        if isinstance(module, Linear):
            module.queue = queue
