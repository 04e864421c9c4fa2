"""Floating-point operations of the parts of a model, in a forward pass and for one token."""

from megaresnorm.recipe import ModelRecipe


def block_flops(recipe: ModelRecipe) -> int:
    """Matrix products and causal attention of one block; every block costs the same."""
    q_dim, kv_dim = recipe.num_heads * recipe.head_width, recipe.kv_heads * recipe.head_width
    inner = (2 if recipe.gated_ffn else 1) * recipe.ffn_width
    matrices = recipe.dim * (q_dim + 2 * kv_dim + inner) + (q_dim + recipe.ffn_width) * recipe.dim
    return 2 * matrices + 2 * recipe.seq_len * q_dim  # scores and weighted sum, half of them masked


def head_flops(recipe: ModelRecipe) -> int:
    """The output matrix, and about five operations per logit for the loss."""
    return (2 * recipe.dim + 5) * recipe.padded_vocab_size


def embedding_flops(recipe: ModelRecipe) -> int:
    """Lookup and add: there are no products, but a row is read and its gradient written."""
    return 4 * recipe.dim
