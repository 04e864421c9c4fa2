"""Memory that is used again and again, so that what watches a model takes none anew for each layer."""

import torch
from torch import Tensor


class Scratch:
    """Tensors by name, shape and type, whose values last until the next one of that name is asked for.

    Fresh memory of the size of a layer's activations costs a CPU more than what is computed in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor, whose values are left over."""
        key = name, shape, dtype
        if key not in self._known:
            self._known[key] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._known[key]
