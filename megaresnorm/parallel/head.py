"""The output matrix together with the loss: all of its outputs at once, or for large vocabularies some rows at a time.

T rows (tokens)   D model dim   V vocabulary, or this rank's share of it
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.cross_entropy import CrossEntropyKernel, one_for, scaled
from megaresnorm.parallel.branch_input import BranchInput, whole_rows
from megaresnorm.parallel.linear import ColumnLinear
from megaresnorm.parallel.linear_kernel import LinearKernel
from megaresnorm.parallel.wide import no_gradient


@dataclass(frozen=True)
class HeadLoss:
    """The loss of a model, bound to the outputs of its output matrix.

    Attributes:
        compute: outputs [T, V], labels, z_loss, scale -> (nll, objective).
        rows: outputs that exist at a time; None: all.
    """

    compute: CrossEntropyKernel
    rows: int | None = None


class OutputMatrix(ColumnLinear):
    """The linear layer from the stream to the vocabulary, whose share of rows a rank of the axis has.

    In parts, the gradient of its weight is computed with the loss, also where it has a ``queue``.

    Attributes:
        loss: what ``forward`` does with labels; whoever trains sets it.
    """

    loss: HeadLoss | None = None

    def forward(
        self,
        x: BranchInput,
        labels_T: Tensor | None = None,
        z_loss: float = 0.0,
        scale: float | Tensor = 1.0,
    ) -> Any:
        """The outputs [T, V]; with labels the sum of the losses and the objective (``CrossEntropyKernel``).

        Communication:
            As ``linear``, and with labels that of the loss, for each part of the rows.
        """
        if labels_T is None:
            return super().forward(x)
        assert self.loss is not None, "set where the model is assembled"
        if self.loss.rows is None or self.loss.rows >= len(labels_T):
            return self.loss.compute(super().forward(x), labels_T, z_loss, scale)
        rows = whole_rows(x)
        operand = self.weight if self.operand is None else self.operand
        operand = operand.detach().to(rows.dtype)  # once for all parts
        # A Function cannot tell: it runs without gradients in any case, and a parameter needs one in any case.
        learns = torch.is_grad_enabled() and (rows.requires_grad or self.weight.requires_grad)
        return _ChunkedLoss.apply(rows, self.weight, operand, labels_T, z_loss, scale, self.loss, self.kernel, learns)


class _ChunkedLoss(torch.autograd.Function):
    """Outputs of some rows, their loss and their gradient, then the next rows. It can be differentiated once.

    Gradients are computed in forward, where the outputs are. The weight's is summed in FP32.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight: Tensor, operand: Tensor, labels_T: Tensor, z_loss: float,
        scale: float | Tensor, loss: HeadLoss, kernel: LinearKernel, learns: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert loss.rows is not None
        dx_TD = torch.empty_like(x_TD) if learns else None
        d_weight = no_gradient(weight) if learns else None
        sums: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(x_TD), loss.rows):
            rows = slice(start, start + loss.rows)
            outputs = kernel.forward(x_TD[rows], operand, None)
            if dx_TD is None or d_weight is None:
                sums.append(loss.compute(outputs, labels_T[rows], z_loss, scale))
                continue
            with torch.enable_grad():
                nll, objective = loss.compute(outputs.requires_grad_(), labels_T[rows], z_loss, scale)
            (gradient,) = torch.autograd.grad(objective, outputs, one_for(objective))
            sums.append((nll.detach(), objective.detach()))  # some have a graph, which holds the outputs
            dx_TD[rows] = kernel.input_grad(gradient, operand)
            kernel.add_weight_grad(d_weight, gradient, x_TD[rows])
            del outputs, gradient, objective  # before the next ones are made
        ctx.gradients = (dx_TD, d_weight) if learns else None
        nll, objective = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
        ctx.mark_non_differentiable(nll)
        return nll, objective

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the objective can be differentiated once"
        return *(scaled(gradient, grads[1]) for gradient in gradients), *[None] * 7
