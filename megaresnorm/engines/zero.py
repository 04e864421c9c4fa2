"""Where DeepSpeed's ZeRO keeps what a rank updates: consecutive elements of its parameters.

Stage 0 leaves parameters and gradients whole on every rank of dp. Stages 1 and 2 put all parameters of an optimizer's
group into one flat tensor, of which a rank updates one of dp equal partitions. Stage 3 partitions every parameter by
itself, the last partitions padded with zeros.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from megaresnorm.assemble import Assembled
from megaresnorm.engines.state import Placement
from megaresnorm.parallel.mesh import Axis
from megaresnorm.parallel.sharding import boxes, flat_boxes
from megaresnorm.parallel.wide import no_gradient


class Piece(NamedTuple):
    """Consecutive elements of a parameter, as they lie in a tensor that a rank updates.

    Attributes:
        master: the tensor, FP32.
        start: the first of them in it.
        first: the first of them in this rank's share of the parameter over tp, row by row.
        length: how many there are; 0 where another rank of dp updates all of them.
    """

    master: Tensor
    start: int
    first: int
    length: int

    def of(self, like_master: Tensor) -> Tensor:
        """These elements [length] of a tensor that is laid out like ``master``: its own memory."""
        return like_master.detach().view(-1)[self.start : self.start + self.length]


class Partitions(Protocol):
    """What a rank updates, under one of ZeRO's stages."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Of every parameter of this rank, by global name."""

    def gradient(self, name: str) -> Tensor:
        """The reduced gradient [length] of a parameter's piece: its own memory, from backward until the update."""

    def weights_changed(self) -> None:
        """Make weights and masters the same, after a checkpoint was loaded: into masters in stage 3, else weights."""


def _gradient_of(master: Tensor) -> Tensor:
    assert master.grad is not None, "with its optimizer on the host DeepSpeed keeps it there"
    return master.grad


class WholeParameters:
    """Stage 0: every parameter is its own master."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.pieces = {name: Piece(p, 0, 0, p.numel()) for name, p in parameters.items()}

    def gradient(self, name: str) -> Tensor:
        """See ``Partitions``."""
        parameter = self._parameters[name]
        if parameter.grad is None:
            parameter.grad = no_gradient(parameter)
        return parameter.grad.view(-1)

    def weights_changed(self) -> None:
        """See ``Partitions``."""


class FlatPartitions:
    """Stages 1 and 2.

    Args:
        optimizer: a ``DeepSpeedZeroOptimizer``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
        self._linked: dict[str, Any] = dict(parameters)
        self._optimizer = optimizer
        self.pieces = {name: _piece_of_flat(parameter, optimizer) for name, parameter in parameters.items()}

    def gradient(self, name: str) -> Tensor:
        """See ``Partitions``."""
        piece, parameter = self.pieces[name], self._linked[name]
        if not piece.length:
            return piece.of(piece.master)  # nothing of it
        if self._optimizer.cpu_offload:
            return piece.of(_gradient_of(piece.master))
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)

    def weights_changed(self) -> None:
        """See ``Partitions``: masters are copies."""
        self._optimizer.refresh_fp32_params()


def _piece_of_flat(parameter: Any, optimizer: Any) -> Piece:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(optimizer.single_partition_of_fp32_groups[0], 0, 0, 0)
    at, within = mapping.hp_fragment_address, mapping.lp_fragment_address
    master = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    return Piece(master, int(at.start), int(within.start), int(within.numel))


class PartitionedParameters:
    """Stage 3.

    Args:
        optimizer: a ``DeepSpeedZeroOptimizer_Stage3``.
        rank: of this process in dp.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        if not optimizer.offload_optimizer:
            # DeepSpeed means to update FP32 parts themselves, but finds "cpu" another device than torch.device("cpu").
            groups = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True)
            for master, part in groups:
                master.data = part
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._places: dict[str, tuple[int, int]] = {}
        self._parameters: dict[str, Any] = dict(parameters)
        self.pieces = dict(self._find(rank))

    def _find(self, rank: int) -> Iterator[tuple[str, Piece]]:
        for group, members in enumerate(self._optimizer.fp16_groups):
            start = 0
            for index, parameter in enumerate(members):
                name, size = self._names[id(parameter)], parameter.partition_numel()
                first = min(rank * size, parameter.ds_numel)
                count = min(size, parameter.ds_numel - first)
                yield name, Piece(self._optimizer.fp32_partitioned_groups_flat[group], start, first, count)
                self._places[name] = group, index
                start += size

    def gradient(self, name: str) -> Tensor:
        """See ``Partitions``."""
        piece, (group, index) = self.pieces[name], self._places[name]
        if self._optimizer.offload_optimizer:
            return piece.of(_gradient_of(piece.master))
        return self._optimizer.averaged_gradients[group][index].view(-1)[: piece.length]

    @torch.no_grad()
    def weights_changed(self) -> None:
        """See ``Partitions``: the weights are parts of masters, which are loaded, or copies of them.

        Small parameters stay gathered from step to step, as they were before.
        """
        self._optimizer.parameter_offload.partition_all_parameters()
        for name, piece in self.pieces.items():
            self._parameters[name].ds_tensor.view(-1)[: piece.length].copy_(piece.of(piece.master))


def flat_placements(assembled: Assembled, pieces: Mapping[str, Piece]) -> dict[str, Placement]:
    """The placement of every piece that a rank updates, by the global name of its parameter.

    What all ranks of tp have alike is written by each of them in turn.
    """
    context, found = assembled.context, {}
    alone = Axis("dp_shard")
    for number, (name, spec) in enumerate(assembled.table.items()):
        held = boxes(spec.shape, spec.split, [part.rows for part in spec.parts], context.tp, alone)
        owned = spec.split is not None or number % context.tp.size == context.tp.rank
        piece = pieces[name]
        mine = flat_boxes(held, piece.first, piece.length)
        found[name] = Placement(spec.shape, assembled.dtypes.of(spec), tuple(mine), owned and bool(mine))
    return found
