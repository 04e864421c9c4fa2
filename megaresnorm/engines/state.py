"""The engine's tensors as a checkpoint sees them: sharded state (this rank's slices of each) and full state."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.checkpoint.format import FINITE, TensorSlices, is_finite
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.errors import CheckpointError
from megaresnorm.model.specs import IN_BRANCHES
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.sharding import Box, boxes, broadcast, from_row_chunks, unshard
from megaresnorm.parallel.wide import gradient_dtype
from megaresnorm.precision.dtypes import StoredDtypes
from megaresnorm.precision.rounded_updates import Rounded


@dataclass(frozen=True)
class Placement:
    """Placement of one parameter and of everything that is laid out as it is.

    Attributes:
        shape, dtype: of the whole parameter.
        boxes: bounds of this rank's slices in the whole tensor.
        owned: whether this is the one rank that writes them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    owned: bool

    def of(self, mine: Tensor | None, *, wide: bool = False) -> TensorSlices:
        """The slices of a tensor so placed, of which this rank has ``mine``; None where it has nothing.

        Args:
            wide: whether it has the type of the parameter's gradient, not of the parameter.
        """
        dtype = gradient_dtype(self.dtype) if wide else self.dtype
        return TensorSlices(self.shape, dtype, mine, self.boxes, self.owned and mine is not None)


def placements(assembled: Assembled) -> dict[str, Placement]:
    """The placement of every parameter of the whole model, by global name.

    It has no slices where this rank has nothing of the parameter.
    """
    context, mine, written = assembled.context, assembled.parameters(), _written(assembled)
    found = {}
    for name, spec in assembled.table.items():
        parts = [part.rows for part in spec.parts]
        held = boxes(spec.shape, spec.split, parts, context.tp, context.dp_shard) if name in mine else []
        found[name] = Placement(spec.shape, assembled.dtypes.of(spec), tuple(held), name in written)
    return found


def rounded_weights(assembled: Assembled, seed: int) -> dict[str, Rounded]:
    """How this rank's weights that are stored in BF16 are rounded, by global name."""
    placed = {name: place for name, place in placements(assembled).items() if place.dtype == torch.bfloat16}
    return {name: Rounded.of(seed, name, place.boxes) for name, place in placed.items() if place.boxes}


def numbers_of_parameters(
    assembled: Assembled, numbers: Mapping[str, Tensor], names: Iterable[str], *shape: int
) -> dict[str, TensorSlices]:
    """Slices of small tensors, one for each of some parameters of the whole model by global name.

    Args:
        numbers: those of this rank's parameters. They are the same on all ranks of its stage, of which the first writes
            them.
        shape: of each of them.
    """
    context = assembled.context
    first = context.dp_replicate.rank == context.dp_shard.rank == context.tp.rank == 0
    whole = tuple((0, size) for size in shape)
    found = {}
    for name in names:
        mine = numbers.get(name)
        owned = first and mine is not None and name not in assembled.copies
        found[name] = TensorSlices(shape, torch.float32, mine, () if mine is None else (whole,), owned)
    return found


def in_linear_layers(assembled: Assembled) -> list[str]:
    """The weights of linear layers of blocks, of the whole model."""
    return [name for name, spec in assembled.table.items() if spec.matrix and spec.parts[0].role in IN_BRANCHES]


def _written(assembled: Assembled) -> set[str]:
    """The parameters of which this rank writes its part, so that no part is written twice and all write about as much.

    What all ranks of dp_replicate have goes to the one that has the least to write; what all ranks of tp have goes to
    each of them in turn. Every rank works out what all of them do.
    """
    context, table = assembled.context, assembled.table
    loads = [[(0, rank) for rank in range(context.dp_replicate.size)] for _ in range(context.tp.size)]
    written = set()
    for number, (name, parameter) in enumerate(assembled.parameters().items()):
        if name in assembled.copies:
            continue
        divided = table[name].split is not None
        for tp_rank in range(context.tp.size) if divided else [number % context.tp.size]:
            load, replica = loads[tp_rank][0]
            heapq.heapreplace(loads[tp_rank], (load + local(parameter.detach()).nbytes, replica))
            if (tp_rank, replica) == (context.tp.rank, context.dp_replicate.rank):
                written.add(name)
    return written


def load_tensors(checkpoint: Checkpoint, tensors: Mapping[str, Mapping[str, TensorSlices]]) -> None:
    """Copy an engine's tensors, by group, from a checkpoint of the same model."""
    for group, members in tensors.items():
        if group in FINITE or group in checkpoint.tensors:  # clipping, scaling may have been others until then
            checkpoint.load(group, members)


def check_finite(tensors: Mapping[str, Mapping[str, TensorSlices]], where: str) -> None:
    """See ``Engine.check_finite``."""
    for group in FINITE:
        for name, slices in tensors[group].items():
            if slices.local is not None and not is_finite(slices.local):
                raise CheckpointError(f"{where}{group} {name} is not finite; use an older checkpoint")


class FullState(Mapping[str, Tensor]):
    """Global name -> whole tensor, in the order of the table, made up by all ranks together when it is asked for.

    All ranks must ask for the same ones in the same order.

    Args:
        local: this rank's parts by the name of their parameter.
        dtypes: of the whole tensors; None: all have that of the first part.

    Communication:
        For each tensor that is asked for one all-gather of this rank's rows over dp_shard and one of its share over tp,
        where the tensor is sharded. In a pipeline also one all-reduce of 8 bytes and one broadcast of the whole tensor
        over pp.
    """

    def __init__(self, assembled: Assembled, local: Mapping[str, Tensor], dtypes: StoredDtypes | None = None) -> None:
        self._assembled, self._local = assembled, local
        self._dtypes = dtypes or StoredDtypes(*[next(iter(local.values())).dtype] * 2)

    @classmethod
    def of_weights(cls, assembled: Assembled) -> "FullState":
        """The weights as they are now and later."""
        mine = {name: local(p.detach()) for name, p in assembled.parameters().items()}
        return cls(assembled, mine, assembled.dtypes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._assembled.table)

    def __len__(self) -> int:
        return len(self._assembled.table)

    def __getitem__(self, name: str) -> Tensor:
        context, spec = self._assembled.context, self._assembled.table[name]
        whole = None
        mine = self._local.get(name)
        if mine is not None:
            shape = list(spec.shape)
            if spec.split is not None:
                shape[spec.split] //= context.tp.size
            whole = unshard(
                from_row_chunks(mine, shape, context.dp_shard),
                spec.split,
                [part.rows for part in spec.parts],
                context.tp,
            )
        return whole if context.pp.size == 1 and whole is not None else self._from_stage(name, whole)

    def _from_stage(self, name: str, whole: Tensor | None) -> Tensor:
        """Send it from the first rank of the pipeline that has it to the others."""
        pp, device = self._assembled.context.pp, self._assembled.device
        ranks = torch.tensor([pp.size if whole is None else pp.rank], device=device)
        if pp.group is not None:
            torch.distributed.all_reduce(ranks, torch.distributed.ReduceOp.MIN, group=pp.group)
        if whole is None:
            spec = self._assembled.table[name]
            whole = torch.empty(spec.shape, dtype=self._dtypes.of(spec), device=device)
        return broadcast(whole.contiguous(), int(ranks.item()), pp)
