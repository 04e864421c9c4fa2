"""Splits and samples: pure functions of a seed and an integer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.loader import Loader, SampleRange
from megaresnorm.data.samples import PackedSamples, unigram_entropy
from megaresnorm.data.splits import pieces_between
from megaresnorm.parallel.mesh import Axis, ParallelContext

CPU = torch.device("cpu")


@pytest.fixture
def samples(byte_data):
    files = open_dataset(str(byte_data)).files
    return PackedSamples(files, pieces_between(files.boundaries, 0, len(files.tokens)), 16, seed=7)


def test_sample_is_a_pure_function_of_seed_and_number(samples):
    order = np.random.default_rng(0).permutation(3 * samples.per_epoch)[:200]
    again = PackedSamples(samples.files, samples.pieces, 16, seed=7)
    assert all(np.array_equal(samples[i].tokens, again[i].tokens) for i in order)
    other = PackedSamples(samples.files, samples.pieces, 16, seed=8)
    assert not all(np.array_equal(samples[i].tokens, other[i].tokens) for i in range(20))


def test_an_epoch_holds_every_token_once_and_documents_stay_whole(samples):
    """The windows of one epoch, put back in order, are the documents end to end in a shuffled order."""
    stops, ends, shuffle = samples._make_epoch(1)
    windows = {int(place): samples[samples.per_epoch + i] for i, place in enumerate(shuffle)}
    stream = np.concatenate([windows[j].tokens[:16] for j in range(samples.per_epoch)])
    files = samples.files
    order = np.searchsorted(files.boundaries[1:], stops)
    expected = np.concatenate([files.tokens[files.boundaries[d] : files.boundaries[d + 1]] for d in order])
    assert np.array_equal(stream, expected[: len(stream)]) and len(expected) - len(stream) <= 16
    assert sorted(order) == list(range(files.num_documents)) and ends[-1] == len(files.tokens)
    for j in range(samples.per_epoch - 1):  # the last token of a window is the first of the next
        assert windows[j].tokens[16] == windows[j + 1].tokens[0]


def test_epochs_have_different_orders(samples):
    assert not np.array_equal(samples._make_epoch(0)[0], samples._make_epoch(1)[0])
    assert not np.array_equal(samples._make_epoch(0)[2], samples._make_epoch(1)[2])


def test_batches_do_not_depend_on_ranks_or_microbatches(samples):
    """One rank with any microbatch, and two ranks together, see the same samples with the same labels."""

    def read(context, micro):
        return Loader(samples, 16, context, CPU, micro=micro).load(SampleRange(100, 12)).microbatches

    single = read(ParallelContext.single(), 12)[0]
    assert single.tokens.shape == (12, 16) and torch.equal(single.tokens[:, 1:], single.labels[:, :-1])
    small = read(ParallelContext.single(), 5)
    assert [len(b.samples) for b in small] == [5, 5, 2]
    assert torch.equal(torch.cat([b.tokens for b in small]), single.tokens)
    halves = []
    for rank in range(2):
        data = Axis("dp", 2, rank)
        halves += read(replace(ParallelContext.single(), dp=data, world=data), 6)
    rows = {int(i): row for b in halves for i, row in zip(b.samples, b.tokens, strict=True)}
    assert all(torch.equal(rows[int(i)], row) for i, row in zip(single.samples, single.tokens, strict=True))


def test_unigram_entropy(samples):
    tokens = np.asarray(samples.files.tokens)
    _, counts = np.unique(tokens, return_counts=True)
    p = counts / counts.sum()
    assert unigram_entropy(samples.token_shares()) == pytest.approx(float(-(p * np.log(p)).sum()), rel=1e-12)
