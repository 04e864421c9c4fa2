"""Floating-point operations of the parts of a model, in a forward pass and for one token."""

from megaresnorm.model.branches import BRANCHES
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.recipe import ModelRecipe


def block_flops(recipe: ModelRecipe) -> int:
    """The branches of one block; every block costs the same."""
    return sum(BRANCHES[kind].flops(recipe) for kind in SUBLAYERS)


def training_flops(recipe: ModelRecipe) -> int:
    """Forward and backward pass of the whole model for one token of a whole sequence.

    The backward pass takes twice the products of the forward pass. Attention is causal: half of its scores are counted.
    """
    return 3 * (recipe.num_blocks * block_flops(recipe) + head_flops(recipe))


def head_flops(recipe: ModelRecipe) -> int:
    """The output matrix, and about five operations per logit for the loss."""
    return (2 * recipe.dim + 5) * recipe.padded_vocab_size


def embedding_flops(recipe: ModelRecipe) -> int:
    """Lookup and add: there are no products, but a row is read and its gradient written."""
    return 4 * recipe.dim
