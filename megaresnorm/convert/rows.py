"""Rows of our parameters that a tensor of another framework has, and their order.

Our fused qkv holds the heads of q, then of k, then of v. A head's two halves are rotated against each other; where only
R columns of a head are rotated, they are the first R / 2 of either half.

N query heads   K key/value heads   H head width   R rotated columns of a head
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megaresnorm.model.specs import ParameterSpec
from megaresnorm.recipe import ModelRecipe

# For every row of the other framework's tensor the row of ours, or -1 where it has none of ours and is zero.
Selection = range | Tensor
Rows = Callable[[ModelRecipe, ParameterSpec], Selection]
Within = Callable[[ModelRecipe], Tensor]


def every(recipe: ModelRecipe, spec: ParameterSpec) -> Selection:
    """All rows but the padding of the vocabulary."""
    vocabulary = spec.parts[0].role in ("embedding", "head")
    return range(recipe.vocab_size or 0) if vocabulary else range(spec.shape[0])


def after(count: int) -> Rows:
    """All rows, after ``count`` rows of zeros."""
    return lambda recipe, spec: torch.cat((torch.full((count,), -1), torch.arange(spec.shape[0])))


def part(role: str) -> Rows:
    """The rows of one logical part of a fused matrix."""
    return lambda recipe, spec: _range_of(spec, role)


def halves(recipe: ModelRecipe) -> Tensor:
    """Columns of a head, rotated ones first: their first halves, their second halves, then what is not rotated."""
    if recipe.positions != "rope":
        return torch.arange(recipe.head_width)
    first, second, rest = _columns(recipe)
    return torch.cat((first, second, rest))


def pairs(recipe: ModelRecipe) -> Tensor:
    """As ``halves``, with the two columns of every rotated pair beside each other (GLM, GPT-J)."""
    first, second, rest = _columns(recipe)
    return torch.cat((torch.stack((first, second), dim=1).flatten(), rest))


def heads(role: str, within: Within = halves) -> Rows:
    """The heads of q, k or v, each with its columns in the order ``within``; v has no positions and keeps its own."""

    def rows(recipe: ModelRecipe, spec: ParameterSpec) -> Selection:
        return _flat(_heads(recipe, spec, role, within))

    return rows


def one_head(within: Within) -> Rows:
    """The weights of a norm of queries or keys, over one head or over all of them together."""

    def rows(recipe: ModelRecipe, spec: ParameterSpec) -> Selection:
        start = torch.arange(0, spec.shape[0], recipe.head_width).unsqueeze(1)
        return _flat(start + within(recipe))

    return rows


def groups(recipe: ModelRecipe, spec: ParameterSpec) -> Selection:
    """Megatron's qkv: for every group of query heads, these heads, its key and its value. With N = K: GPT-NeoX's."""
    q_NH, k_KH, v_KH = (_heads(recipe, spec, role, halves) for role in ("q", "k", "v"))
    q_KG = q_NH.reshape(recipe.kv_heads, -1)
    return _flat(torch.cat((q_KG, k_KH, v_KH), dim=1))


def _heads(recipe: ModelRecipe, spec: ParameterSpec, role: str, within: Within) -> Tensor:
    rows = _range_of(spec, role)
    columns = within(recipe) if role in ("q", "k") else torch.arange(recipe.head_width)
    return torch.arange(rows.start, rows.stop, recipe.head_width).unsqueeze(1) + columns


def _columns(recipe: ModelRecipe) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of our heads: the first and the second of every rotated pair, and those that are not rotated."""
    half, rotated = recipe.head_width // 2, recipe.rotary_width // 2
    column = torch.arange(recipe.head_width)
    first = column[:rotated]
    rest = column[(column % half) >= rotated]
    return first, first + half, rest


def _range_of(spec: ParameterSpec, role: str) -> range:
    start = 0
    for one in spec.parts:
        if one.role == role:
            return range(start, start + one.rows)
        start += one.rows
    raise AssertionError(f"{spec.name} has no part {role}")


def _flat(rows: Tensor) -> Selection:
    """Rows as a range, which is read in one piece, where they are consecutive."""
    flat = rows.flatten()
    consecutive = torch.equal(flat, torch.arange(int(flat[0]), int(flat[0]) + len(flat)))
    return range(int(flat[0]), int(flat[0]) + len(flat)) if consecutive else flat
