"""Sample i as a pure function of (seed, i), from one data set's split or from a blend of several."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from megaresnorm.data.dataset import VERIFY_BYTES, DataSet, json_digest, open_dataset
from megaresnorm.data.indexed import TokenFiles
from megaresnorm.data.tokenizer import Tokenizer
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.recipe import DataRecipe, Recipe

ENTROPY_TOKENS = 1 << 26  # from which token frequencies are taken
BLEND_WINDOW = 1024  # samples of a blend that are shuffled among each other


class Sample(NamedTuple):
    """One sequence and the token that follows it.

    Attributes:
        tokens: [seq_len + 1] int64.
        documents: [seq_len + 1] int64, the document of each token, numbered within the sample from 0.
    """

    tokens: np.ndarray
    documents: np.ndarray


class Samples(Protocol):
    """An endless sequence of samples. Sample i depends on (seed, i) alone: resuming needs i, and ranks do not matter.

    Attributes:
        per_epoch: samples of one pass through the data.
        num_documents: documents that they are cut from.
    """

    per_epoch: int
    num_documents: int

    def __getitem__(self, i: int) -> Sample:
        """Sample i, in arrays of its own."""
        ...

    def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        """Write sample i into arrays [seq_len + 1] of any integer type, as ``Sample`` has them.

        Args:
            documents: None where nobody reads them.
        """
        ...

    def token_shares(self) -> np.ndarray:
        """Relative frequency of each token, [V]; estimated from about the first ENTROPY_TOKENS tokens of a source.

        V may be smaller than the vocabulary: tokens that do not occur may be missing at the end.
        """
        ...


class PackedSamples:
    """Sequences cut from one split's documents, laid end to end in a new order every epoch.

    Args:
        documents: numbers of the split's documents in ``files``.

    Attributes:
        num_tokens: tokens of the split.
        longest: tokens of its longest document.
    """

    def __init__(self, files: TokenFiles, documents: np.ndarray, seq_len: int, seed: int) -> None:
        self.files, self.documents, self.seq_len, self.seed = files, documents, seq_len, seed
        self.num_documents = len(documents)
        lengths = files.boundaries[documents + 1] - files.boundaries[documents]
        self.num_tokens = int(lengths.sum())
        self.longest = int(lengths.max(initial=0))
        self.per_epoch = max(0, self.num_tokens - 1) // seq_len
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, i: int) -> Sample:
        tokens, documents = np.empty((2, self.seq_len + 1), dtype=np.int64)
        self.read(i, tokens, documents)
        return Sample(tokens, documents)

    def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        """As of ``Samples``."""
        epoch, place = divmod(i, self.per_epoch)
        order, ends, shuffle = self._epoch(epoch)
        start = first = int(shuffle[place]) * self.seq_len
        stop = start + self.seq_len + 1
        number = 0
        d = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document = order[d]
            skipped = ends[d] - start  # tokens of this document from ``start`` to its end
            take = min(stop - start, int(skipped))
            end = int(self.files.boundaries[document + 1])
            there = slice(start - first, start - first + take)
            tokens[there] = self.files.tokens[end - int(skipped) : end - int(skipped) + take]
            if documents is not None:
                documents[there] = number
            start, d, number = start + take, d + 1, number + 1

    def token_shares(self) -> np.ndarray:
        """Relative frequency of each token among about the first ENTROPY_TOKENS of the split."""
        counts = np.zeros(1, dtype=np.int64)
        seen = 0
        for document in self.documents:
            tokens = self.files.tokens[self.files.boundaries[document] : self.files.boundaries[document + 1]]
            counts = _added(counts, np.bincount(tokens.astype(np.int64), minlength=1))
            seen += len(tokens)
            if seen >= ENTROPY_TOKENS:
                break
        return counts / max(1, counts.sum())

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents in this epoch's order, the token offset at which each ends, and the order of its samples."""
        order = self.documents[_random(self.seed, 2 * epoch).permutation(len(self.documents))]
        ends = np.cumsum(self.files.boundaries[order + 1] - self.files.boundaries[order])
        return order, ends, _random(self.seed, 2 * epoch + 1).permutation(self.per_epoch)


class BlendedSamples:
    """Samples of several sources, shared out by weight.

    Wherever n is a multiple of BLEND_WINDOW, every source has its share of the first n samples to within a few whole
    samples, and so exactly in the long run. Each source goes through its own samples in order.

    Args:
        weights: relative; need not add up to 1.
        shuffle: whether the sources come in random order within a window; otherwise as evenly as whole samples allow.

    Attributes:
        weights: exact fractions that add up to 1.
    """

    def __init__(self, sources: Sequence[PackedSamples], weights: Sequence[float], seed: int, *, shuffle: bool) -> None:
        self.sources, self.seed, self.shuffle = list(sources), seed, shuffle
        exact = [Fraction(weight) for weight in weights]
        self.weights = [weight / sum(exact) for weight in exact]
        self.per_epoch = sum(source.per_epoch for source in sources)
        self.num_documents = sum(source.num_documents for source in sources)
        self._window = functools.lru_cache(maxsize=4)(self._make_window)
        self._left_share = functools.lru_cache(maxsize=None)(self._make_left_share)

    def __getitem__(self, i: int) -> Sample:
        source, j = self.place(i)
        return self.sources[source][j]

    def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        """As of ``Samples``."""
        source, j = self.place(i)
        self.sources[source].read(j, tokens, documents)

    def place(self, i: int) -> tuple[int, int]:
        """(source, number of that source's sample) that sample i is."""
        window, at = divmod(i, BLEND_WINDOW)
        sources, samples = self._window(window)
        return int(sources[at]), int(samples[at])

    def counts(self, n: int) -> list[int]:
        """Number of samples that each source has among the first n."""
        whole = n - n % BLEND_WINDOW
        counts = np.array(self._shared_out(whole, 0, len(self.weights)))
        last, _ = self._window(n // BLEND_WINDOW)
        return (counts + np.bincount(last[: n - whole], minlength=len(counts))).tolist()

    def token_shares(self) -> np.ndarray:
        """Relative frequency of each token: the weighted mean over the sources."""
        shares = np.zeros(1)
        for weight, source in zip(self.weights, self.sources, strict=True):
            shares = _added(shares, float(weight) * source.token_shares())
        return shares

    def _shared_out(self, n: int, first: int, last: int) -> list[int]:
        """Numbers of samples when n of them are shared out among sources ``first`` to ``last - 1``.

        The left half of the sources has its share, rounded, and so on within each half. With n + 1 samples exactly one
        source has one more, and sample n is its.
        """
        if last - first == 1:
            return [n]
        part, whole = self._left_share(first, last)
        left = (2 * n * part + whole) // (2 * whole)
        middle = (first + last) // 2
        return self._shared_out(left, first, middle) + self._shared_out(n - left, middle, last)

    def _make_left_share(self, first: int, last: int) -> tuple[int, int]:
        """Share of the left half in the weight of sources ``first`` to ``last - 1``, as (numerator, denominator)."""
        left = sum(self.weights[first : (first + last) // 2], Fraction(0)) / sum(self.weights[first:last], Fraction(0))
        return left.numerator, left.denominator

    def _make_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of a window, and the number of that source's sample: two of [BLEND_WINDOW]."""
        start = window * BLEND_WINDOW
        counts = np.array(
            [self._shared_out(n, 0, len(self.weights)) for n in range(start, start + BLEND_WINDOW + 1)], dtype=np.int64
        )
        sources = np.diff(counts, axis=0).argmax(axis=1)
        if self.shuffle:
            sources = sources[_random(self.seed, (1 << 62) + window).permutation(BLEND_WINDOW)]
        samples = np.empty(BLEND_WINDOW, dtype=np.int64)
        for source, before in enumerate(counts[0]):
            mine = sources == source
            samples[mine] = before + np.arange(mine.sum())
        return sources, samples


class TrainingData(NamedTuple):
    """The data sets of a recipe.

    Attributes:
        sets: in the order of the recipe's sources.
        tokenizer, vocab_size: shared by all sets; None for bare Megatron files.
        digest: stands for the content of all sets and, in a blend, their weights.
    """

    sets: list[DataSet]
    tokenizer: Tokenizer | None
    vocab_size: int | None
    digest: str


def open_data(recipe: DataRecipe) -> TrainingData:
    """Open data.path, or the sets of data.blend.

    Raises:
        DataError: a set is damaged, or sets have different tokenizers.
    """
    sets = [open_dataset(source.path) for source in recipe.sources]
    described = [None if data.tokenizer is None else data.tokenizer.describe() for data in sets]
    for data, tokenizer in zip(sets, described, strict=True):
        if tokenizer != described[0]:
            raise DataError(
                f"{data.path}: its tokenizer is not that of {sets[0].path}; prepare both with the same one "
                "(--tokenizer with the other folder's tokenizer file)"
            )
    digest = sets[0].digest
    if recipe.blend is not None:
        digest = json_digest({"blend": [[d.digest, s.weight] for d, s in zip(sets, recipe.sources, strict=True)]})
    return TrainingData(sets, sets[0].tokenizer, sets[0].vocab_size, digest)


def resolve_vocab(recipe: Recipe, data: TrainingData) -> Recipe:
    """The recipe with model.vocab_size set, from the data where the recipe leaves it open.

    Raises:
        ConfigError: neither says the size, or it is smaller than that of the data.
        DataError: bare Megatron files hold a token that is outside the vocabulary.
    """
    vocab_size, path = recipe.model.vocab_size or data.vocab_size, data.sets[0].path
    if vocab_size is None:
        raise ConfigError(f"model.vocab_size is missing, and {path} does not say it; set model.vocab_size=...")
    if data.vocab_size is not None and vocab_size < data.vocab_size:
        raise ConfigError(f"model.vocab_size={vocab_size} is smaller than the {data.vocab_size} tokens of {path}")
    if data.tokenizer is None:  # files with a description were checked against their digests
        for one in data.sets:
            one.files.check_token_range(vocab_size, VERIFY_BYTES)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": vocab_size})})


def open_samples(data: TrainingData, recipe: Recipe) -> tuple[Samples, Samples | None]:
    """Training and validation samples; None instead of the latter where data.valid_fraction is 0.

    Raises:
        DataError: a split is too small for one sequence, or with data.mask_documents has nothing to predict.
    """
    train, valid = [], []
    for one in data.sets:
        splits = split_documents(one.files, recipe.data)
        train.append(_packed(one, splits, "train", recipe))
        if recipe.data.valid_fraction > 0:
            valid.append(_packed(one, splits, "valid", recipe))
    if recipe.data.blend is None:
        return train[0], valid[0] if valid else None
    weights = [source.weight for source in recipe.data.blend]
    blended = BlendedSamples(train, weights, recipe.data.seed, shuffle=True)
    return blended, BlendedSamples(valid, weights, recipe.data.seed, shuffle=False) if valid else None


def split_documents(files: TokenFiles, recipe: DataRecipe) -> dict[str, np.ndarray]:
    """Assign whole documents to train, valid and test at random, by share of the tokens.

    A split that is asked for has at least one document, as long as one is left to train on.

    Returns:
        Document numbers of each split, by its name.
    """
    order = np.random.Generator(np.random.Philox(key=recipe.seed)).permutation(files.num_documents)
    lengths = files.boundaries[order + 1] - files.boundaries[order]
    share = np.cumsum(lengths) / max(1, int(lengths.sum()))  # share of the tokens up to and with each document

    def documents_in(fraction: float, taken: int, wanted: float) -> int:
        count = int(np.searchsorted(share, fraction, side="right"))
        return min(max(count, taken + (wanted > 0)), max(taken, files.num_documents - 1))

    num_test = documents_in(recipe.test_fraction, 0, recipe.test_fraction)
    num_held = documents_in(recipe.test_fraction + recipe.valid_fraction, num_test, recipe.valid_fraction)
    return {"test": order[:num_test], "valid": order[num_test:num_held], "train": order[num_held:]}


def unigram_entropy(shares: np.ndarray) -> float:
    """Entropy of single tokens in nats: the loss of a model that has learned their frequencies and nothing else.

    >>> round(unigram_entropy(np.array([0.5, 0.5, 0.0])), 6)
    0.693147
    """
    p = shares[shares > 0]
    return float(-(p * np.log(p)).sum())


def _packed(data: DataSet, splits: dict[str, np.ndarray], split: str, recipe: Recipe) -> PackedSamples:
    seq_len = recipe.model.seq_len
    samples = PackedSamples(data.files, splits[split], seq_len, recipe.data.seed)
    if samples.per_epoch:
        if recipe.data.mask_documents and samples.longest < 2:
            raise DataError(
                f"{data.path}: no document of the {split} split has two tokens, so with data.mask_documents there is "
                "nothing to predict; join short documents, or set data.mask_documents to false"
            )
        return samples
    if split == "train":
        raise DataError(f"{data.path}: the training split is shorter than one sequence of {seq_len} + 1 tokens")
    raise DataError(
        f"{data.path}: the validation split, {len(splits[split])} of {data.files.num_documents} documents, is "
        f"shorter than one sequence of {seq_len} + 1 tokens; raise data.valid_fraction, or set it to 0"
    )


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two vectors, the shorter one padded with zeros."""
    total = np.zeros(max(len(a), len(b)), dtype=np.result_type(a, b))
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
