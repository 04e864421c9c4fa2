"""Cross entropy whose gradient takes the place of the logits. Nothing of their size is allocated beside them.

A backend is a function of logits (``CrossEntropyKernel``), or better the pieces of one (``LossPieces``), which read the
outputs of the output matrix as they are: the padding of the vocabulary, their scale and cap (``LogitForm``) need no
tensor of their own then, and a sharded vocabulary only has to merge statistics between the two pieces.

T rows (tokens)   V vocabulary   p ranks that have a share of it
"""

import functools
from collections.abc import Callable
from math import nan
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.registry import Kernel, register_kernel

GPU_ELEMENTS = 1 << 24  # in FP32 at a time where PyTorch computes on a GPU: each of up to four copies has 64 MiB
CACHED_ELEMENTS = 1 << 19  # FP32 logits processed at a time on a CPU: 2 MiB, the size of a second-level cache


class LogitForm(NamedTuple):
    """How outputs of the output matrix become logits: softcap tanh(scale x / softcap), or scale x.

    Attributes:
        columns: how many of the columns are tokens; those behind them are padding.
        softcap: None for no cap.

    Source:
        Gemma 2, arXiv:2408.00118, section 2 (the cap).
    """

    columns: int
    scale: float = 1.0
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether logits are the outputs themselves."""
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, outputs_TV: Tensor) -> Tensor:
        """The logits of the tokens; in FP32 (or FP64) with a cap, else in the outputs' type."""
        logits_TV = outputs_TV if outputs_TV.shape[1] == self.columns else outputs_TV[:, : self.columns]
        if self.scale != 1.0:
            logits_TV = logits_TV * self.scale
        if self.softcap is None:
            return logits_TV
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        return self.softcap * torch.tanh(logits_TV.to(wide) / self.softcap)

    def with_slope(self, outputs_TV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
        """The logits of the tokens in ``dtype``, as a tensor that may be overwritten, and their derivative."""
        logits_TV = outputs_TV[:, : self.columns].to(dtype, copy=True).mul_(self.scale)
        if self.softcap is None:
            return logits_TV, self.scale
        ratio_TV = logits_TV.div_(self.softcap).tanh_()
        return ratio_TV * self.softcap, ratio_TV.square_().neg_().add_(1.0).mul_(self.scale)


class CrossEntropyKernel(Protocol):
    """A loss, called as ``cross_entropy_sums``; it may consume the logits.

    Its scale may be a tensor of one number, on the device, where the loss is made of pieces or by ``loss_of``.
    """

    def __call__(
        self, logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float | Tensor = 1.0, /
    ) -> tuple[Tensor, Tensor]:
        """The sum of the losses, without a gradient, and the objective to be differentiated."""


class LossPieces(Protocol):
    """A backend as two passes over the outputs of the output matrix, or of this rank's share of it."""

    def __call__(
        self, outputs_TV: Tensor, labels_T: Tensor, form: LogitForm, writes: bool, /
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The first pass.

        Args:
            labels_T: columns of the outputs; those outside of the tokens' columns are not here.
            writes: whether the second pass will come; the outputs are then scratch.

        Returns:
            statistics [T, 3] in FP32 (or FP64) of the logits: the largest l of a row, the sum of exp(l - largest), and
            the logit at the label, 0 where that is not here. And the second pass, which is called once with [T, 3] of
            (log Z, factor of p, share of the label) and writes the gradient over the outputs: (exp(l - log Z) factor,
            less the share at the label) times the logits' slope, and 0 in rows whose factor is 0 and in the padding.
        """


class GradientInPlace(torch.autograd.Function):
    """Backward of a loss whose forward left ``ctx.gradient`` in the place of the logits. It can run once."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        """The gradient of the logits, scaled in place by that of the objective, the second output."""
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the objective can be differentiated once"
        return scaled(gradient, grads[1]), None, None, None


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def one_for(objective: Tensor) -> Tensor:
    """The gradient of an objective by itself, 1: a tensor that ``scaled`` knows without asking the device."""
    return _one(objective.dtype, objective.device)


def differentiate(objective: Tensor) -> None:
    """``objective.backward()`` with ``one_for``."""
    torch.autograd.backward(objective, one_for(objective))


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply ``gradient`` by ``factor`` in place.

    A factor of 1 is skipped: on a CPU always, on a GPU, where reading it would make the host wait, ``one_for`` alone.
    """
    if factor is one_for(factor) or (factor.device.type == "cpu" and factor.item() == 1.0):
        return gradient
    return gradient.mul_(factor)


def row_chunks(logits_TV: Tensor) -> list[slice]:
    """Rows to process together: on a CPU as many as a cache holds, on a GPU as many as keep it busy."""
    rows, vocab = logits_TV.shape
    chunk = max(1, (CACHED_ELEMENTS if logits_TV.device.type == "cpu" else GPU_ELEMENTS) // vocab)
    return [slice(start, start + chunk) for start in range(0, rows, chunk)]


def torch_pieces(
    outputs_TV: Tensor, labels_T: Tensor, form: LogitForm, writes: bool
) -> tuple[Tensor, Callable[[Tensor], None]]:
    """``LossPieces`` in PyTorch, a few rows at a time."""
    wide = torch.promote_types(outputs_TV.dtype, torch.float32)
    absent_T = (labels_T < 0) | (labels_T >= form.columns)
    label_T1 = labels_T.masked_fill(absent_T, 0).unsqueeze(-1)
    # Exponentials that need no wider type and no slope stay in the place of the logits for the second pass.
    kept = writes and outputs_TV.dtype == wide and form.plain
    statistics_T3 = outputs_TV.new_empty((outputs_TV.shape[0], 3), dtype=wide)
    for rows in row_chunks(outputs_TV):
        logits = outputs_TV[rows, : form.columns] if kept else form.with_slope(outputs_TV[rows], wide)[0]
        largest, sums, at_label = statistics_T3[rows].split(1, dim=-1)
        at_label.copy_(logits.gather(-1, label_T1[rows]))
        largest.copy_(logits.amax(-1, keepdim=True))
        sums.copy_(logits.sub_(largest).exp_().sum(-1, keepdim=True))
    statistics_T3[:, 2].masked_fill_(absent_T, 0.0)

    def write(coefficients_T3: Tensor) -> None:
        log_z_T1, factor_T1, share_T1 = coefficients_T3.split(1, dim=-1)
        share_T1 = -share_T1.masked_fill(absent_T.unsqueeze(-1), 0.0)
        for rows in row_chunks(outputs_TV):
            place, slope = outputs_TV[rows], None
            if kept:
                p = place[:, : form.columns].mul_(factor_T1[rows] * (statistics_T3[rows, :1] - log_z_T1[rows]).exp())
            else:
                p, slope = form.with_slope(place, wide)
                p = p.sub_(log_z_T1[rows]).exp_().mul_(factor_T1[rows])
            p.scatter_add_(-1, label_T1[rows], share_T1[rows])
            p.masked_fill_(factor_T1[rows] == 0.0, 0.0)  # whatever the row's logits are
            if slope is not None:
                place[:, : form.columns] = p.mul_(slope)
            place[:, form.columns :] = 0.0

    return statistics_T3, write


class LossOfPieces(NamedTuple):
    """The loss that ``pieces`` make; a ``CrossEntropyKernel`` of outputs, which it consumes if they need a gradient.

    Only the objective can be differentiated, and once. ``scale`` is applied as the gradient is written; a factor that
    arrives with the backward pass costs another pass over it.

    Attributes:
        first: the token of this rank's first column.
        vocabulary: number of tokens on all ranks; None: those of ``form``.
        gather: [T, 3] of a rank -> [p, T, 3] of all that have a share of the vocabulary.
    """

    pieces: LossPieces
    form: LogitForm
    first: int = 0
    vocabulary: int | None = None
    gather: Callable[[Tensor], Tensor] = lambda statistics_T3: statistics_T3.unsqueeze(0)

    @property
    def size(self) -> int:
        """Number of tokens on all ranks."""
        return self.form.columns if self.vocabulary is None else self.vocabulary

    def __call__(
        self, outputs_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """See ``CrossEntropyKernel``. On a GPU, which would have to be asked, a label that is no token makes it NaN.

        Raises:
            IndexError: on a CPU a label is no token of the vocabulary.
        """
        if labels_T.is_cpu:
            check_labels(labels_T, self.size)
        return _LossOfPieces.apply(outputs_TV, labels_T, z_loss, scale, self)


class _LossOfPieces(GradientInPlace):
    @staticmethod
    def forward(
        ctx: Any, outputs_TV: Tensor, labels_T: Tensor, z_loss: float, scale: float | Tensor, loss: LossOfPieces
    ) -> tuple[Tensor, Tensor]:
        # A label that is nowhere stays negative, whatever the first token here is.
        local_T = labels_T if loss.first == 0 else torch.where(labels_T < 0, labels_T, labels_T - loss.first)
        statistics, write = loss.pieces(outputs_TV, local_T, loss.form, ctx.needs_input_grad[0])
        largest_pT, sums_pT, label_pT = loss.gather(statistics).unbind(-1)
        top_T, valid_T = largest_pT.amax(0), labels_T >= 0
        log_z_T = (sums_pT * (largest_pT - top_T).exp()).sum(0).log_() + top_T
        label_logit_T = label_pT.sum(0).masked_fill(labels_T >= loss.size, nan)
        nll = torch.where(valid_T, log_z_T - label_logit_T, 0.0).sum()
        penalty = torch.where(valid_T, log_z_T.square(), 0.0).sum()
        if ctx.needs_input_grad[0]:
            share_T = scale * valid_T.to(log_z_T.dtype)
            write(torch.stack((log_z_T, share_T * (1.0 + 2.0 * z_loss * log_z_T), share_T), dim=-1))
            torch.autograd.graph.increment_version(outputs_TV)
            ctx.gradient = outputs_TV
        ctx.mark_non_differentiable(nll)
        return nll, scale * (nll + z_loss * penalty)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        return *GradientInPlace.backward(ctx, *grads), None


def check_labels(labels_T: Tensor, size: int) -> None:
    """Check that labels are tokens of a vocabulary, or negative. It reads them.

    Raises:
        IndexError: one is not.
    """
    if len(labels_T) and int(labels_T.max()) >= size:
        raise IndexError(f"cross_entropy: label {int(labels_T.max())} of a vocabulary of {size}")


def register_loss(backend: str, pieces: LossPieces, **requirements: Any) -> CrossEntropyKernel:
    """Register a backend that is made of pieces; ``requirements`` are those of ``register_kernel``."""

    def cross_entropy(
        logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        return LossOfPieces(pieces, LogitForm(logits_TV.shape[1]))(logits_TV, labels_T, z_loss, scale)

    register_kernel("cross_entropy", backend, implementation=pieces, **requirements)(cross_entropy)
    return cross_entropy


chunked_cross_entropy = register_loss("chunked", torch_pieces)


def loss_of(kernel: Kernel, form: LogitForm) -> CrossEntropyKernel:
    """The loss of outputs of the output matrix by a backend of cross_entropy."""
    if kernel.implementation is not None:
        return LossOfPieces(kernel.implementation, form)

    def loss(
        outputs_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        constant = 1.0 if isinstance(scale, Tensor) else scale
        nll, objective = kernel.function(form(outputs_TV), labels_T, z_loss, constant)
        return nll, objective * scale if isinstance(scale, Tensor) else objective

    return loss


@register_kernel("cross_entropy", "reference")
def cross_entropy_sums(
    logits_TV: Tensor, labels_T: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross entropy and objective, summed over the valid tokens.

    A token's cross entropy is -log p(label); its objective is ``scale`` (-log p(label) + z_loss log(Z)^2).

    Args:
        logits_TV: [T, V], computed on in FP32 or FP64.
        labels_T: [T] int64, negative where there is nothing to predict.
    Returns:
        (cross entropy, objective), two scalars; the objective is the one to differentiate.
    Source:
        PaLM, arXiv:2204.02311 (z_loss).
    """
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if z_loss == 0.0:
        nll = F.cross_entropy(logits_TV, labels_T.clamp(min=-1), ignore_index=-1, reduction="sum")
        return nll, scale * nll
    valid_T = labels_T >= 0
    log_z_T = torch.logsumexp(logits_TV, dim=-1)
    label_logit_T = logits_TV.gather(-1, labels_T.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    nll = torch.where(valid_T, log_z_T - label_logit_T, 0.0).sum()
    return nll, scale * (nll + z_loss * torch.where(valid_T, log_z_T.square(), 0.0).sum())
