"""Stochastic rounding: unbiased, harmless to what is no number, and by bits that depend on nothing but the place."""

import pytest
import torch

from megaresnorm.kernels.hashing import hash_elements, hash_number, numbered
from megaresnorm.kernels.rounding import rounded_at_random

UPDATES = 4096


def bits_of(shape: tuple[int, int], updates: int = UPDATES) -> torch.Tensor:
    """[updates, *shape] of one weight."""
    keys = numbered(torch.tensor([-(2**61) + 12345]), hash_number(torch.arange(updates)))
    return hash_elements(hash_number(torch.arange(shape[0])), torch.arange(shape[1]), keys)


def test_the_mean_over_many_updates_is_the_number():
    """Also of negative, tiny and large ones; the standard error is half a distance of neighbours over sqrt(UPDATES)."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 16)
    rounded = rounded_at_random(x.expand(UPDATES, 8, 16), bits_of((8, 16))).double()
    lower, upper = rounded.amin(0), rounded.amax(0)
    spacing = 2.0 ** (torch.frexp(x)[1].double() - 8)
    assert ((upper - lower) <= spacing).all() and ((lower <= x) & (x <= upper)).all(), "one of the two neighbours"
    error = (rounded.mean(0) - x) / spacing
    assert error.abs().max() < 5 * 0.5 / UPDATES**0.5
    assert abs(error.mean()) < 5 * 0.5 / (UPDATES * x.numel()) ** 0.5


def test_numbers_of_bf16_are_never_moved():
    """All of them, so that a step that is refused leaves every weight as it was."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    for fill in (0, 0xFFFF, -1):
        again = rounded_at_random(every.float(), torch.full(every.shape, fill, dtype=torch.int32))
        finite = ~every.isnan()
        assert torch.equal(again[finite].view(torch.int16), every[finite].view(torch.int16))
        assert again[~finite].isnan().all()


@pytest.mark.parametrize("fill", [0, 0x8000, 0xFFFF])
def test_nan_and_infinity_stay_and_the_largest_number_does_not_become_infinite(fill):
    nan = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, -0x400000, 0x7F810000], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all() and rounded_at_random(nan, torch.full((5,), fill, dtype=torch.int32)).isnan().all()
    most, largest = torch.finfo(torch.float32).max, torch.finfo(torch.bfloat16).max
    x = torch.tensor([torch.inf, -torch.inf, most, -most, largest, -largest, 0.0, -0.0])
    wanted = [torch.inf, -torch.inf, largest, -largest, largest, -largest, 0.0, 0.0]
    assert rounded_at_random(x, torch.full((8,), fill, dtype=torch.int32)).tolist() == wanted


def test_bits_of_neighbouring_elements_updates_and_weights_are_independent():
    """Each of the 16 bits is fair, and equal to that of the next row, column, update or weight half of the time."""
    bits = bits_of((64, 64), 16)
    rows, numbers = hash_number(torch.arange(64)), hash_number(torch.arange(16))
    other = hash_elements(rows, torch.arange(64), numbered(torch.tensor([5]), numbers))
    planes = torch.stack([(bits >> i) & 1 for i in range(16)]).double()
    error = 5 * 0.5 / planes[0].numel() ** 0.5
    assert (planes.flatten(1).mean(1) - 0.5).abs().max() < error
    for dim in (1, 2, 3):
        same = planes.narrow(dim, 0, planes.shape[dim] - 1) == planes.narrow(dim, 1, planes.shape[dim] - 1)
        assert (same.double().flatten(1).mean(1) - 0.5).abs().max() < 1.1 * error, dim
    same = planes == torch.stack([(other >> i) & 1 for i in range(16)])
    assert (same.double().flatten(1).mean(1) - 0.5).abs().max() < error


def test_a_part_of_a_matrix_has_the_bits_of_its_global_rows_and_columns():
    whole = hash_elements(hash_number(torch.arange(40)), torch.arange(24), torch.tensor([7, -9]))
    rows, columns = torch.tensor([3, 4, 30, 39]), torch.arange(8, 16)
    assert torch.equal(hash_elements(hash_number(rows), columns, torch.tensor(-9)), whole[1][rows][:, columns])


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits_and_rounds_alike():
    bits = bits_of((64, 32), 8)
    rows, columns, updates = (torch.arange(n, device="cuda") for n in (64, 32, 8))
    keys = numbered(torch.tensor([-(2**61) + 12345], device="cuda"), hash_number(updates))
    there = hash_elements(hash_number(rows), columns, keys)
    assert torch.equal(there.cpu(), bits)
    x = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0, :3] = torch.tensor([torch.nan, torch.inf, torch.finfo(torch.float32).max])
    here = rounded_at_random(x, bits)
    assert torch.equal(rounded_at_random(x.cuda(), there).cpu().nan_to_num(), here.nan_to_num())
