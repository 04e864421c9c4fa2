"""Host memory for copies of a GPU's tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaresnorm.pinned import pin

ARENA = 1 << 30  # bytes that are pinned at a time
ALIGNMENT = 256


class HostCopies:
    """Memory on the host for tensors of the same shapes and types, pinned where they are copies of a GPU's.

    torch pins tensor by tensor, which can take seconds for each GB. Here many tensors lie in one piece of memory, which
    is pinned as it is, until this object is gone. Where that fails copies are slower, no more.

    Attributes:
        tensors: in the order of what they are copies of.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self.tensors: list[Tensor] = []
        for group in _groups([-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in sources]):
            memory = torch.empty(sum(size for _, size in group), dtype=torch.uint8)
            if memory.nbytes and any(_on_gpu(sources[i]) for i, _ in group):
                pin(memory, self)
            start = 0
            for i, size in group:
                like = sources[i]
                self.tensors.append(memory[start : start + like.nbytes].view(like.dtype).view(like.shape))
                start += size


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _groups(sizes: Sequence[int]) -> list[list[tuple[int, int]]]:
    """(index, size) of the tensors of each piece, in order; a piece has at most ARENA bytes or one tensor."""
    groups: list[list[tuple[int, int]]] = []
    room = -1
    for i, size in enumerate(sizes):
        if size > room:
            groups.append([])
            room = ARENA
        groups[-1].append((i, size))
        room = max(room - size, 0)
    return groups
