"""How far a residual stream stored in BF16 or FP32 drifts from one in FP64, by depth and topology, at initialisation.

T tokens (batch * seq)   D model dim
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from megaresnorm.assemble import build_model
from megaresnorm.model.block import Block
from megaresnorm.model.residual import Residual
from megaresnorm.model.transformer import Transformer
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe

BATCH = 2
BF16_DIGITS = 8  # of the significand, the leading one among them


@dataclass(frozen=True)
class Drift:
    """The stream after some blocks of a model, computed in FP32 and stored in one type, beside FP64 throughout.

    Attributes:
        block: how many blocks have run.
        stored: fp32 or bf16.
        rms: of the FP64 stream.
        error: ||x - x_64|| / ||x_64||.
        of_movement: ||x - x_64|| over how far the FP64 stream has come since the first block, both at an RMS of 1.
        cosine: of x and x_64, as of one vector.
        swallowed: share of elements that the last sub-layer's branch cannot move where the stream is BF16.
    """

    block: int
    stored: str
    rms: float
    error: float
    of_movement: float
    cosine: float
    swallowed: float


@torch.no_grad()
def measure_drift(
    recipe: ModelRecipe, depths: Sequence[int], stored: Sequence[str] = ("fp32", "bf16"), seed: int = 0
) -> list[Drift]:
    """Run random tokens through the same model with each stream.

    Args:
        depths: numbers of blocks, at least 2, after which to look.
    """
    assert recipe.vocab_size is not None
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(recipe.vocab_size, (BATCH, recipe.seq_len), generator=generator)
    exact = {block: (x, lost) for block, x, lost in _streams(recipe, PrecisionRecipe(compute="fp64"), tokens, seed)}
    start = _unit(exact[1][0])  # KEEL's first block has an alpha of its own
    found = []
    for dtype in stored:
        precision = PrecisionRecipe.model_validate({"compute": "fp32", "residual_dtype": dtype})
        for block, stream, _ in _streams(recipe, precision, tokens, seed):
            if block not in depths:
                continue
            (reference, lost), x = exact[block], stream.double()
            rms = reference.square().mean().sqrt().item()
            away = (x - reference).square().mean().sqrt().item()
            moved = (_unit(reference) - start).square().mean().sqrt().item()
            cosine = torch.cosine_similarity(x.flatten(), reference.flatten(), dim=0).item()
            found.append(Drift(block, dtype, rms, away / rms, away / rms / moved, cosine, lost))
    return found


def swallowed_share(x_TD: Tensor, branch_TD: Tensor) -> float:
    """Share of elements of ``branch`` below half a unit in the last place that x has as a BF16 number.

    Args:
        x_TD: the trunk as it enters the sum, alpha * x.
        branch_TD: what is added to it.
    """
    exponent = torch.frexp(x_TD.abs()).exponent  # x = m * 2^exponent with m in [1/2, 1)
    half_ulp = torch.ldexp(torch.ones_like(x_TD), exponent - BF16_DIGITS - 1)
    return (branch_TD.abs() < half_ulp).double().mean().item()


def _streams(
    recipe: ModelRecipe, precision: PrecisionRecipe, tokens: Tensor, seed: int
) -> Iterator[tuple[int, Tensor, float]]:
    """(blocks done, stream, share that the last branch cannot move) after each block."""
    model = build_model(recipe, precision, seed=seed).model
    rows = model.rows(tokens)
    stream, lost = model.embed(tokens, rows), 0.0
    for block, sublayers in enumerate((cast(Block, one).sublayers for one in model.blocks.values()), start=1):
        for residual in sublayers:
            x, u = residual.open(stream)
            y = residual.run(x, u, rows, None)
            lost = swallowed_share(residual.spec.alpha * x, _added(model, residual, y))
            stream = residual.close(x, y, None)
        yield block, model.add_norm.trunk(stream), lost


def _added(model: Transformer, residual: Residual, y: Tensor) -> Tensor:
    """The term gate * norm_branch(y) of the equation."""
    if residual.token_gate is not None:
        return y
    if residual.norm_branch is not None:
        y = model.add_norm.normalize(y, residual.norm_branch)
    gate = residual.spec.constant_gate if residual.gate is None else residual.gate
    assert gate is not None
    return y * gate


def _unit(x: Tensor) -> Tensor:
    return x / x.square().mean().sqrt()
