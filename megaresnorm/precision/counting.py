"""How many numbers of a tensor a format of fewer bits cannot hold, counted by class of tensor and by block.

Nothing here waits for a device until all ranks have been asked.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.fp8.formats import LARGEST
from megaresnorm.parallel.collectives import all_reduce, largest
from megaresnorm.parallel.mesh import ParallelContext

CLASSES = ("input", "weight", "gradient")  # of the tensors that a linear layer's products read
INPUT, WEIGHT, GRADIENT = range(3)


class Counts(NamedTuple):
    """Of one tensor.

    Attributes:
        elements: how many there are.
        amax: the largest |element|, a scalar FP32; NaN where there is one.
        others: [3] int64: elements that are not zero, that are saturated, that have underflown.
    """

    elements: int
    amax: Tensor
    others: Tensor


def count(x: Tensor, read: Tensor, limit: Tensor | None = None) -> Counts:
    """Count what is lost of x in the format that products read it in.

    Saturated are elements that are infinite, that FP8 has clamped (beyond ``limit``), or that are the largest number of
    a 16-bit type. Underflown are elements other than zero that are zero in FP8, or below the smallest normal number of
    a 16-bit type, where bits are lost.

    Args:
        x: values.
        read: x in that format: codes of FP8, or a tensor of a 16-bit type, which may be x itself.
        limit: FP32, of codes with a scale that is not of x itself: the largest number that they can be.

    >>> count(torch.tensor([0.0, 1e-7, 2.0, 65504.0]), torch.tensor([0.0, 1e-7, 2.0, 65504.0]).half()).others.tolist()
    [3, 1, 1]
    """
    size = x.abs()
    if read.dtype in LARGEST:
        lost = (read.view(torch.uint8) & 0x7F) == 0  # but for the sign
        clamped = size.isinf() if limit is None else size.isinf() | (size > limit)
    else:
        form, found = torch.finfo(read.dtype), size if read is x else read.abs()
        lost, clamped = found < form.smallest_normal, found >= form.max
    nonzero = torch.count_nonzero(x)
    underflown = torch.count_nonzero(lost) - (x.numel() - nonzero)  # a zero is zero in all formats
    amax = size.amax().float() if x.numel() else size.new_zeros((), dtype=torch.float32)
    return Counts(x.numel(), amax, torch.stack((nonzero, torch.count_nonzero(clamped), underflown)))


class Tally:
    """The counts of one step on this rank, by block and class.

    Args:
        num_blocks: of the whole model.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self._elements = [[0] * len(CLASSES) for _ in range(num_blocks)]
        self._amax = torch.zeros(num_blocks, len(CLASSES), device=device)
        self._others = torch.zeros(num_blocks, len(CLASSES), 3, dtype=torch.int64, device=device)

    def add(self, block: int, which: int, counts: Counts) -> None:
        """Add those of a tensor.

        Args:
            which: INPUT, WEIGHT or GRADIENT.
        """
        self._elements[block][which] += counts.elements
        self._others[block, which] += counts.others.to(self._others.device)  # weights may be in host memory
        amax = self._amax[block, which]
        torch.maximum(amax, counts.amax.to(amax.device), out=amax)

    def over_ranks(self, context: ParallelContext) -> "Seen":
        """The shares over all ranks. Collective. Waits for the device.

        Communication:
            One all-reduce of 4 numbers FP64 for each block and class over all ranks; of one number FP32 an all-gather
            over model_shards, one over dp_replicate and one over pp.
        """
        elements = torch.tensor(self._elements, dtype=torch.float64).to(self._others.device)
        counts = torch.cat((elements.unsqueeze(-1), self._others.double()), -1)
        amax = self._amax
        for axis in (context.model_shards, context.dp_replicate, context.pp):
            amax = largest(amax, axis)
        found = all_reduce(counts, context.world).permute(2, 1, 0).tolist()
        elements_of, nonzero_of, saturated_of, underflown_of = found
        return Seen(
            _by_class(amax.t().tolist()),
            _by_class(_shares(saturated_of, elements_of)),
            _by_class(_shares(underflown_of, nonzero_of)),
        )


class Seen(NamedTuple):
    """What all ranks have seen in a step: class -> a number for each block of the model.

    Attributes:
        amax: the largest |element|.
        saturated: share of the elements; None where there were none.
        underflown: share of the elements other than zero, likewise.
    """

    amax: Mapping[str, list[float]]
    saturated: Mapping[str, list[float | None]]
    underflown: Mapping[str, list[float | None]]


def _shares(parts: list[list[float]], wholes: list[list[float]]) -> list[list[float | None]]:
    pairs = (zip(*both, strict=True) for both in zip(parts, wholes, strict=True))
    return [[part / whole if whole else None for part, whole in blocks] for blocks in pairs]


def _by_class(lists: list) -> dict:
    return dict(zip(CLASSES, lists, strict=True))
