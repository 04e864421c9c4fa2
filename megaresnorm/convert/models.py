"""Two models of either kind, opened and compared: checkpoints of ours, and folders of Hugging Face Transformers."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megaresnorm.convert.compare import (
    TOLERANCE,
    Agreement,
    Logits,
    checked_config,
    compare,
    kept_logits_on,
    load_theirs,
    logits_on,
    of_ours,
    of_theirs,
)
from megaresnorm.convert.files import CONFIG, Weights
from megaresnorm.convert.match import match_family
from megaresnorm.convert.native import NativeModel
from megaresnorm.convert.prompts import PROMPTS, random_prompts, text_prompts
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import CheckpointError, ConfigError
from megaresnorm.recipe import ModelRecipe


def compare_models(
    folders: tuple[Path, Path], texts: Sequence[str] | None = None, tolerance: float = TOLERANCE
) -> tuple[Agreement, str]:
    """Compare the logits of two models.

    Where the weights of one are rounded, those of the other are rounded alike: what that has changed says nothing of a
    conversion.

    Args:
        folders: checkpoints of ours or folders of Transformers.
        texts: to compare on; None for random tokens.
        tolerance: largest difference, as a share of the largest logit.

    Returns:
        (how they differ, what was rounded: empty for nothing).

    Raises:
        CheckpointError: one cannot be read, or they are not of one size.
        ConfigError: neither has a tokenizer for the texts.
    """
    one, other = map(open_model, folders)
    if one.vocab_size != other.vocab_size:
        raise CheckpointError(
            f"the models have logits of {one.vocab_size} and {other.vocab_size} tokens; they are not the same model"
        )
    vocab_size, seq_len = one.vocab_size, min(one.seq_len, other.seq_len)
    if texts is None:
        prompts = random_prompts(vocab_size, seq_len)
    else:
        tokenizer = one.tokenizer or other.tokenizer
        if tokenizer is None:
            raise ConfigError(
                "--prompts needs a checkpoint of ours with a tokenizer as A or B; leave it out for random tokens"
            )
        prompts = text_prompts(texts, tokenizer, vocab_size, seq_len)
    rounded = None
    if one.dtype != other.dtype:
        rounded = min(one.dtype, other.dtype, key=lambda dtype: (dtype.itemsize, dtype is not torch.bfloat16))
    few = sum(prompt_BS.numel() for prompt_BS in prompts) <= PROMPTS
    first = logits_on(prompts, one.load(rounded, other.kind)) if not few else kept_logits_on(
        prompts, lambda: one.load(rounded, other.kind)
    )  # fmt: skip
    agreement = compare(first, logits_on(prompts, other.load(rounded, one.kind)), tolerance)
    which = "A" if one.dtype == rounded else "B"
    note = f"the weights of {which} are {str(rounded).removeprefix('torch.')}, and the other's were rounded alike"
    return agreement, "" if rounded is None else note


class Opened(NamedTuple):
    """A model whose logits can be compared.

    Attributes:
        load: makes the model and returns its logits. Takes the type that its weights are to be rounded to, or None, and
            the ``kind`` of the model that it is compared with, in which constants may be folded into weights.
        kind: model_type of a model of Transformers, else empty.
        dtype: the type that its weights are numbers of.
        seq_len: longest sequence.
        tokenizer: of a checkpoint of ours that has one, else None.
    """

    load: Callable[[torch.dtype | None, str], Logits]
    kind: str
    dtype: torch.dtype
    vocab_size: int
    seq_len: int
    tokenizer: Tokenizer | None = None


def open_model(folder: Path) -> Opened:
    """A checkpoint of ours, or a folder of Transformers, whose weights are not loaded yet.

    Raises:
        CheckpointError: it cannot be read.
    """
    if (folder / CONFIG).exists():
        config = checked_config(folder)
        vocab_size, seq_len = config.get("vocab_size"), config.get("max_position_embeddings", config.get("n_positions"))
        if not isinstance(vocab_size, int) or not isinstance(seq_len, int) or min(vocab_size, seq_len) < 1:
            raise CheckpointError(
                f"{folder / CONFIG}: a vocabulary of {vocab_size} and a length of {seq_len} are not sizes of a model"
            )
        types = Counter(dtype for _, _, dtype in Weights(folder).tensors.values())
        dtype = types.most_common(1)[0][0]
        kind = config["model_type"]
        return Opened(lambda to, _: of_theirs(_rounded(load_theirs(folder), to)), kind, dtype, vocab_size, seq_len)
    native = NativeModel(folder)
    assert native.recipe.vocab_size is not None
    # Weights that nobody has trained on yet are numbers of the type that they came in.
    dtype = native.exported_dtype if native.checkpoint.step == 0 else native.dtype
    vocab_size, seq_len = native.recipe.vocab_size, native.recipe.seq_len

    def load(rounded_to: torch.dtype | None, kind: str) -> Logits:
        return of_ours(native.model(rounded_to, _factor(native.recipe, kind)))

    return Opened(load, "", dtype, vocab_size, seq_len, native.tokenizer())


def _factor(recipe: ModelRecipe, kind: str) -> Callable[[str], float]:
    """The factors on parameters by which a model is written as one of this ``kind``; 1 where it would not be."""
    try:
        return match_family(recipe, kind).factor
    except ConfigError:
        return lambda name: 1.0


@torch.no_grad()
def _rounded(model: Any, dtype: torch.dtype | None) -> Any:
    for p in model.parameters() if dtype is not None else ():
        p.copy_(p.to(dtype))
    return model
