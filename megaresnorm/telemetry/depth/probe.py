"""The dear figures of depth: of a fixed batch, between steps, by passes of their own without dropout.

T tokens (batch * seq)   B batch   S seq   D model dim   N blocks
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.data.loader import Batch, Loader, SampleRange
from megaresnorm.data.samples import Samples
from megaresnorm.model.residual import Residual
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.parallel.branch_input import BranchInput, whole_rows
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import ModelRecipe, Recipe
from megaresnorm.telemetry.depth.figures import quotient, root
from megaresnorm.telemetry.depth.paths import distribution, draws, mean_length, wrap_path
from megaresnorm.telemetry.depth.scores import AttentionWatch, Entropies
from megaresnorm.telemetry.depth.streams import StreamSums, blocks_of
from megaresnorm.telemetry.wrapped import Wrapped


class ProbedEngine(Protocol):
    """What is asked of an engine: the native one has it."""

    @property
    def policy(self) -> Any:
        """Its ``factor`` is what the loss is multiplied by in backward."""

    def probe(self, batch: Batch, *, backward: bool = False) -> None:
        """Run a batch through the model and leave nothing of it behind. Collective."""


def probe_batch(recipe: Recipe, samples: Samples, device: torch.device) -> Batch:
    """The first samples of the run's data on every rank alike: train.micro_batch of them, or one where it is unset."""
    count, seq_len = recipe.train.micro_batch or 1, recipe.model.seq_len
    masked = recipe.data.mask_documents
    alone = Loader(samples, seq_len, ParallelContext.single(), device, micro=count, mask_documents=masked)
    return alone.load(SampleRange(0, count)).microbatches[0]


class DepthProbe:
    """Probes a model on a batch that stays the same.

    Args:
        recipe: of the whole model.
        engine: runs the passes.
        seed: of the paths.
    """

    def __init__(
        self, recipe: ModelRecipe, assembled: Assembled, engine: ProbedEngine, batch: Batch, seed: int
    ) -> None:
        self._recipe, self._assembled, self._engine = recipe, assembled, engine
        self._batch, self._seed = batch, seed
        self._before: Tensor | None = None  # the hidden state at the last probe

    def probe(self, step: int) -> dict[str, Any]:
        """The figures after a step, as a record of depth.jsonl has them. Collective. Changes nothing of the model.

        Communication:
            That of ``Engine.probe``, for one forward pass and one forward and backward pass for each path; one
            all-reduce of 4 numbers FP64 a block over all ranks, one of a number for each path; under ``tokens`` one of
            [N, B, D] over tp.
        """
        start = time.perf_counter()
        collapse, entropies, change = self._forward()
        norms: dict[int, list[float]] = {}
        paths = list(draws(len(SUBLAYERS) * self._recipe.num_blocks, self._seed, step))
        for (length, _), norm in zip(paths, self._along([through for _, through in paths]), strict=True):
            norms.setdefault(length, []).append(norm)
        found = distribution(norms, len(SUBLAYERS) * self._recipe.num_blocks)
        whole = {"model_update": change, "mean_path_length": mean_length(found)}
        whole |= {"seconds": time.perf_counter() - start}
        return {
            "by_block": {"attention_entropy": entropies, "collapse": collapse}, "whole": whole, "paths": found,
        }  # fmt: skip

    @torch.no_grad()
    def _forward(self) -> tuple[list[float | None], list[float | None], float | None]:
        """Collapse and entropy by block, and the change of the model since the last probe."""
        context, num_blocks, device = self._assembled.context, self._recipe.num_blocks, self._assembled.device
        entropies, passing = Entropies(num_blocks, device), _Passing(self._assembled, num_blocks)
        with Wrapped() as wrapped:
            passing.wrap(wrapped)
            AttentionWatch(self._assembled, entropies.see).wrap(wrapped)
            self._engine.probe(self._batch)
        change = torch.zeros(2, dtype=torch.float64, device=device)
        if passing.hidden is not None and context.tp.rank == 0:
            if self._before is not None:
                difference = (passing.hidden - self._before).double()
                change = torch.stack((difference.square().sum(), torch.full_like(change[0], difference.numel())))
            self._before = passing.hidden
        sums = torch.cat((passing.collapse(), entropies.sums), 1).flatten()
        found = all_reduce(torch.cat((sums, change)), context.world).tolist()
        rows = [found[4 * block : 4 * block + 4] for block in range(num_blocks)]
        squares = quotient(found[-2], found[-1])
        return (
            [quotient(total, count) for total, count, _, _ in rows],
            [quotient(total, count) for _, _, total, count in rows],
            None if squares is None else root(squares),
        )

    def _along(self, paths: list[frozenset[int]]) -> list[float]:
        """The norms of the gradient of the stream before the first block along these paths."""
        found = torch.zeros(len(paths), dtype=torch.float64, device=self._assembled.device)
        for number, through in enumerate(paths):
            sums = StreamSums(self._assembled, self._recipe.num_blocks)
            with Wrapped() as wrapped:
                wrap_path(wrapped, self._assembled, through)
                sums.wrap_first(wrapped)
                self._engine.probe(self._batch, backward=True)
            if self._assembled.context.dp.rank == 0:  # all ranks of dp have the same batch
                found[number] = sums.first_gradient()
        squares = all_reduce(found, self._assembled.context.world).tolist()
        return [(root(square) or 0.0) / self._engine.policy.factor for square in squares]


class _Passing:
    """What passes through the blocks of this rank in one forward pass.

    Attributes:
        hidden: what the output matrix reads, [T, D]; None on ranks without it.
    """

    def __init__(self, assembled: Assembled, num_blocks: int) -> None:
        self._assembled, self._layout = assembled, assembled.layout
        self._num_blocks = num_blocks
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}  # of blocks: [B, D] of tokens, [B] of their squares
        self._sequence_of: Tensor | None = None  # of this rank's rows
        self._batch = self._seq = 1
        self.hidden: Tensor | None = None

    def wrap(self, wrapped: Wrapped) -> None:
        """Begin to watch."""
        for model in self._assembled.models.values():
            wrapped.method(model, "run_blocks", self._around_blocks)
            wrapped.method(model, "finish", self._around_finish)
        for number, block in blocks_of(self._assembled):
            residual = block.sublayers[-1]
            wrapped.method(residual, "close", self._around_close(number, residual))

    def collapse(self) -> Tensor:
        """[N, 2] FP64 by block: the sum over sequences of |X - mean X| / |X|, and their number; 0 on other ranks.

        Communication:
            Under ``tokens`` one all-reduce over tp; under ``columns`` another of [N, B].
        """
        found = torch.zeros(self._num_blocks, 2, dtype=torch.float64, device=self._assembled.device)
        if not self._sums:
            return found
        totals = torch.stack([total for total, _ in self._sums.values()])
        squares = torch.stack([square for _, square in self._sums.values()])
        axis = self._layout.axis
        if self._layout.name == "tokens":
            totals, squares = all_reduce(totals, axis), all_reduce(squares, axis)
        parts = torch.stack((squares - totals.square().sum(-1) / self._seq, squares))
        if self._layout.name == "columns":
            parts = all_reduce(parts, axis)
        if axis.rank == 0 and self._assembled.context.dp.rank == 0:
            rest, whole = parts.clamp(min=0)
            ratios = (rest / whole).sqrt()
            found[list(self._sums)] = torch.stack((ratios.sum(1), torch.full_like(ratios[:, 0], ratios.shape[1])), 1)
        return found

    def _around_blocks(self, run_blocks: Callable) -> Callable:
        def watched(stream: Stream, rows: SequenceInfo, masks: None = None) -> Stream:
            numbers = torch.arange(rows.batch, device=self._assembled.device).repeat_interleave(rows.seq)
            self._sequence_of, self._batch, self._seq = self._layout.tokens(numbers), rows.batch, rows.seq
            return run_blocks(stream, rows, masks)

        return watched

    def _around_close(self, block: int, residual: Residual) -> Callable[[Callable], Callable]:
        def around(close: Callable) -> Callable:
            def watched(x: Tensor, y: Tensor, masks: None) -> Stream:
                stream = close(x, y, masks)
                self._see(block, residual, stream)
                return stream

            return watched

        return around

    def _see(self, block: int, residual: Residual, stream: Stream) -> None:
        x = residual.add_norm.trunk(stream).double() if stream.delta is not None else stream.x.double()
        assert self._sequence_of is not None
        total = x.new_zeros(self._batch, x.shape[1]).index_add_(0, self._sequence_of, x)
        square = x.new_zeros(self._batch).index_add_(0, self._sequence_of, x.square().sum(1))
        self._sums[block] = total, square

    def _around_finish(self, finish: Callable) -> Callable:
        def watched(stream: Stream) -> BranchInput:
            hidden = finish(stream)
            whole = whole_rows(hidden)
            self.hidden = whole.to(torch.promote_types(whole.dtype, torch.float32))
            return hidden

        return watched
