"""Text generation, greedy or sampled, with a cache of the keys and values of earlier tokens."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaresnorm.assemble import build_model, choose_device
from megaresnorm.checkpoint.format import TensorSlices, checkpoints_of
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import fitting_table, recipe_of, state_of
from megaresnorm.data.tokenizer import Tokenizer, start_tokens
from megaresnorm.data.tokenizer_files import read_tokenizer, restore_tokenizer
from megaresnorm.errors import CheckpointError, DataError
from megaresnorm.limits import FP32_TINY
from megaresnorm.model.sequence import KeyValueCache
from megaresnorm.model.transformer import Transformer
from megaresnorm.precision.copies import copy_weights
from megaresnorm.recipe import TrainRecipe


def sample_text(model: Transformer, tokenizer: Tokenizer | None, train: TrainRecipe) -> str | None:
    """A continuation of ``train.sample_prompt``; None without a tokenizer, or switched off."""
    if tokenizer is None or not train.sample_tokens:
        return None
    return generate(model, tokenizer, train.sample_prompt, train.sample_tokens, seed=train.seed)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: bool = True,
) -> str:
    """Continue ``prompt``, or start a new document where it is empty. Ends early at the end of a document.

    Args:
        num_tokens: most tokens to generate. What follows is as in ``generate_tokens``.

    Returns:
        Prompt and continuation.
    """
    start = start_tokens(tokenizer, prompt)
    tokens = generate_tokens(
        model, start, num_tokens, vocab_size=tokenizer.vocab_size, end=tokenizer.eod,
        temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, cache=cache,
    )  # fmt: skip
    return tokenizer.decode([*start[1:], *tokens])


@torch.no_grad()
def generate_tokens(
    model: Transformer,
    start: list[int],
    num_tokens: int,
    *,
    vocab_size: int,
    end: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    cache: bool = True,
) -> Iterator[int]:
    """Generate tokens one after the other.

    Once there are more than model.seq_len tokens, only the last model.seq_len // 2 are kept.

    Args:
        start: tokens to continue.
        num_tokens: most tokens to generate.
        vocab_size: number of tokens that may be chosen; a model may have more.
        end: token at which to stop, which is not yielded; None for no such token.
        temperature: divides the logits; 0 is greedy.
        top_k: choose among the k likeliest tokens; None for all.
        top_p: choose among the likeliest that together have this probability (nucleus sampling); None for all.
        seed: of the random choice.
        cache: False computes every token from all before it, for comparison.

    Source:
        Nucleus sampling, arXiv:1904.09751.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    window = start[-model.recipe.seq_len :]
    memory: KeyValueCache | None = None
    for _ in range(num_tokens):
        if len(window) > model.recipe.seq_len:
            window, memory = window[-max(1, model.recipe.seq_len // 2) :], None
        read = window if memory is None else window[-1:]
        if cache and memory is None:
            memory = KeyValueCache()
        logits_V = model(torch.tensor([read], device=device), cache=memory)[-1]
        chosen = choose(logits_V[:vocab_size].float().cpu(), temperature, top_k, top_p, generator)
        if chosen == end:
            return
        yield chosen
        window = [*window, chosen]


def choose(
    logits_V: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    """Choose one token by its logits, [V] FP32. Ties at the border of top_k or top_p go to the lower token id."""
    if temperature < FP32_TINY:  # too small to divide by
        return int(logits_V.argmax())
    logits_V = logits_V - logits_V.max()  # so that no temperature makes infinities of them
    if top_k is None and top_p is None:
        return int(torch.multinomial(torch.softmax(logits_V / temperature, dim=-1), 1, generator=generator))
    values, order = torch.sort(logits_V, descending=True, stable=True)
    p = torch.softmax(values[:top_k] / temperature, dim=-1)
    if top_p is not None:
        p = p[: 1 + int((p.cumsum(0) < top_p).sum())]  # up to the token with which top_p is reached
    return int(order[torch.multinomial(p, 1, generator=generator)])


def load_model(
    folder: Path, tokenizer_file: Path | None = None, end_token: str | None = None
) -> tuple[Transformer, Tokenizer]:
    """Load the model and tokenizer of a checkpoint.

    Args:
        folder: a checkpoint, or the output folder of a run for its newest one.
        tokenizer_file: for a checkpoint that has no tokenizer, as of ``read_tokenizer``; otherwise None.
        end_token: token of a tokenizer.json that ends documents; None for the usual one.

    Raises:
        CheckpointError, DataError: one line each.
    """
    newest = [path for _, path in checkpoints_of(folder)]
    checkpoint = Checkpoint(newest[-1] if newest else folder)
    state = state_of(checkpoint.folder, checkpoint.state)
    recipe, description = recipe_of(checkpoint.folder, state), state.tokenizer
    fitting_table(checkpoint, recipe.model)
    if description is None:
        if tokenizer_file is None:
            raise CheckpointError(
                f"{checkpoint.folder}: has no tokenizer (trained on bare token files); give --tokenizer FILE or bytes"
            )
        tokenizer = read_tokenizer(tokenizer_file, end_token)
    else:
        if tokenizer_file is not None:
            raise CheckpointError(f"{checkpoint.folder}: has its own tokenizer; remove --tokenizer")
        file = description.get("file")
        model_file = b"" if file is None else checkpoint.attached(file)
        tokenizer = restore_tokenizer(description, model_file, str(checkpoint.folder))
    assert recipe.model.vocab_size is not None
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model of {checkpoint.folder} "
            f"{recipe.model.vocab_size}; it was trained with another one"
        )
    assembled = build_model(
        recipe.model, recipe.precision, recipe.kernels, seed=recipe.train.seed, device=choose_device("auto")
    )
    checkpoint.load("weights", {name: TensorSlices.of_whole(p.data) for name, p in assembled.model.named_parameters()})
    copy_weights([assembled.model], recipe.precision, assembled.context)  # its layers keep them
    return assembled.model, tokenizer
