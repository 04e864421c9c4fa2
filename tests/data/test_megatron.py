"""Token files and Megatron-Core's own builder: read right, and written byte for byte the same."""

import numpy as np
import pytest
import torch

from megaresnorm.data.indexed import DTYPES, TokenFiles, TokenWriter

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


def documents(dtype, seed=0):
    """Documents of one to four sequences, some of them empty, with tokens over the whole range of the type."""
    rng = np.random.default_rng(seed)
    top = 200 if np.issubdtype(dtype, np.floating) else int(min(np.iinfo(dtype).max, 2**40))
    for _ in range(20):
        lengths = rng.integers(0, 30, rng.integers(1, 5)).tolist()
        yield rng.integers(0, top, sum(lengths), endpoint=True).astype(dtype), lengths


def megatron_files(prefix, dtype, multimodal):
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for tokens, lengths in documents(dtype):
        modes = [i % 2 for i in range(len(lengths))] if multimodal else None
        builder.add_document(
            torch.from_numpy(tokens.astype(np.float64 if dtype == np.float64 else np.int64)), lengths, modes
        )
    builder.finalize(f"{prefix}.idx")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda d: d.__name__)
def test_both_ways(dtype, multimodal, tmp_path):
    megatron_files(tmp_path / "theirs", dtype, multimodal)
    files = TokenFiles(tmp_path / "theirs")
    at = 0
    for d, (tokens, lengths) in enumerate(documents(dtype)):
        assert np.array_equal(files.tokens[files.boundaries[d] : files.boundaries[d + 1]], tokens)
        assert np.diff(files.sequences)[at : at + len(lengths)].tolist() == lengths
        if multimodal:
            assert files.modes[at : at + len(lengths)].tolist() == [i % 2 for i in range(len(lengths))]
        at += len(lengths)
    assert files.num_documents == 20 and len(files.sequences) == at + 1 and (files.modes is None) == (not multimodal)
    with TokenWriter(tmp_path / "ours", dtype) as writer:
        for tokens, lengths in documents(dtype):
            writer.add_document(tokens, lengths, [i % 2 for i in range(len(lengths))] if multimodal else None)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes(), suffix


@pytest.mark.filterwarnings("ignore")
def test_what_prepare_writes_is_what_megatron_would_have_written_and_reads(byte_data, tmp_path):
    ours = TokenFiles(byte_data / "tokens")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=ours.dtype.type)
    for d in range(ours.num_documents):
        builder.add_item(torch.from_numpy(ours.tokens[ours.boundaries[d] : ours.boundaries[d + 1]].astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (byte_data / f"tokens{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = megatron.IndexedDataset(str(byte_data / "tokens"))
    assert all(np.array_equal(read[d], ours.tokens[ours.boundaries[d] : ours.boundaries[d + 1]]) for d in range(40))
