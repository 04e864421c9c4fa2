"""Data parallelism with whole copies whose messages stay the same: of weights in BF16, and of three copies on CPUs.

DistributedDataParallel gives its messages the type of the weights and refuses gradients of another, and it makes them
anew after the first step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.wide import no_gradient

BUCKET = 25 << 20  # bytes of a message, as DDP has it: large enough for its bandwidth, small enough to begin early


class Replicas(nn.Module):
    """A model whose gradients are summed over the ranks that have a copy of it, in their own type.

    The gradients of a message become views of it, and gradients need no memory beside that of one message more.

    Args:
        model: with memory.
        data: the axis to sum over.

    Attributes:
        module: the model.
    """

    def __init__(self, model: nn.Module, data: Axis) -> None:
        super().__init__()
        self.module, self._group = model, data.group
        self._buckets = _buckets([p for p in reversed(list(model.parameters())) if p.requires_grad])
        self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] | None = None  # gradients that each bucket waits for; None: nothing is to be summed
        self._sent: list[dist.Work] = []
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What the model returns."""
        return self.module(*arguments, **options)

    @contextmanager
    def summed(self, last: bool) -> Iterator[None]:
        """Goes around the backward pass of a microbatch, of which the last one's sums are complete afterwards.

        Communication:
            In the last microbatch one all-reduce of each bucket as soon as backward has completed it and those before
            it; together they are all gradients. A parameter without a gradient counts as zeros.
        """
        self._sent, self._missing = [], [len(bucket) for bucket in self._buckets] if last else None
        yield
        if self._missing is None:
            return
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)
        for work in self._sent:
            work.wait()
        self._sent, self._missing = [], None

    def _ready(self, parameter: Tensor) -> None:
        if self._missing is None:
            return
        self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
        # In one order on all ranks, however the last gradients of two buckets follow each other.
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send(self._buckets[len(self._sent)])

    @torch.no_grad()
    def _send(self, bucket: list[nn.Parameter]) -> None:
        gradients = [no_gradient(p) if p.grad is None else p.grad for p in bucket]
        message = torch.cat([gradient.flatten() for gradient in gradients]) if len(bucket) > 1 else gradients[0]
        work = dist.all_reduce(message, group=self._group, async_op=True)
        assert work is not None
        self._sent.append(work)
        parts = message.flatten().split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(bucket, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def _buckets(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters with gradients of about BUCKET bytes together."""
    found: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = 4 * parameter.numel()
        if size > room:
            found.append([])
            room = BUCKET
        found[-1].append(parameter)
        room -= size
    return found
