"""Whole tensors from the parts that the ranks have, one at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.parallel.sharding import broadcast, from_row_chunks, row_chunk, shard, unshard


class WholeTensors(Mapping[str, Tensor]):
    """Global name -> whole tensor, in the order of the table, made up by all ranks together when it is asked for.

    local: this rank's parts, live, by the name of a parameter behind at most one prefix (``exp_avg.``).
    numbers: name -> one number for each of this rank's parameters, which make a vector in the order of the table.
    """

    def __init__(
        self,
        assembled: Assembled,
        local: Mapping[str, Tensor],
        numbers: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._assembled, self._local, self._numbers = assembled, local, numbers or {}
        prefixes = dict.fromkeys(name[: -len(self._parameter_of(name))] for name in local)
        self._names = [*(f"{prefix}{name}" for name in assembled.table for prefix in prefixes), *self._numbers]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._numbers:
            return self._vector(self._numbers[name])
        context, spec = self._assembled.context, self._assembled.table[self._parameter_of(name)]
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

    def load(self, name: str, whole: Tensor) -> None:
        """Write this rank's part of a whole tensor, where it has one."""
        context = self._assembled.context
        if name in self._numbers:
            for parameter, number in zip(self._assembled.table, whole.split(1), strict=True):
                if parameter in self._numbers[name]:
                    self._numbers[name][parameter].copy_(number)
        elif name in self._local:
            spec = self._assembled.table[self._parameter_of(name)]
            share = shard(whole, spec.split, [part.rows for part in spec.parts], context.tp)
            self._local[name].copy_(row_chunk(share, context.dp_shard))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        table = self._assembled.table
        return (len(table),) if name in self._numbers else table[self._parameter_of(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._numbers else next(iter(self._local.values())).dtype

    def _parameter_of(self, name: str) -> str:
        table = self._assembled.table
        return name if name in table else name.split(".", 1)[1]

    def _from_stage(self, name: str, whole: Tensor | None) -> Tensor:
        """From the first rank of the pipeline that has it to the others."""
        pp, device = self._assembled.context.pp, self._assembled.device
        ranks = torch.tensor([pp.size if whole is None else pp.rank], device=device)
        if pp.group is not None:
            torch.distributed.all_reduce(ranks, torch.distributed.ReduceOp.MIN, group=pp.group)
        if whole is None:
            whole = torch.empty(self.shape(name), dtype=self.dtype(name), device=device)
        return broadcast(whole.contiguous(), int(ranks.item()), pp)

    def _vector(self, numbers: Mapping[str, Tensor]) -> Tensor:
        context = self._assembled.context
        vector = torch.full((len(self._assembled.table),), torch.inf)
        for i, name in enumerate(self._assembled.table):
            if name in numbers:
                vector[i] = numbers[name][0]
        if context.pp.group is not None:
            moved = vector.to(self._assembled.device)
            torch.distributed.all_reduce(moved, torch.distributed.ReduceOp.MIN, group=context.pp.group)
            vector = moved.cpu()
        return vector
