"""Pipeline parallelism: which blocks a stage has, and one batch through torch.distributed.pipelining."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from megaresnorm.parallel.context import Axis

SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


def split_blocks(num_blocks: int, num_stages: int, *, block: float, first: float, last: float) -> list[range]:
    """Consecutive blocks for every stage, so that the dearest stage is as cheap as can be; no block is dropped.

    block: cost of one.   first, last: what the first and the last stage have beside blocks. A stage without blocks is possible at
    the ends only where these outweigh one.

    >>> split_blocks(10, 4, block=1.0, first=0.0, last=2.0)
    [range(0, 3), range(3, 6), range(6, 9), range(9, 10)]
    """
    extra = [0.0] * num_stages
    extra[0] += first
    extra[-1] += last
    counts = [0] * num_stages
    for _ in range(num_blocks):  # every block to where it hurts least; the earliest of equals
        counts[min(range(num_stages), key=lambda i: (extra[i] + (counts[i] + 1) * block, i))] += 1
    return stage_ranges(counts)


def stage_ranges(counts: Sequence[int]) -> list[range]:
    """Consecutive ranges of these lengths."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stages_of_rank(rank: int, pp: int, num_stages: int) -> list[int]:
    """The stages that a rank of the pipeline has: every pp-th."""
    return list(range(rank, num_stages, pp))


def bubble(pp: int, num_microbatches: int, stages_per_rank: int = 1) -> float:
    """The share of a step in which a rank waits, if all stages cost the same and sending is free:
    (p - 1) / (v m + p - 1). Source: Narayanan et al., arXiv:2104.04473, section 2.2.
    """
    return (pp - 1) / (stages_per_rank * num_microbatches + pp - 1)


class Pipeline:
    """The stages of this rank and their schedule. One schedule object serves one number of microbatches of one shape.

    modules: this rank's stages by number; called as module(received, **arguments).   wire: shape of what goes from one stage to
    the next for a microbatch of so many samples.   dtype: of the wire.
    """

    def __init__(
        self,
        modules: dict[int, nn.Module],
        num_stages: int,
        axis: Axis,
        schedule: str,
        wire: Callable[[int], tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._modules, self._num_stages, self._axis = modules, num_stages, axis
        self._schedule, self._wire, self._dtype, self._device = schedule, wire, dtype, device
        self._made: dict[tuple[int, int, int], Any] = {}
        self.is_first, self.is_last = 0 in modules, num_stages - 1 in modules

    def num_microbatches(self, count: int) -> int:
        """How many a schedule takes where a batch has ``count``: at least one for every stage, interleaved a multiple of pp.

        The others stand in without labels, so that small batches are possible, if not fast.
        """
        least = max(count, self._num_stages)
        return -(-least // self._axis.size) * self._axis.size if self._schedule == "interleaved" else least

    def run(
        self,
        tokens: Tensor,
        labels: Tensor,
        num_microbatches: int,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        backward: bool,
        **arguments: Any,
    ) -> None:
        """One batch through all stages, forward and (for gradients) backward, in equal microbatches.

        tokens, labels: [M * B, S].   arguments: what every stage is told, tensors divided along dim 0 as the tokens are.
        loss: (logits, labels) of a microbatch -> the objective; called on the last stage alone.
        Raises: ValueError for a batch that does not divide, before anything is sent (gloo would abort the process).
        """
        if tokens.shape != labels.shape or tokens.shape[0] % num_microbatches:
            raise ValueError(
                f"tokens {list(tokens.shape)} and labels {list(labels.shape)} are not {num_microbatches} equal microbatches"
            )
        schedule = self._made_for(num_microbatches, tokens.shape[0] // num_microbatches, tokens.shape[1])
        schedule._loss_fn = loss
        received = (tokens,) if self.is_first else ()
        options = {"target": labels if self.is_last else None, "tokens_BS": tokens, **arguments}
        if backward:
            schedule.step(*received, **options, return_outputs=False)
        else:
            schedule.eval(*received, **options)

    def _made_for(self, count: int, batch: int, seq: int) -> Any:
        key = (count, batch, seq)
        if key not in self._made:
            stages = [self._stage(number, batch, seq) for number in self._modules]
            one = stages if self._schedule == "interleaved" else stages[0]
            schedule = SCHEDULES[self._schedule](one, n_microbatches=count, loss_fn=_no_loss, scale_grads=False)
            self._made = dict([*self._made.items()][-3:]) | {key: schedule}
        return self._made[key]

    def _stage(self, number: int, batch: int, seq: int) -> PipelineStage:
        wire = torch.empty(self._wire(batch), dtype=self._dtype, device="meta", requires_grad=True)
        tokens = torch.empty((batch, seq), dtype=torch.int64, device="meta")
        kind = _LastStage if number == self._num_stages - 1 else PipelineStage
        return kind(
            self._modules[number],
            number,
            self._num_stages,
            self._device,
            input_args=(tokens if number == 0 else wire,),
            output_args=(wire,),
            group=self._axis.group,
        )


class _LastStage(PipelineStage):
    """What it returns is never sent: its shape does not matter. torch 2.11 would compare it with what is sent all the same."""

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        pass


def _no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("every batch brings its own")
