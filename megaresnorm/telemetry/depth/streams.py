"""Sums over the residual stream of one step, taken beside what the step computes, on the device.

A connection is seen where it closes: there its trunk x and what it adds to it are at hand. What is run again in
backward has been seen.

T tokens (batch * seq)   D model dim   R rows that are sampled   N blocks
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.model.block import Block
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.residual import Residual
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.stream import Stream
from megaresnorm.model.topology import SUBLAYERS
from megaresnorm.parallel.collectives import all_reduce
from megaresnorm.recompute import is_running_again
from megaresnorm.telemetry.depth.rows import BlockAngles, SampledRows, angles_of
from megaresnorm.telemetry.depth.scratch import Scratch
from megaresnorm.telemetry.wrapped import Wrapped

PIECE = 1 << 16  # elements whose products may be added in FP32 on a CPU: the error is below 1e-6
X2, X4, C2, XC = range(4)  # columns of moments: of the trunk x and the contribution c


def blocks_of(assembled: Assembled) -> Iterator[tuple[int, Block]]:
    """The blocks that this rank has, with their numbers in the whole model."""
    for model in assembled.models.values():
        for number, block in model.blocks.items():
            yield int(number), cast(Block, block)


class StreamTotals(NamedTuple):
    """Of one step, all FP64 on the device; additive over ranks.

    Attributes:
        moments: [2N + 1, 4] by sub-layer, sums over elements of x^2, x^4, c^2 and x c; the last row is of the stream
            after the last block, and 0 where its add is pending.
        elements: [2N + 1], how many there were.
        angles: [N, 3], sums over rows of cosine and angular distance of a block's input and output, and their number.
        gradients: [N + 1], sums of squares of the gradient of the stream at each block's input and after the last.
    """

    moments: Tensor
    elements: Tensor
    angles: Tensor
    gradients: Tensor


class StreamSums:
    """Watches the stages of this rank for a step. What all ranks of tp have alike, the first of them counts.

    Args:
        num_blocks: of the whole model.
    """

    def __init__(self, assembled: Assembled, num_blocks: int) -> None:
        self._assembled, self._layout, self._device = assembled, assembled.layout, assembled.device
        self._num_blocks, sites = num_blocks, len(SUBLAYERS) * num_blocks + 1
        self._moments = torch.zeros(4 * sites, dtype=torch.float64, device=self._device)
        self._gradients = torch.zeros(num_blocks + 1, dtype=torch.float64, device=self._device)
        self._elements = [0] * sites
        self._factors, self._alphas = [1.0] * sites, [1.0] * (num_blocks + 1)
        self._found: list[tuple[int, Tensor]] = []  # (place among moments, a sum), not yet added to them
        self._squares: list[tuple[int, Tensor]] = []  # (block, squares of a gradient), likewise
        self._sampled, self._scratch = SampledRows(self._layout, self._device), Scratch(self._device)
        self._angles_of_pass = BlockAngles()
        self._rows: dict[tuple[int, int], list[Tensor]] = {}  # of blocks (first, end): sums of all passes
        self._last = {max(map(int, model.blocks), default=-1) for model in assembled.models.values()}

    def wrap(self, wrapped: Wrapped) -> None:
        """Begin to watch."""
        if self._layout.name == "full" and self._layout.axis.rank > 0:
            return
        gated = False  # whether the add that is pending before a block is of a token gate
        for number, block in blocks_of(self._assembled):
            self._wrap_block(wrapped, number, block, gated)
            gated = block.sublayers[-1].token_gate is not None
        for model in self._assembled.models.values():
            wrapped.method(model, "run_blocks", self._around_blocks)
            wrapped.method(model, "finish", self._around_finish(gated))

    def wrap_first(self, wrapped: Wrapped) -> None:
        """Begin to watch the gradient of the stream before the first block alone."""
        if self._layout.name == "full" and self._layout.axis.rank > 0:
            return
        for number, block in blocks_of(self._assembled):
            if number == 0:
                wrapped.method(block.sublayers[0], "open", lambda open_: self._around_open(open_, 0, gated=False))

    @torch.no_grad()
    def first_gradient(self) -> Tensor:
        """The sum of its squares over this rank's part, FP64."""
        self._gradients.index_add_(0, *_stacked(self._squares, self._device))
        self._squares = []
        return self._gradients[0]

    @torch.no_grad()
    def totals(self) -> StreamTotals:
        """Of what has been seen. Collective under ``columns``.

        Communication:
            Under ``columns`` three numbers for each block and sampled row are summed over tp, in an all-reduce for each
            few blocks.
        """
        self._add_up()
        self._gradients.index_add_(0, *_stacked(self._squares, self._device))
        factors = torch.tensor(self._factors, dtype=torch.float64, device=self._device)
        alphas = torch.tensor(self._alphas, dtype=torch.float64, device=self._device)
        moments = self._moments.view(-1, 4).clone()
        moments[:, C2] *= factors.square()
        moments[:, XC] *= factors
        elements = torch.tensor(self._elements, dtype=torch.float64, device=self._device)
        return StreamTotals(moments, elements, self._angles(), self._gradients / alphas.square())

    def _wrap_block(self, wrapped: Wrapped, number: int, block: Block, gated: bool) -> None:
        wrapped.method(block.sublayers[0], "open", lambda open_: self._around_open(open_, number, gated))
        for place, residual in enumerate(block.sublayers):
            site, last = number * len(SUBLAYERS) + place, place + 1 == len(block.sublayers)
            around = self._around_last if last else self._around_inner
            wrapped.method(residual, "close" if last else "close_and_open", around(site, residual))

    def _around_blocks(self, run_blocks: Callable) -> Callable:
        def watched(stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None = None) -> Stream:
            self._sampled.begin(rows)
            self._angles_of_pass = BlockAngles()
            stream = run_blocks(stream, rows, masks)
            self._add_up()
            for first, end, sums in self._angles_of_pass.found:
                self._rows.setdefault((first, end), []).append(sums)
            return stream

        return watched

    def _around_open(self, open_: Callable, block: int, gated: bool) -> Callable:
        def watched(stream: Stream) -> Any:
            if not is_running_again():
                self._watch_gradient(block, stream, gated)
            return open_(stream)

        return watched

    def _around_inner(self, site: int, residual: Residual) -> Callable[[Callable], Callable]:
        def around(close_and_open: Callable) -> Callable:
            def watched(following: Residual, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Any:
                if not is_running_again():
                    self._see(site, residual, x, y, masks)
                return close_and_open(following, x, y, masks)

            return watched

        return around

    def _around_last(self, site: int, residual: Residual) -> Callable[[Callable], Callable]:
        def around(close: Callable) -> Callable:
            def watched(x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Stream:
                if is_running_again():
                    return close(x, y, masks)
                added = self._see(site, residual, x, y, masks)
                if residual.leaves_pending and residual.token_gate is None:
                    x = x.view_as(x)  # which the add alone reads, see _watch_gradient; no sum gets another order
                stream = close(x, y, masks)
                if site // len(SUBLAYERS) in self._last:
                    self._see_rows(site, residual, stream, added)
                return stream

            return watched

        return around

    def _around_finish(self, gated: bool) -> Callable[[Callable], Callable]:
        def around(finish: Callable) -> Callable:
            def watched(stream: Stream) -> Any:
                self._watch_gradient(self._num_blocks, stream, gated)
                if stream.delta is None:
                    self._see_end(stream.x)
                return finish(stream)

            return watched

        return around

    @torch.no_grad()
    def _see(self, site: int, residual: Residual, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> Tensor:
        block, place = divmod(site, len(SUBLAYERS))
        if place == 0:
            self._angles_of_pass.enter(block, self._rows_of(x))
        added, self._factors[site] = contribution(residual, x, y, masks)
        trunk, c = x.to(added.dtype).reshape(-1), added.reshape(-1)
        square, first = torch.mul(trunk, trunk, out=self._scratch("square", trunk.shape, trunk.dtype)), 4 * site
        self._elements[site] += x.numel()
        self._found += [
            (first + X2, product(trunk, trunk)), (first + X4, product(square, square)),
            (first + C2, product(c, c)), (first + XC, product(trunk, c)),
        ]  # fmt: skip
        return added

    @torch.no_grad()
    def _see_rows(self, site: int, residual: Residual, stream: Stream, added: Tensor) -> None:
        """Those at the output of this rank's last block; a pending add is rounded as it will be."""
        rows = self._rows_of(stream.x)
        if stream.delta is not None:
            c = added.index_select(0, self._sampled.rows).mul_(self._factors[site])
            stored = c.add_(rows, alpha=stream.alpha).to(residual.add_norm.residual_dtype)
            rows = stored.to(rows.dtype)
        self._angles_of_pass.leave(rows)

    def _rows_of(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._sampled.rows).to(torch.promote_types(x.dtype, torch.float32))

    @torch.no_grad()
    def _see_end(self, x: Tensor) -> None:
        flat = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1)
        self._elements[-1] += x.numel()
        self._found.append((len(self._moments) - 4 + X2, product(flat, flat)))

    def _watch_gradient(self, block: int, stream: Stream, gated: bool) -> None:
        """The gradient of a stream is that of the sum where its pending add is closed: alpha times it arrives at the
        add's x. A token gate mixes x into what it adds as well; there it is the gradient of that.
        """
        pending = stream.delta is not None
        watched = stream.delta if gated and stream.delta is not None else stream.x
        self._alphas[block] = stream.alpha if pending and not gated else 1.0
        if watched.requires_grad:
            watched.register_hook(lambda gradient: self._see_gradient(block, gradient))

    def _see_gradient(self, block: int, gradient: Tensor) -> None:
        flat = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).reshape(-1)
        self._squares.append((block, product(flat, flat)))

    def _add_up(self) -> None:
        found, self._found = self._found, []
        if found:
            self._moments.index_add_(0, *_stacked(found, self._device))

    def _angles(self) -> Tensor:
        found = torch.zeros(self._num_blocks, 3, dtype=torch.float64, device=self._device)
        by_columns = self._layout.name == "columns" and self._layout.axis.size > 1
        for (first, end), parts in sorted(self._rows.items()):
            sums = torch.cat(parts, 2)
            if by_columns:
                sums = all_reduce(sums, self._layout.axis)
            if not by_columns or self._layout.axis.rank == 0:
                found[first:end] += angles_of(sums)
        return found


def _stacked(found: list[tuple[int, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places, and FP64 what is to be added there."""
    if not found:
        return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.float64, device=device)
    places, sums = zip(*found, strict=True)
    return torch.tensor(places, device=device), torch.stack(sums).double()


def contribution(residual: Residual, x: Tensor, y: Tensor, masks: DropoutMasks | None) -> tuple[Tensor, float]:
    """What a connection adds to alpha x, in FP32 or wider, as a tensor and a number to multiply it by.

    It is gate * dropout(norm_branch(y)); of a token gate what the gate has made, T (F(u) - x). A constant gate without
    norm and dropout makes no tensor. To be called where nothing is differentiated.

    Communication:
        None, but under ``columns`` that of a norm for norm_branch, whose statistics are those of whole rows.
    """
    stream, norm = residual.pending(x, y, masks), residual.fused_branch_norm
    added = y.to(torch.promote_types(y.dtype, torch.float32))
    if norm is not None:
        added = residual.add_norm.normalize(added, norm)
    if stream.dropout is not None:
        added = stream.dropout(added)
    if isinstance(stream.gate, Tensor):
        return added * stream.gate.to(added.dtype), 1.0
    return added, stream.gate


def product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of two flat tensors' elements, a scalar; on CPUs in pieces, for FP32's sake."""
    if a.is_cpu and a.numel() > PIECE and a.dtype != torch.float64:
        pairs = zip(a.split(PIECE), b.split(PIECE), strict=True)
        return torch.stack([torch.dot(*pair) for pair in pairs]).double().sum()
    return torch.dot(a, b)
