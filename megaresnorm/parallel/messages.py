"""Bytes between ranks: what they tell each other beside tensors. JSON, never pickles."""

import json
from typing import Any

import torch

from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.context import Axis


def exchange(message: Any, axis: Axis) -> list[Any]:
    """Every rank's message, anything that JSON can hold, in the order of the ranks.

    All ranks of the axis, whose group is on CPUs, must call it.
    """
    if axis.group is None:
        return [message]
    data = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = all_gather_blocks(torch.tensor([len(data)]), axis).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[: len(data)] = data
    everyone = all_gather_blocks(padded, axis)
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(everyone, sizes, strict=True)]
