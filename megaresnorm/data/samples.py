"""Sample i as a pure function of (seed, i), from a part of one data set or from a blend of several."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np

from megaresnorm.data.indexed import TokenFiles

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
        num_documents: documents, or pieces of them, that they are cut from.
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
    """Sequences cut from documents that are laid end to end in a new order every epoch.

    Args:
        pieces: [n, 2] int64, the tokens of ``files`` at which each document, or piece of one, begins and ends.

    Attributes:
        num_tokens: tokens of all of them.
        longest: tokens of the longest.
    """

    def __init__(self, files: TokenFiles, pieces: np.ndarray, seq_len: int, seed: int) -> None:
        self.files, self.pieces, self.seq_len, self.seed = files, pieces, seq_len, seed
        self.num_documents = len(pieces)
        lengths = pieces[:, 1] - pieces[:, 0]
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
        stops, ends, shuffle = self._epoch(epoch)
        start = first = int(shuffle[place]) * self.seq_len
        stop = start + self.seq_len + 1
        number = 0
        d = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            skipped = ends[d] - start  # tokens of this document from ``start`` to its end
            take = min(stop - start, int(skipped))
            begin = int(stops[d]) - int(skipped)
            there = slice(start - first, start - first + take)
            tokens[there] = self.files.tokens.read(begin, begin + take)
            if documents is not None:
                documents[there] = number
            start, d, number = start + take, d + 1, number + 1

    def token_shares(self) -> np.ndarray:
        """Relative frequency of each token among about the first ENTROPY_TOKENS."""
        counts = np.zeros(1, dtype=np.int64)
        seen = 0
        for start, stop in self.pieces:
            tokens = self.files.tokens[start:stop]
            counts = _added(counts, np.bincount(tokens.astype(np.int64), minlength=1))
            seen += len(tokens)
            if seen >= ENTROPY_TOKENS:
                break
        return counts / max(1, counts.sum())

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token offsets, in the files and in the epoch, at which documents end, in order, and the order of samples."""
        order = self.pieces[_random(self.seed, 2 * epoch).permutation(len(self.pieces))]
        return (
            order[:, 1],
            np.cumsum(order[:, 1] - order[:, 0]),
            _random(self.seed, 2 * epoch + 1).permutation(self.per_epoch),
        )


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


def unigram_entropy(shares: np.ndarray) -> float:
    """Entropy of single tokens in nats: the loss of a model that has learned their frequencies and nothing else.

    >>> round(unigram_entropy(np.array([0.5, 0.5, 0.0])), 6)
    0.693147
    """
    p = shares[shares > 0]
    return float(-(p * np.log(p)).sum())


def _added(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two vectors, the shorter one padded with zeros."""
    total = np.zeros(max(len(a), len(b)), dtype=np.result_type(a, b))
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def _random(seed: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream]))
