"""The batches of optimizer steps: cut, filled and stacked here alone, and read one step ahead.

The loader's state is one integer, the samples consumed so far, whatever the number of ranks. What it has read ahead is
read again after a restart.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import ceil, nan
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaresnorm.data.samples import Samples
from megaresnorm.parallel.mesh import ParallelContext


class Batch(NamedTuple):
    """B sequences of S tokens.

    Attributes:
        tokens: [B, S] int64.
        labels: [B, S] int64, the token that follows each one; -1 where there is none to predict.
        samples: [B], their global numbers.
        documents: [B, S], the number of each token's document in its row; None where documents are not kept apart.
    """

    tokens: Tensor
    labels: Tensor
    samples: Tensor
    documents: Tensor | None = None


class SampleRange(NamedTuple):
    """The samples of a step: ``num_samples`` on all ranks of dp together, after ``position`` others."""

    position: int
    num_samples: int

    @property
    def end(self) -> int:
        """The position after the last of them."""
        return self.position + self.num_samples

    @property
    def last(self) -> int:
        """The position of the last of them."""
        return self.end - 1


class StepBatch(NamedTuple):
    """This rank's share of the samples of one optimizer step.

    Attributes:
        microbatches: each one forward and backward pass; for an engine that stacks, one batch of all of them.
        num_microbatches: number of equal parts that a stacking engine cuts its batch into.
        num_valid: labels of this share that are not -1.
        samples: which these are; None for a batch from elsewhere.
        following: the samples of the next step, and what waits for their ``num_valid``; None where nothing is read
            ahead. It gives NaN where they could not be read, which is the error of the step that needs them.
    """

    microbatches: tuple[Batch, ...]
    num_microbatches: int
    num_valid: int
    samples: SampleRange | None = None
    following: tuple[SampleRange, Callable[[], float]] | None = None

    @classmethod
    def of(cls, microbatches: Sequence[Batch], stack: Callable[[int], int] | None = None) -> "StepBatch":
        """Microbatches of one shape from elsewhere than a ``Loader``.

        Args:
            stack: as of ``Loader``.
        """
        num_valid = sum(int((batch.labels >= 0).sum()) for batch in microbatches)
        if stack is None:
            return cls(tuple(microbatches), len(microbatches), num_valid)
        filler = microbatches[0]._replace(labels=torch.full_like(microbatches[0].labels, -1))
        filled = [*microbatches, *[filler] * (stack(len(microbatches)) - len(microbatches))]
        columns: list[Any] = [None if rows[0] is None else torch.cat(rows) for rows in zip(*filled, strict=True)]
        return cls((Batch(*columns),), len(filled), num_valid)


class _Share(NamedTuple):
    """This rank's share of a step in host memory.

    Attributes:
        rows: of all microbatches in their order.
        real: how many of them are not fillers.
    """

    rows: Batch
    real: int


class Loader:
    """Reads this rank's shares of steps. On all ranks alike: they have as many microbatches, all of the same shape.

    Where samples are missing for that, others stand in without labels.

    Args:
        samples: to read from.
        micro: samples of a microbatch; on a single rank the last one may be smaller.
        mask_documents: keep documents apart; the first token of the next document is then no label.
        stack: number of microbatches -> how many an engine needs, which takes them as one batch; None: one by one.
    """

    def __init__(
        self,
        samples: Samples,
        seq_len: int,
        context: ParallelContext,
        device: torch.device,
        *,
        micro: int,
        mask_documents: bool = False,
        stack: Callable[[int], int] | None = None,
    ) -> None:
        self._samples, self._seq_len, self._context, self._device = samples, seq_len, context, device
        self._micro, self._mask_documents, self._stack = micro, mask_documents, stack
        self._ahead: tuple[SampleRange, _Share, Future[int]] | None = None

    def load(self, samples: SampleRange) -> StepBatch:
        """The share of these samples."""
        share = self._make_room(samples, pinned=False)
        return self._batch(samples, share, self._fill(share))

    def step(self, samples: SampleRange, following: SampleRange | None) -> StepBatch:
        """The share of these samples, while a thread begins to read those of the next step.

        Args:
            following: of the next step; None after the last.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == samples:
            batch = self._batch(samples, ahead[1], ahead[2].result())
        else:
            batch = self.load(samples)
        if following is None:
            return batch
        share, counted = self._make_room(following, pinned=self._device.type == "cuda"), Future[int]()
        self._ahead = following, share, counted
        # A thread of its own, since an executor's would be waited for at the end of the process. It works in NumPy
        # alone, which may be ended at any time.
        threading.Thread(target=self._fill_ahead, args=(share, counted), name="loader", daemon=True).start()
        return batch._replace(following=(following, lambda: nan if counted.exception() else counted.result()))

    def _make_room(self, samples: SampleRange, *, pinned: bool) -> _Share:
        data, (position, count) = self._context.dp, samples
        numbers = list(range(position + data.rank, position + count, data.size))
        real, wanted = len(numbers), len(numbers)
        if self._context.world.size > 1:
            wanted = ceil(ceil(count / data.size) / self._micro) * self._micro
        if self._stack is not None:
            wanted = self._stack(ceil(wanted / self._micro)) * self._micro
        shape = wanted, self._seq_len
        tokens, labels = (torch.empty(shape, dtype=torch.int64, pin_memory=pinned) for _ in range(2))
        documents = torch.empty(shape, dtype=torch.int64, pin_memory=pinned) if self._mask_documents else None
        return _Share(Batch(tokens, labels, torch.tensor(numbers + [position] * (wanted - real)), documents), real)

    def _fill(self, share: _Share) -> int:
        """Read the samples, and count the labels that are not -1."""
        tokens, labels, numbers = (tensor.numpy() for tensor in share.rows[:3])
        documents = None if share.rows.documents is None else share.rows.documents.numpy()
        line = np.empty(self._seq_len + 1, dtype=np.int64)
        numbered = None if documents is None else np.empty_like(line)
        for row, number in enumerate(numbers):
            self._samples.read(int(number), line, numbered)
            tokens[row], labels[row] = line[:-1], line[1:]
            if documents is not None and numbered is not None:
                documents[row] = numbered[:-1]
                labels[row, numbered[1:] != numbered[:-1]] = -1
        labels[share.real :] = -1
        return int((labels >= 0).sum())

    def _fill_ahead(self, share: _Share, counted: "Future[int]") -> None:
        try:
            counted.set_result(self._fill(share))
        except BaseException as e:  # noqa: BLE001  (raised in the thread that needs the samples)
            counted.set_exception(e)

    def _batch(self, samples: SampleRange, share: _Share, num_valid: int) -> StepBatch:
        moved: list[Any] = [None if t is None else t.to(self._device, non_blocking=True) for t in share.rows]
        rows = Batch(*moved)
        if self._stack is not None:
            return StepBatch((rows,), len(rows.tokens) // self._micro, num_valid, samples)
        parts: Any = zip(*(_split(t, self._micro, len(rows.tokens)) for t in rows), strict=True)
        microbatches = tuple(Batch(*part) for part in parts)
        return StepBatch(microbatches, len(microbatches), num_valid, samples)


def _split(tensor: Tensor | None, size: int, total: int) -> tuple[Tensor | None, ...]:
    """Slices of ``size`` rows, or as many times None."""
    return (None,) * ceil(total / size) if tensor is None else tensor.split(size)
