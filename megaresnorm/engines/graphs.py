"""Forward and backward of a whole microbatch as one CUDA graph: the host launches one thing instead of thousands.

A graph repeats the same kernels on the same memory. So everything that changes from one microbatch to the next is
copied into tensors that stay: tokens, labels, sample numbers (of which dropout masks are a hash), and the number that
the loss is multiplied by. Gradients are added to tensors that stay (``Optimizer.keep_gradients``), and losses to a sum
on the device. Nothing inside waits for the device.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megaresnorm.data.loader import Batch

WARMUPS = 3  # passes as they are before the recording: libraries make their workspaces, compilers compile


class Recorder(Protocol):
    """Makes graphs of functions."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function as it will be recorded."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function, which need not be run by that, and return what replays it."""


class MicrobatchGraph:
    """Runs microbatches of one shape, the first one's, by replaying a graph; others run as they are.

    Args:
        run: (microbatch, scale) -> sum of its losses; adds its gradients times ``scale``, a tensor on the device.
        recorder: None: a ``CudaRecorder``.
    """

    def __init__(
        self,
        run: Callable[[Batch, Tensor], Tensor],
        device: torch.device,
        recorder: Recorder | None = None,
    ) -> None:
        self._run, self._recorder = run, recorder or CudaRecorder(device)
        self._loss, self._scale = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
        self._static: Batch | None = None
        self._passes = 0
        self._replay: Callable[[], None] | None = None

    def accumulate(self, microbatches: tuple[Batch, ...], scale: float) -> Tensor:
        """Sum of the losses of a step's microbatches, FP64 on the device; their gradients are added up."""
        self._loss.zero_()
        self._scale.fill_(scale)
        for batch in microbatches:
            if self._fits(batch):
                self._next(batch)
            else:
                self._loss += self._run(batch, self._scale)
        return self._loss.clone()

    def _fits(self, batch: Batch) -> bool:
        if self._static is None:
            self._static = Batch(*(None if t is None else torch.empty_like(t) for t in batch))  # type: ignore[arg-type]
        kinds = ([None if t is None else (t.shape, t.dtype) for t in each] for each in (batch, self._static))
        return next(kinds) == next(kinds)

    def _next(self, batch: Batch) -> None:
        assert self._static is not None
        for static, new in zip(self._static, batch, strict=True):
            if static is not None and new is not None:
                static.copy_(new, non_blocking=True)
        if self._replay is None and self._passes == WARMUPS:
            self._replay = self._recorder.record(self._add_static)
        if self._replay is None:
            self._recorder.warm_up(self._add_static)
        else:
            self._replay()
        self._passes += 1

    def _add_static(self) -> None:
        assert self._static is not None
        self._loss += self._run(self._static, self._scale)


class CudaRecorder:
    """Records functions as CUDA graphs, on the stream on which they are warmed up.

    Gradients are added on the stream of a parameter's first pass: that must be the one that is recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run a function on that stream, after all that the current one has been given, and before what it gets."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See ``Recorder``; the function is not run."""
        graph = torch.cuda.CUDAGraph()
        # Threads that read data or write checkpoints may go on calling CUDA.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            function()
        return graph.replay
