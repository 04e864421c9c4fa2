"""Statistics of data sets, and of what a recipe will draw from them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megaresnorm.data.dataset import LARGEST_VOCAB, DataSet
from megaresnorm.data.samples import BlendedSamples, PackedSamples, Samples, unigram_entropy
from megaresnorm.data.splits import num_tokens, whole
from megaresnorm.data.training_data import TrainingData, split_of
from megaresnorm.recipe import Recipe


@dataclass(frozen=True)
class DataStatistics:
    """Figures of one data set.

    Attributes:
        tokenizer: its kind.
        vocab_size: None for bare Megatron files.
        dtype: type of a stored token.
        shortest, median, mean, longest: lengths of documents, in tokens, with their end-of-document token.
        entropy: unigram entropy of about the first 2^26 tokens, in nats a token.
        used: number of different tokens that occur in those.
    """

    path: str
    tokenizer: str
    vocab_size: int | None
    dtype: str
    documents: int
    tokens: int
    shortest: int
    median: float
    mean: float
    longest: int
    entropy: float
    used: int


@dataclass(frozen=True)
class Draw:
    """Samples that a run draws from one source.

    Attributes:
        share: fraction of the run's samples.
        tokens: size of the source's training split.
        sequences: samples of one pass through it.
        drawn: number of samples drawn.
        epochs: number of passes, as a fraction.
    """

    path: str
    share: float
    tokens: int
    sequences: int
    drawn: int
    epochs: float


@dataclass(frozen=True)
class Part:
    """A part of a data set.

    Attributes:
        part: train, valid or test; or the name of a validation set of its own.
        documents: documents and pieces of documents.
        share: of the set's tokens.
        wanted: the share that the recipe asks for; None where it does not say.
        sequences: number of sequences of seq_len tokens in one pass.
    """

    path: str
    part: str
    documents: int
    tokens: int
    share: float
    wanted: float | None
    sequences: int


def parts_of(data: TrainingData, recipe: Recipe) -> list[Part]:
    """The parts of every data set of a recipe, and the validation sets of their own."""
    shares = recipe.data.shares
    wanted: dict[str, float | None] = {"train": 1 - sum(shares.values()), **shares}
    found = []
    for one in data.sets:
        split = split_of(one, recipe)
        found += [_part(one, name, split[name], wanted[name], recipe) for name in wanted if len(split[name])]
    for name, one in data.valid.items():
        found.append(_part(one, name, whole(one.files.boundaries), None, recipe))
    return found


def _part(data: DataSet, name: str, pieces: np.ndarray, wanted: float | None, recipe: Recipe) -> Part:
    tokens = num_tokens(pieces)
    share, sequences = tokens / max(1, len(data.files.tokens)), max(0, tokens - 1) // recipe.model.seq_len
    return Part(data.path, name, len(pieces), tokens, share, wanted, sequences)


def statistics_of(data: DataSet) -> DataStatistics:
    """Compute the figures of a data set, from all of its tokens.

    Raises:
        DataError: a token is outside the vocabulary.
    """
    files = data.files
    files.check_token_range(data.vocab_size or LARGEST_VOCAB, max_bytes=1 << 62)
    lengths = np.diff(files.boundaries)
    shares = PackedSamples(files, whole(files.boundaries), seq_len=1, seed=0).token_shares()
    return DataStatistics(
        path=data.path,
        tokenizer="unknown (bare token files)" if data.tokenizer is None else data.tokenizer.describe()["kind"],
        vocab_size=data.vocab_size,
        dtype=files.dtype.name,
        documents=files.num_documents,
        tokens=len(files.tokens),
        shortest=int(lengths.min()),
        median=float(np.median(lengths)),
        mean=float(lengths.mean()),
        longest=int(lengths.max()),
        entropy=unigram_entropy(shares),
        used=int((shares > 0).sum()),
    )


def draws_of(recipe: Recipe, samples: Samples, num_samples: int) -> list[Draw]:
    """Draws from each source for the first ``num_samples`` samples of a recipe's training data."""
    if isinstance(samples, BlendedSamples):
        parts: Sequence[tuple[float, PackedSamples, int]] = [
            (float(w), s, c)
            for w, s, c in zip(samples.weights, samples.sources, samples.counts(num_samples), strict=True)
        ]
    else:
        assert isinstance(samples, PackedSamples)
        parts = [(1.0, samples, num_samples)]
    return [
        Draw(source.path, share, part.num_tokens, part.per_epoch, drawn, drawn / part.per_epoch)
        for source, (share, part, drawn) in zip(recipe.data.sources, parts, strict=True)
    ]
