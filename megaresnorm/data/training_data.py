"""The data of a recipe: its sets, opened and checked, and the samples to train and to evaluate on."""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megaresnorm.data.dataset import VERIFY_BYTES, DataSet, json_digest, open_dataset
from megaresnorm.data.samples import BlendedSamples, PackedSamples, Samples
from megaresnorm.data.splits import (
    Split,
    num_tokens,
    split_by_documents,
    split_by_tokens,
    split_in_order,
    whole,
)
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.data.tokenizer_files import read_tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.recipe import DataRecipe, Recipe

log = logging.getLogger(__name__)

HELD_OUT = ""  # name of the validation set that is a share of the training data
OFF = 0.05  # share of a part's size by which it may miss it without a warning


class TrainingData(NamedTuple):
    """The data sets of a recipe.

    Attributes:
        sets: in the order of the recipe's sources.
        valid: validation sets of their own, by name.
        tokenizer, vocab_size: shared by all sets; None for bare Megatron files without data.tokenizer.
        digest: stands for the content of all sets and, in a blend, their weights.
    """

    sets: list[DataSet]
    valid: dict[str, DataSet]
    tokenizer: Tokenizer | None
    vocab_size: int | None
    digest: str

    @property
    def whole_digest(self) -> str:
        """Stands for the validation sets of their own, too."""
        valid = {name: one.digest for name, one in self.valid.items()}
        return json_digest({"data": self.digest, "valid": valid}) if valid else self.digest


def open_data(recipe: DataRecipe) -> TrainingData:
    """Open data.path, or the sets of data.blend, and those of data.valid.

    Raises:
        DataError: a set is damaged, or sets have different tokenizers.
        ConfigError: data.tokenizer is given for sets that have their own.
    """
    sets = [open_dataset(source.path) for source in recipe.sources]
    valid = {name: open_dataset(path) for name, path in (recipe.valid or {}).items()}
    everything = [*sets, *valid.values()]
    named = None if recipe.tokenizer is None else read_tokenizer(Path(recipe.tokenizer))
    if named is not None and all(data.tokenizer is not None for data in everything):
        raise ConfigError(f"data.tokenizer={recipe.tokenizer}: {sets[0].path} has its own tokenizer; remove it")
    tokenizers = [data.tokenizer or named for data in everything]
    described = [None if tokenizer is None else tokenizer.describe() for tokenizer in tokenizers]
    for data, its in zip(everything, described, strict=True):
        if its != described[0]:
            raise DataError(
                f"{data.path}: its tokenizer is not that of {sets[0].path}; prepare both with the same one "
                "(--tokenizer with the other folder's tokenizer file)"
            )
    for name, data in valid.items():
        if any(data.digest == one.digest for one in sets):
            log.warning("warning: data.valid.%s is a set that is trained on", name)
    vocab_size = None if tokenizers[0] is None else tokenizers[0].vocab_size
    digest = sets[0].digest
    if recipe.blend is not None:
        digest = json_digest({"blend": [[d.digest, s.weight] for d, s in zip(sets, recipe.sources, strict=True)]})
    return TrainingData(sets, valid, tokenizers[0], vocab_size, digest)


def resolve_vocab(recipe: Recipe, data: TrainingData) -> Recipe:
    """The recipe with model.vocab_size set, from the data where the recipe leaves it open.

    Raises:
        ConfigError: neither says the size, or it is smaller than that of the data.
        DataError: bare Megatron files hold a token that is outside the vocabulary.
    """
    vocab_size, path = recipe.model.vocab_size or data.vocab_size, data.sets[0].path
    if vocab_size is None:
        raise ConfigError(f"model.vocab_size is missing, and {path} does not say it; set it, or data.tokenizer")
    if data.vocab_size is not None and vocab_size < data.vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is smaller than the {data.vocab_size} tokens of the tokenizer of "
            f"{recipe.data.tokenizer or path}; leave it out, or raise it"
        )
    for one in (*data.sets, *data.valid.values()):
        if one.tokenizer is None:  # files with a description were checked against their digests
            one.files.check_token_range(data.vocab_size or vocab_size, VERIFY_BYTES)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": vocab_size})})


def open_samples(
    data: TrainingData, recipe: Recipe, *, whole_documents: bool = False
) -> tuple[Samples, dict[str, Samples]]:
    """Training samples, and those of each validation set by its name: HELD_OUT for the share of the training data.

    Warns where a part of the data is not as large as asked for.

    Args:
        whole_documents: split as versions before 0.2 did.

    Raises:
        DataError: a part is too small for one sequence, or with data.mask_documents has nothing to predict.
    """
    splits = [split_of(one, recipe, whole_documents=whole_documents) for one in data.sets]
    for one, split in zip(data.sets, splits, strict=True):
        for line in [] if whole_documents else off(one, split, recipe):
            log.warning("warning: %s", line)
    parts = [_packed(one, split["train"], "train", recipe) for one, split in zip(data.sets, splits, strict=True)]
    valid: dict[str, Samples] = {
        name: _packed(one, whole(one.files.boundaries), "valid", recipe) for name, one in data.valid.items()
    }
    weights = [source.weight for source in recipe.data.sources]
    both = zip(data.sets, splits, weights, strict=True)
    held = [(_packed(one, split["valid"], "valid", recipe), w) for one, split, w in both if len(split["valid"])]
    if held:
        shares = [weight for _, weight in held]
        blended = BlendedSamples([one for one, _ in held], shares, recipe.data.seed, shuffle=False)
        valid[HELD_OUT] = blended if recipe.data.blend is not None else held[0][0]
    if recipe.data.blend is None:
        return parts[0], valid
    return BlendedSamples(parts, weights, recipe.data.seed, shuffle=True), valid


def split_of(data: DataSet, recipe: Recipe, *, whole_documents: bool = False) -> Split:
    """The parts of a training set: as data.split says, or at random by data.valid_fraction and data.test_fraction."""
    settings, files = recipe.data, data.files
    if settings.split is not None:
        return split_in_order(files.boundaries, files.sequences, settings.split)
    if whole_documents:
        return split_by_documents(files.boundaries, settings.shares, settings.seed)
    return split_by_tokens(files.boundaries, settings.shares, settings.seed, least=recipe.model.seq_len + 1)


def off(data: DataSet, split: Split, recipe: Recipe) -> list[str]:
    """A line for each of validation and test whose share of the tokens is not the one that was asked for."""
    total, lines = max(1, len(data.files.tokens)), []
    for name, wanted in recipe.data.shares.items():
        have = num_tokens(split[name])
        if abs(have - wanted * total) <= max(1.0, OFF * wanted * total):
            continue
        of_what = f"{wanted:.4g} of its {total:,} tokens were asked for"
        if recipe.data.split is None and name == "valid":
            of_what += f", less than one sequence of {recipe.model.seq_len} + 1"
        lines.append(f"{data.path}: {have:,} tokens ({have / total:.2%}) are for {_PARTS[name]}; {of_what}")
    return lines


_PARTS = {"train": "training", "valid": "validation", "test": "test"}


def _packed(data: DataSet, pieces: np.ndarray, split: str, recipe: Recipe) -> PackedSamples:
    seq_len = recipe.model.seq_len
    samples = PackedSamples(data.files, pieces, seq_len, recipe.data.seed)
    if samples.per_epoch:
        if recipe.data.mask_documents and samples.longest < 2:
            raise DataError(
                f"{data.path}: no document of the {split} split has two tokens, so with data.mask_documents there is "
                "nothing to predict; join short documents, or set data.mask_documents to false"
            )
        return samples
    raise DataError(
        f"{data.path}: {samples.num_tokens:,} of its {len(data.files.tokens):,} tokens are for {_PARTS[split]}, less "
        f"than one sequence of {seq_len} + 1; "
        + (
            "give more text, hold out less, or set a smaller model.seq_len"
            if split == "train"
            else "give a larger one, or none, or set a smaller model.seq_len"
        )
    )
