"""Whether two models compute the same: their logits on the same tokens."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from megaresnorm.errors import CheckpointError, ConversionError

TOLERANCE = 2e-5  # of the largest logit; what is converted wrongly is further off by orders of magnitude
LOGITS = 1 << 22  # that are compared at a time, in FP64
MARGIN = 1e-4  # by which the first token must lead the second to count in the agreement
Logits = Callable[[Tensor], Tensor]  # tokens [B, S] -> [B, S, V], FP32 or FP64


@dataclass(frozen=True)
class Agreement:
    """How the logits of two models differ over ``tokens`` positions.

    largest, mean: of the absolute differences.   scale: the largest absolute logit of the first.   top1: share of positions with
    the same likeliest token; clear_top1: of those where it leads by MARGIN.   kl: mean of KL(first || second) in nats.
    """

    tokens: int
    largest: float
    mean: float
    scale: float
    top1: float
    clear_top1: float
    kl: float
    tolerance: float = TOLERANCE

    @property
    def relative(self) -> float:
        return self.largest / self.scale if self.scale else inf if self.largest else 0.0

    @property
    def passed(self) -> bool:
        return self.relative <= self.tolerance and self.clear_top1 == 1.0  # infinite logits make it NaN, which is not

    def judge(self, made: str) -> None:
        """Raises: ConversionError for a model that was made and does not agree."""
        if self.passed:
            return
        raise ConversionError(
            f"FAIL: {made} does not compute the same: logits differ by up to {self.largest:.3g} of {self.scale:.3g} (allowed "
            f"{self.tolerance:.2g} of that), {self.clear_top1:.2%} have the same likeliest token; nothing was kept"
        )

    def rows(self) -> dict[str, str]:
        """What is printed."""
        return {
            "positions compared": f"{self.tokens:,}",
            "largest difference": f"{self.largest:.3g} of logits up to {self.scale:.3g} ({self.relative:.2g} of that, "
            f"allowed {self.tolerance:.2g})",
            "mean difference": f"{self.mean:.3g}",
            "same likeliest token": f"{self.top1:.4%}, {self.clear_top1:.4%} where it leads by {MARGIN:g}",
            "KL divergence": f"{self.kl:.3g} nats a token",
        }


def logits_on(prompts: Sequence[Tensor], logits: Logits) -> Iterator[Tensor]:
    """Of batches of tokens [B, S], one after the other: [B, S, V] each."""
    for prompt_BS in prompts:
        with torch.no_grad():  # not around yield, which may be the last that is heard of it
            found = logits(prompt_BS)
        yield found


def kept_logits_on(prompts: Sequence[Tensor], load: Callable[[], Logits]) -> list[Tensor]:
    """The same of a model that is gone afterwards, so that there is memory for another."""
    kept = list(logits_on(prompts, load()))
    gc.collect()  # models of Transformers refer to themselves
    return kept


@torch.no_grad()
def compare(one: Iterable[Tensor], other: Iterable[Tensor], tolerance: float = TOLERANCE) -> Agreement:
    """Compare two models' logits [B, S, V] on the same batches. Raises: CheckpointError where the vocabularies differ."""
    sums = torch.zeros(
        5, dtype=torch.float64
    )  # of mean differences, equal first tokens, leads, equal ones that lead, KL
    tokens, largest, scale = 0, 0.0, 0.0
    for both in zip(one, other, strict=True):
        whole = [logits_BSV.flatten(0, 1) for logits_BSV in both]
        if whole[0].shape != whole[1].shape:
            sizes = " and ".join(str(logits.shape[1]) for logits in whole)
            raise CheckpointError(f"the models have logits of {sizes} tokens; they are not the same model")
        rows = max(1, LOGITS // whole[0].shape[1])
        for a, b in zip(*(logits.split(rows) for logits in whole), strict=True):
            a, b = a.double(), b.double()
            difference = (a - b).abs().nan_to_num(nan=inf, posinf=inf)
            largest, scale = max(largest, difference.max().item()), max(scale, a.abs().max().item())
            sums += _sums(a, b, difference)
            tokens += len(a)
    assert tokens
    mean, same, leads, same_that_leads, kl = sums.tolist()
    share = same_that_leads / leads if leads else 1.0
    return Agreement(tokens, largest, mean / tokens, scale, same / tokens, share, kl / tokens, tolerance)


def _sums(a_TV: Tensor, b_TV: Tensor, difference_TV: Tensor) -> Tensor:
    """Over the rows, what ``compare`` adds up."""
    top = a_TV.topk(min(2, a_TV.shape[1]), dim=1).values
    leads = top[:, 0] - top[:, -1] > MARGIN
    same = a_TV.argmax(1) == b_TV.argmax(1)
    logs_a, logs_b = a_TV.log_softmax(1), b_TV.log_softmax(1)
    kl = (logs_a.exp() * (logs_a - logs_b)).sum()
    counts = (difference_TV.mean(1).sum(), same.sum(), leads.sum(), (same & leads).sum(), kl)
    return torch.stack([count.double() for count in counts])
