"""How far apart the gradients of tokens lie in one tensor, by depth and topology, at initialisation, in FP64.

T tokens (batch * seq)   D model dim
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaresnorm.assemble import build_model
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.model.lint import estimates
from megaresnorm.model.lint_precision import NORMAL_RANGE, gradient_spread
from megaresnorm.parallel.linear import Linear
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe
from megaresnorm.studies.products import Watched

BATCH = 4


@dataclass(frozen=True)
class GradientRows:
    """The gradient of the output of one attention, a row for each token.

    Attributes:
        block: its number, from 0.
        rms: of the gradient of the mean loss.
        spread: RMS of the largest row over that of the median row.
        expected: ``gradient_spread`` of the linter.
        below: by format, share of elements below its smallest normal number where the largest element is its largest.
        below_by_token: the same for e4m3 with a scale for each token.
    """

    block: int
    rms: float
    spread: float
    expected: float
    below: dict[str, float]
    below_by_token: float


def watched_linears(recipe: ModelRecipe, seed: int = 0) -> dict[str, Watched]:
    """The products of the linear layers of the blocks after forward and backward of random tokens, by name."""
    assert recipe.vocab_size is not None
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(recipe.vocab_size, (2, BATCH, recipe.seq_len), generator=generator)
    model = build_model(recipe, PrecisionRecipe(compute="fp64"), seed=seed).model
    found: dict[str, Watched] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks."):
            module.kernel = found[name] = Watched()
    (cross_entropy_sums(model(tokens), labels.flatten())[1] / labels.numel()).backward()
    return found


def measure_gradient_rows(recipe: ModelRecipe, blocks: Sequence[int]) -> list[GradientRows]:
    """Measure the gradients at some blocks."""
    found, known = watched_linears(recipe), estimates(recipe)
    measured = []
    for block in blocks:
        dy = found[f"blocks.{block}.attention.branch.out"].dy
        rows, size = dy.square().mean(dim=1).sqrt(), dy.abs()
        measured.append(
            GradientRows(
                block=block,
                rms=dy.square().mean().sqrt().item(),
                spread=(rows.max() / rows.median()).item(),
                expected=gradient_spread(known, block),
                below={form: _share_below(size, size.max() / reach) for form, reach in NORMAL_RANGE.items()},
                below_by_token=_share_below(size, size.amax(dim=1, keepdim=True) / NORMAL_RANGE["e4m3"]),
            )
        )
    return measured


def _share_below(size: Tensor, limit: Tensor) -> float:
    return (size < limit).double().mean().item()
