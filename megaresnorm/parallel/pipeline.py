"""One batch through torch.distributed.pipelining, which takes a second to import: only runs with stages do."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining._backward import stage_backward

from megaresnorm.kernels.cross_entropy import one_for
from megaresnorm.parallel.data_parallel import accumulate_in_shards
from megaresnorm.parallel.linear import WeightGradQueue
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.replicas import Replicas
from megaresnorm.parallel.stages import smallest_batch

SCHEDULES: dict[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
}


class Pipeline:
    """The stages of this rank and their schedule.

    One schedule object serves one number of microbatches of one shape; the last one is kept.

    Args:
        modules: this rank's stages by number, called as module(*received, **arguments); every stage but the last
            returns a tuple of tensors, each with a gradient, which the next stage receives.
        num_stages: number of stages on all ranks.
        axis: the pipeline axis.
        schedule: one of ``SCHEDULES``.
        wire: (samples of a microbatch, tokens of each) -> what goes from one stage to the next, on the meta device.
        shards_gradients: whether FSDP2 reduces and scatters the gradients of every microbatch. Otherwise whole ones are
            kept until the last.

    Attributes:
        is_first, is_last: whether this rank has the first stage, or the last.
        queue: weight gradients that the stages' layers leave for later (``queue_weight_grads``); None: they leave none.
            These schedules compute them as soon as a microbatch's backward pass is through, before its receive buffers,
            which they may read, are used again.
    """

    def __init__(
        self,
        modules: dict[int, nn.Module],
        num_stages: int,
        axis: Axis,
        schedule: str,
        wire: Callable[[int, int], tuple[Tensor, ...]],
        device: torch.device,
        *,
        shards_gradients: bool = True,
    ) -> None:
        self._modules, self._num_stages, self._axis = modules, num_stages, axis
        self._schedule, self._wire, self._device = schedule, wire, device
        self._shards_gradients = shards_gradients
        self._made: tuple[tuple[int, int, int], Any] | None = None
        self.is_first, self.is_last = 0 in modules, num_stages - 1 in modules
        self.queue: WeightGradQueue | None = None

    def num_microbatches(self, count: int) -> int:
        """Number of microbatches that the schedule needs for a batch of ``count``.

        Those beyond ``count`` are fillers without labels, so that small batches are possible, if not fast.
        """
        return smallest_batch(count, self._axis.size, self._schedule)

    def run(
        self,
        tokens: Tensor,
        labels: Tensor,
        num_microbatches: int,
        loss: Callable[[Any], Tensor],
        *,
        backward: bool,
        **arguments: Any,
    ) -> None:
        """One batch through all stages, forward and (for gradients) backward, in equal microbatches.

        Args:
            tokens: [M * B, S] for M microbatches.
            labels: likewise.
            loss: what the last stage returns for a microbatch -> the objective; called on that stage alone.
            backward: False for evaluation.
            **arguments: given to every stage, as tokens and labels are; tensors are split along dim 0 like these.

        Communication:
            For each microbatch the tensors of ``wire`` from every stage to the next, a message each; in backward as
            many of the same sizes from every stage to the one before it.

        Raises:
            ValueError: the batch does not divide into equal microbatches. It is raised before anything is sent, since
                gloo would abort the process.
        """
        if tokens.shape != labels.shape or tokens.shape[0] % num_microbatches:
            raise ValueError(
                f"tokens {list(tokens.shape)} and labels {list(labels.shape)} are not {num_microbatches} equal "
                "microbatches"
            )
        schedule = self.schedule_for(num_microbatches, tokens.shape[0] // num_microbatches, tokens.shape[1])
        schedule._loss_fn = lambda output, labels: loss(output)
        for stage in stages_in(schedule):
            stage.queue = self.queue
        if self.queue is not None:
            self.queue.clear()  # an error in the batch before may have left something
        received = (tokens,) if self.is_first else ()
        options = {"target": labels if self.is_last else None, "tokens_BS": tokens, "labels_BS": labels, **arguments}
        if backward:
            schedule.step(*received, **options, return_outputs=False)
        else:
            schedule.eval(*received, **options, return_outputs=False)

    def schedule_for(self, count: int, batch: int, seq: int) -> Any:
        """torch's schedule for so many microbatches of ``batch`` sequences of ``seq`` tokens."""
        key = (count, batch, seq)
        if self._made is None or self._made[0] != key:
            self._made = None  # its buffers go before new ones come
            stages = [self._stage(number, batch, seq) for number in self._modules]
            one = stages if self._schedule == "interleaved" else stages[0]
            schedule = SCHEDULES[self._schedule](one, n_microbatches=count, loss_fn=_no_loss, scale_grads=False)
            self._made = key, schedule
        return self._made[1]

    def _stage(self, number: int, batch: int, seq: int) -> PipelineStage:
        wire = tuple(tensor.requires_grad_() for tensor in self._wire(batch, seq))
        tokens = torch.empty((batch, seq), dtype=torch.int64, device="meta")
        kind = _LastStage if number == self._num_stages - 1 else _Stage
        stage = kind(
            self._modules[number],
            number,
            self._num_stages,
            self._device,
            input_args=(tokens,) if number == 0 else wire,
            output_args=wire,
            group=self._axis.group,
        )
        stage.shards_gradients = self._shards_gradients
        return stage


def stages_in(schedule: Any) -> "list[_Stage]":
    """The stages that this rank has in one of torch's schedules."""
    return getattr(schedule, "_stages", None) or [schedule._stage]


class _Buffers:
    """Receive buffers of a stage, for activations or for gradients: only as many as are in use at once.

    A microbatch takes its buffers and gives them back.

    Args:
        infos: torch's receive infos by microbatch, of which only the first is made. The others are copied from it, and
            all of them are left without memory.
    """

    def __init__(self, infos: dict[int, tuple[Any, ...]], num_microbatches: int, device: torch.device) -> None:
        self._infos, self._device = infos, device
        self._free: list[list[Tensor]] = []
        self._taken: dict[int, list[Tensor]] = {}
        for info in infos[0]:
            if getattr(info, "buffer", None) is not None:
                info.buffer = info.buffer.detach().to("meta")
        for microbatch in range(1, num_microbatches):
            infos[microbatch] = tuple(copy(info) for info in infos[0])

    def take(self, microbatch: int, *, requires_grad: bool) -> None:
        """Give a microbatch memory to receive into, as new tensors on it, so that their ``grad`` is its own."""
        received = [info for info in self._infos[microbatch] if getattr(info, "buffer", None) is not None]
        if not received or microbatch in self._taken:
            return
        memory = self._free.pop() if self._free else [torch.empty_like(i.buffer, device=self._device) for i in received]
        self._taken[microbatch] = memory
        for info, tensor in zip(received, memory, strict=True):
            info.buffer = tensor.detach().requires_grad_(requires_grad)

    def give_back(self, microbatch: int) -> None:
        if (memory := self._taken.pop(microbatch, None)) is not None:
            self._free.append(memory)

    def give_back_all(self) -> None:
        for microbatch in list(self._taken):
            self.give_back(microbatch)


class _Stage(PipelineStage):
    """A stage that keeps as many receive buffers as it has microbatches under way.

    torch's own keeps one for every microbatch and direction: 69 GB for 256 microbatches of 4,096 tokens of width 8,192.
    Under 1F1B stage s of pp needs pp - s for activations and one for gradients.
    """

    shards_gradients = True
    queue: WeightGradQueue | None = None

    def _prepare_forward_infra(self, num_microbatches: int, *arguments: Any, **options: Any) -> Any:
        result = super()._prepare_forward_infra(1, *arguments, **options)
        self._activations = _Buffers(self.args_recv_info, num_microbatches, self.device)
        return result

    def _prepare_backward_infra(self, num_microbatches: int, *arguments: Any, **options: Any) -> Any:
        result = super()._prepare_backward_infra(1, *arguments, **options)
        self.chunks = num_microbatches
        self._gradients = _Buffers(self.grad_recv_info, num_microbatches, self.device)
        return result

    def clear_runtime_states(self) -> None:
        """Called before a batch. It also drops what an error has left of the batch before."""
        self.fwd_cache.clear()
        self.output_chunks.clear()
        for kind in ("_activations", "_gradients"):
            if hasattr(self, kind):
                getattr(self, kind).give_back_all()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._activations.take(fwd_chunk_id, requires_grad=self.has_backward)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **options)
        if self.is_last:  # else the logits of every microbatch would stay
            self._forget_in_evaluation(fwd_chunk_id)
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        operations = [] if self.is_last else super().get_fwd_send_ops(fwd_chunk_id)
        self._forget_in_evaluation(fwd_chunk_id)
        return operations

    def _forget_in_evaluation(self, microbatch: int) -> None:
        """In evaluation nothing of a microbatch that is through is used again: drop it."""
        if not self.has_backward:
            self.fwd_cache.pop(microbatch, None)
            self._activations.give_back(microbatch)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward:
            self._gradients.take(bwd_chunk_id, requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        """Schedules call it in evaluation as well."""
        super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        if self.queue is not None:
            self.queue.run()
        if self.has_backward:
            self._activations.give_back(bwd_chunk_id)
            self._gradients.give_back(bwd_chunk_id)

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict, last_backward: bool = False
    ) -> tuple[tuple[Tensor | None, ...], list[dict[str, Any]] | None]:
        """Reduce and scatter gradients in each microbatch; torch's own has FSDP2 keep whole ones until the last."""
        if bwd_kwargs["output_grads"] is None:  # of the objective
            bwd_kwargs = {**bwd_kwargs, "output_grads": one_for(bwd_kwargs["stage_output"])}
        if isinstance(self.submod, Replicas):
            with self.submod.summed(last_backward):
                return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        if not (self.shards_gradients and isinstance(self.submod, FSDPModule)):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        assert backward_type == "full"
        self.submod.set_is_last_backward(last_backward)
        self.submod.set_reshard_after_backward(False)
        accumulate_in_shards(self.submod, last_backward, sharded=True)
        inputs = stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"])
        return inputs, None


class _LastStage(_Stage):
    """The last stage, whose output is never sent, so that its shape does not matter.

    torch 2.11 would compare it with what is sent all the same.
    """

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        pass


def _no_loss(logits: Tensor, labels: Tensor) -> Tensor:
    raise AssertionError("every batch brings its own")
