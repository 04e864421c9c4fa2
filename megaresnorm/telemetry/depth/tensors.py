"""Parameters by block and by what they are for."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from megaresnorm.model.specs import ParameterSpec

CLASSES = ("qkv", "out", "ffn_in", "ffn_out", "norm", "other")  # of a block's; other: learned and token gates
OUTER = ("embedding", "head")  # beside the blocks: the embeddings of tokens and positions, and the output matrix
GRADIENT, UPDATE, WEIGHT = range(3)  # columns of sums

_OF_LAYER = {"qkv": "qkv", "out": "out", "gate_up": "ffn_in", "up": "ffn_in", "down": "ffn_out"}


class TensorNorms(Protocol):
    """What an engine measures of single tensors in a step (engines/tensor_norms.py).

    Attributes:
        names: of this rank's parameters.
        gradients: [n] FP64, squares of their gradients; None where the step had none.
    """

    names: list[str]

    @property
    def gradients(self) -> Tensor | None:
        """See above."""

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is multiplied by in backward."""

    def watching(self) -> AbstractContextManager[None]:
        """Measure the step that is made within."""

    def updates(self, lr: float) -> Tensor | None:
        """[n, 2] FP64, squares of the step's update and of the weights before it; None where it was refused."""


def class_of(name: str, spec: ParameterSpec) -> tuple[int | str, str] | None:
    """The block and the class of a parameter; of one outside of blocks one of ``OUTER`` twice; None for other norms.

    Args:
        name: global.
    """
    parts = name.split(".")
    if parts[0] == "blocks":
        layer = parts[-2]
        is_norm = any(part.startswith("norm_") or part in ("q_norm", "k_norm") for part in parts)
        return int(parts[1]), "norm" if is_norm else _OF_LAYER.get(layer, "other")
    role = spec.parts[0].role
    outer = {"embedding": "embedding", "position": "embedding", "head": "head"}.get(role)
    return None if outer is None else (outer, outer)


def places(names: Sequence[str], table: Mapping[str, ParameterSpec], num_blocks: int) -> list[int]:
    """The place of each parameter among the sums: by block those of CLASSES, then OUTER, then what is left out."""
    outer = num_blocks * len(CLASSES)
    found = []
    for name in names:
        match class_of(name, table[name]):
            case (int(block), kind):
                found.append(block * len(CLASSES) + CLASSES.index(kind))
            case (str(), kind):
                found.append(outer + OUTER.index(kind))
            case _:
                found.append(outer + len(OUTER))
    return found


def tensor_sums(norms: TensorNorms, at: Tensor, num_blocks: int, lr: float) -> Tensor:
    """This rank's sums by place [N * CLASSES + OUTER + 1, 3] FP64 of a watched step; NaN where there is none.

    Args:
        at: ``places`` of its parameters.
        lr: of the step.
    """
    size = num_blocks * len(CLASSES) + len(OUTER) + 1
    sums = torch.zeros(size, 3, dtype=torch.float64, device=at.device)
    gradients, updates = norms.gradients, norms.updates(lr)
    if gradients is not None:
        sums[:, GRADIENT].index_add_(0, at, gradients)
    if updates is not None:
        sums[:, UPDATE:].index_add_(0, at, updates)
    return sums
