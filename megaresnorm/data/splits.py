"""Training, validation and test as parts of the tokens of a data set.

A part is its pieces of documents: [n, 2] int64, the token offsets at which each begins and ends. Every token is in
exactly one part, whatever the lengths of the documents.
"""

import numpy as np

Split = dict[str, np.ndarray]  # train, valid, test -> pieces
SLACK = 0.02  # share of a part by which whole documents may miss its size before one is cut


def pieces_between(boundaries: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The pieces of documents that lie in a range of tokens.

    Args:
        boundaries: [num_documents + 1], token offsets of documents.

    >>> pieces_between(np.array([0, 10, 30]), 5, 12).tolist()
    [[5, 10], [10, 12]]
    """
    return _not_empty(np.maximum(boundaries[:-1], start), np.minimum(boundaries[1:], stop))


def whole(boundaries: np.ndarray) -> np.ndarray:
    """All documents as pieces."""
    return pieces_between(boundaries, int(boundaries[0]), int(boundaries[-1]))


def split_by_tokens(boundaries: np.ndarray, shares: dict[str, float], seed: int, least: int) -> Split:
    """Parts of so many tokens: documents at random, and the end of one where whole ones would miss a part's size.

    Documents are laid out in random order. The first are for test, the next for validation, the others to train on.
    Where a part would end inside of a document, it ends with the nearest document if that is within SLACK of its size.
    Otherwise the end of the document is in it, and the rest of the document in what follows.

    Args:
        boundaries: [num_documents + 1], token offsets of documents.
        shares: of test and valid.
        least: tokens below which validation is of no use: it gets as many where its share is smaller and that leaves as
            many to train on, and otherwise none.
    """
    total = int(boundaries[-1])
    test, valid = (round(total * shares[name]) for name in ("test", "valid"))
    if shares["valid"] > 0 and valid < least:
        valid = least if total - test >= 2 * least else 0
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(boundaries) - 1)
    ends = np.cumsum(boundaries[order + 1] - boundaries[order])
    smallest = min((size for size in (test, valid) if size), default=0)
    first = _near_document(test, ends, SLACK * smallest)
    second = _near_document(test + valid, ends, SLACK * (valid or test))
    if second - first < least <= valid:  # the nearest document ends a little too early
        second = first + valid
    second = second if valid else first
    ranges = {"test": (0, first), "valid": (first, second), "train": (second, total)}
    return {name: _of_order(boundaries, order, ends, start, stop) for name, (start, stop) in ranges.items()}


def split_in_order(boundaries: np.ndarray, sequences: np.ndarray, weights: list[float]) -> Split:
    """Megatron-Core's ``--split``: the first sequences to train on, the next for validation, the last for test.

    Args:
        boundaries: [num_documents + 1], token offsets of documents.
        sequences: [num_sequences + 1], token offsets of the sequences that these consist of.
        weights: relative numbers of sequences, of train, valid and test.

    Source:
        megatron-core 0.16.1, BlendedMegatronDatasetBuilder, with its rounding.
    """
    shares = (np.array(weights, dtype=np.float64) / np.sum(weights)).tolist()
    places, share = [0], 0.0
    for one in shares:
        share += one
        places.append(int(sequences[round(share * float(len(sequences) - 1))]))
    names = ("train", "valid", "test")
    return {n: pieces_between(boundaries, a, b) for n, a, b in zip(names, places[:-1], places[1:], strict=True)}


def split_by_documents(boundaries: np.ndarray, shares: dict[str, float], seed: int) -> Split:
    """The split of runs that were begun before version 0.2: whole documents, however long, and at least one a part."""
    count = len(boundaries) - 1
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(count)
    lengths = boundaries[order + 1] - boundaries[order]
    share = np.cumsum(lengths) / max(1, int(lengths.sum()))  # share of the tokens up to and with each document

    def documents_in(fraction: float, taken: int, wanted: float) -> int:
        found = int(np.searchsorted(share, fraction, side="right"))
        return min(max(found, taken + (wanted > 0)), max(taken, count - 1))

    num_test = documents_in(shares["test"], 0, shares["test"])
    num_held = documents_in(shares["test"] + shares["valid"], num_test, shares["valid"])
    parts = {"test": order[:num_test], "valid": order[num_test:num_held], "train": order[num_held:]}
    return {name: np.stack([boundaries[d], boundaries[d + 1]], axis=1) for name, d in parts.items()}


def num_tokens(pieces: np.ndarray) -> int:
    """Number of tokens of pieces."""
    return int((pieces[:, 1] - pieces[:, 0]).sum())


def _near_document(place: int, ends: np.ndarray, slack: float) -> int:
    """The end of the document that is nearest to a place, if it is within ``slack`` tokens of it; or else the place."""
    i = int(np.searchsorted(ends, place))
    near = [0, *(int(end) for end in ends[max(0, i - 1) : i + 1])]
    best = min(near, key=lambda end: abs(end - place))
    return best if abs(best - place) <= slack else place


def _of_order(boundaries: np.ndarray, order: np.ndarray, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The pieces that lie in a range of documents in some order; earlier in it is nearer to a document's end."""
    last = boundaries[order + 1]
    begins = ends - (last - boundaries[order])
    return _not_empty(last - (np.minimum(ends, stop) - begins), last - (np.maximum(begins, start) - begins))


def _not_empty(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    return np.stack([starts, stops], axis=1)[stops > starts].astype(np.int64)
