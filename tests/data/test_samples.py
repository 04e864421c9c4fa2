"""Splits and samples: pure functions of a seed and an integer."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megaresnorm.data.dataset import open_dataset
from megaresnorm.data.loader import Loader, SampleRange
from megaresnorm.data.samples import PackedSamples, open_data, open_samples, split_documents, unigram_entropy
from megaresnorm.errors import DataError
from megaresnorm.parallel.mesh import Axis, ParallelContext

CPU = torch.device("cpu")


@pytest.fixture
def samples(byte_data):
    files = open_dataset(str(byte_data)).files
    return PackedSamples(files, np.arange(files.num_documents), 16, seed=7)


def test_sample_is_a_pure_function_of_seed_and_number(samples):
    order = np.random.default_rng(0).permutation(3 * samples.per_epoch)[:200]
    again = PackedSamples(samples.files, samples.documents, 16, seed=7)
    assert all(np.array_equal(samples[i].tokens, again[i].tokens) for i in order)
    other = PackedSamples(samples.files, samples.documents, 16, seed=8)
    assert not all(np.array_equal(samples[i].tokens, other[i].tokens) for i in range(20))


def test_an_epoch_holds_every_token_once_and_documents_stay_whole(samples):
    """The windows of one epoch, put back in order, are the documents end to end in a shuffled order."""
    order, ends, shuffle = samples._make_epoch(1)
    windows = {int(place): samples[samples.per_epoch + i] for i, place in enumerate(shuffle)}
    stream = np.concatenate([windows[j].tokens[:16] for j in range(samples.per_epoch)])
    files = samples.files
    expected = np.concatenate([files.tokens[files.boundaries[d] : files.boundaries[d + 1]] for d in order])
    assert np.array_equal(stream, expected[: len(stream)]) and len(expected) - len(stream) <= 16
    assert sorted(order) == list(range(files.num_documents)) and ends[-1] == len(files.tokens)
    for j in range(samples.per_epoch - 1):  # the last token of a window is the first of the next
        assert windows[j].tokens[16] == windows[j + 1].tokens[0]


def test_epochs_have_different_orders(samples):
    assert not np.array_equal(samples._make_epoch(0)[0], samples._make_epoch(1)[0])
    assert not np.array_equal(samples._make_epoch(0)[2], samples._make_epoch(1)[2])


def test_split_is_by_document_and_by_share_of_tokens(byte_data, tiny):
    data = open_dataset(str(byte_data))
    recipe = tiny(data={"valid_fraction": 0.2, "test_fraction": 0.1})
    splits = split_documents(data.files, recipe.data)
    joined = np.concatenate(list(splits.values()))
    assert sorted(joined) == list(range(40))  # every document in one split only
    lengths = np.diff(data.files.boundaries)
    shares = {name: lengths[d].sum() / lengths.sum() for name, d in splits.items()}
    assert shares["valid"] == pytest.approx(0.2, abs=0.05) and shares["test"] == pytest.approx(0.1, abs=0.05)
    assert not np.array_equal(splits["valid"], split_documents(data.files, tiny(data={"seed": 5}).data)["valid"])


def test_a_split_that_is_asked_for_has_a_document_while_training_keeps_one(byte_data, tiny):
    data = open_dataset(str(byte_data))
    for valid, test in ((0.001, 0.0), (0.001, 0.001), (0.98, 0.01)):
        splits = split_documents(data.files, tiny(data={"valid_fraction": valid, "test_fraction": test}).data)
        assert len(splits["valid"]) >= 1 and len(splits["test"]) >= (test > 0) and len(splits["train"]) >= 1
    none = split_documents(data.files, tiny(data={"valid_fraction": 0.0}).data)
    assert not len(none["valid"]) and not len(none["test"]) and len(none["train"]) == 40


def test_split_too_small_for_a_sequence_is_refused(byte_data, tiny):
    data = open_data(tiny().data)
    with pytest.raises(
        DataError,
        match=r"validation split, \d+ of 40 documents, is shorter than one sequence of 4000 "
        r".* raise data\.valid_fraction",
    ):
        open_samples(data, tiny(model={"seq_len": 4000}, data={"valid_fraction": 0.02}))
    with pytest.raises(DataError, match="training split is shorter"):
        open_samples(data, tiny(model={"seq_len": 10**6}))


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
