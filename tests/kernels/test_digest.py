"""Digests of tensors: what they see, that position, shape and every bit count, and that CPUs and GPUs agree."""

import itertools
import random

import pytest
import torch

from megaresnorm.kernels.digest import PIECE, digest

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.uint8, torch.complex64,
]  # fmt: skip


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    numbers = torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) * 50
    return numbers.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7)], ids=str)
def test_every_single_flipped_bit_changes_the_digest(dtype, shape):
    x = some(dtype, *shape)
    before, data = digest(x).item(), x.reshape(-1).view(torch.uint8)
    seen = {before}
    for byte, bit in itertools.product(range(len(data)), range(8)):
        data[byte] ^= 1 << bit
        seen.add(digest(x).item())
        data[byte] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(data)
    assert digest(x).item() == before


@pytest.mark.parametrize("length", [PIECE * 2 - 1, PIECE * 2, PIECE * 2 + 1, PIECE * 6 + 3])
def test_a_flipped_bit_is_seen_in_every_piece_and_at_its_edges(length):
    x = torch.randn(length)
    before, data = digest(x).item(), x.view(torch.int32)
    edges = {0, length - 1, *(n for n in (2 * PIECE - 1, 2 * PIECE, 6 * PIECE, 6 * PIECE - 1) if n < length)}
    for at in edges:
        for bit in (0, 17, 31):
            data[at] ^= torch.tensor(1 << bit).to(torch.int32)
            assert digest(x).item() != before
            data[at] ^= torch.tensor(1 << bit).to(torch.int32)
    assert digest(x).item() == before


def test_two_swapped_words_change_the_digest_also_where_only_their_signs_differ():
    x = torch.arange(1, 41).double()
    before = digest(x).item()
    for a, b in itertools.combinations(range(40), 2):
        y = x.clone()
        y[a], y[b] = x[b], x[a]
        assert digest(y).item() != before
    signs = torch.tensor([1.0, -1.0]).double().repeat(20)
    assert digest(signs).item() != digest(-signs).item()


def test_pairs_of_flipped_bits_change_the_digest_also_those_of_highest_bits():
    chance, x = random.Random(3), torch.randn(PIECE * 2 + 10).double()
    before, words = digest(x).item(), x.view(torch.int64)
    for bits in [(63, 63)] * 100 + [(chance.randrange(64), chance.randrange(64)) for _ in range(100)]:
        places = chance.sample(range(len(words)), 2)
        for at, bit in zip(places, bits, strict=True):
            words[at] ^= torch.tensor(-(1 << 63) if bit == 63 else 1 << bit)
        assert digest(x).item() != before
        for at, bit in zip(places, bits, strict=True):
            words[at] ^= torch.tensor(-(1 << 63) if bit == 63 else 1 << bit)
    assert digest(-x).item() != before


def test_zeros_of_different_shapes_and_lengths_have_different_digests():
    shapes = [(), (0,), (1,), (2,), (7,), (8,), (2, 3), (3, 2), (6,), (0, 4), (4, 0), (1, 6), (PIECE * 2,)]
    assert len({digest(torch.zeros(shape)).item() for shape in shapes}) == len(shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_layout_and_offset_do_not_matter(dtype):
    x = some(dtype, 300, 301)
    wanted = digest(x.clone()).item()
    assert digest(x.t().contiguous().t()).item() == wanted
    for offset in (1, 2, 3, 8):
        store = torch.empty(offset + x.numel(), dtype=dtype)
        view = store[offset:].view(x.shape)
        view.copy_(x)
        assert digest(view).item() == wanted


def test_a_digest_leaves_the_tensor_and_its_gradient_alone():
    x = torch.randn(PIECE * 3, requires_grad=True)
    before = x.detach().clone()
    assert not digest(x).requires_grad and torch.equal(x, before)


def test_a_known_digest_stays_what_it_was():
    assert digest(torch.arange(100_000)).item() == -7794622306765301723


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpus_have_the_digests_of_cpus(dtype):
    for shape in ((), (0,), (3,), (5, 7), (PIECE + 1, 129)):
        x = some(dtype, *shape)
        assert digest(x.cuda()).item() == digest(x).item()
