"""The cheap figures of depth: what passes through a step that is trained anyway is summed up beside it.

No value of the step changes. What is watched is wrapped from outside, for that step alone (telemetry/wrapped.py), and
there is no word of it in the model. Nothing is sent before the step is over, but for a norm of branches under
``columns``, and no number is read before all ranks have been asked.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.model.topology import SUBLAYERS, residual_at
from megaresnorm.parallel.collectives import all_reduce, largest
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import ModelRecipe
from megaresnorm.telemetry.depth.figures import DepthFigures, figures_of
from megaresnorm.telemetry.depth.scores import AttentionWatch, LargestScores
from megaresnorm.telemetry.depth.streams import StreamSums, StreamTotals
from megaresnorm.telemetry.depth.tensors import TensorNorms, places, tensor_sums
from megaresnorm.telemetry.wrapped import Wrapped


class Totals(NamedTuple):
    """Of all ranks, on the host.

    Attributes:
        streams: see there.
        scores: [N], the largest of each block.
        tensors: see ``tensor_sums``; None without an engine.
    """

    streams: StreamTotals
    scores: Tensor
    tensors: Tensor | None


class DepthWatch:
    """Watches the blocks that this rank has, for single steps. Not for compiled ones.

    Args:
        recipe: of the whole model.
        norms: of the engine that makes the steps; None: gradients and updates of tensors are not measured.

    Attributes:
        figures: of what was watched last; None before its end.
    """

    def __init__(self, recipe: ModelRecipe, assembled: Assembled, norms: TensorNorms | None = None) -> None:
        self._recipe, self._assembled, self._norms = recipe, assembled, norms
        self._at: Tensor | None = None
        if norms is not None:
            at = places(norms.names, assembled.table, recipe.num_blocks)
            self._at = torch.tensor(at, dtype=torch.int64, device=assembled.device)
        self._alphas = [residual_at(recipe, n, kind).alpha for n in range(recipe.num_blocks) for kind in SUBLAYERS]
        self._present = set(places(list(assembled.table), assembled.table, recipe.num_blocks))
        self.figures: DepthFigures | None = None

    @contextmanager
    def watching(self, lr: float = 0.0) -> Iterator[None]:
        """Watch what is made within: a step, or passes of the model. ``figures`` are known at its end. Collective.

        Args:
            lr: the schedule's, of the step.

        Communication:
            That of ``StreamSums.totals``; one all-reduce of about 40 numbers FP64 for each block over all ranks; of
            one number a block an all-gather over model_shards, one over dp_replicate and one over pp.
        """
        self.figures = None
        num_blocks, scale = self._recipe.num_blocks, 1.0 if self._norms is None else self._norms.loss_scale
        with nullcontext() if self._norms is None else self._norms.watching():
            streams = StreamSums(self._assembled, num_blocks)
            scores = LargestScores(num_blocks, self._assembled.device)
            with Wrapped() as wrapped:
                streams.wrap(wrapped)
                AttentionWatch(self._assembled, scores.see).wrap(wrapped)
                yield
            tensors = None
            if self._norms is not None and self._at is not None:
                tensors = tensor_sums(self._norms, self._at, num_blocks, lr)
            totals = _over_ranks(streams.totals(), scores.largest(), tensors, self._assembled.context)
            self.figures = figures_of(self._alphas, *totals, present=self._present, scale=scale)


@torch.no_grad()
def _over_ranks(streams: StreamTotals, scores: Tensor, tensors: Tensor | None, context: ParallelContext) -> Totals:
    """The totals of all ranks, on the host. Collective."""
    parts = [*streams, *(() if tensors is None else (tensors,))]
    summed = all_reduce(torch.cat([part.flatten() for part in parts]), context.world).cpu()
    found = [one.view(part.shape) for one, part in zip(summed.split([p.numel() for p in parts]), parts, strict=True)]
    for axis in (context.model_shards, context.dp_replicate, context.pp):
        scores = largest(scores, axis)
    return Totals(StreamTotals(*found[: len(streams)]), scores.cpu(), found[-1] if tensors is not None else None)
