"""Whole tensors from the parts that the ranks have, one at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled
from megaresnorm.parallel.sharding import broadcast, from_row_chunks, unshard


class WholeTensors(Mapping[str, Tensor]):
    """Global name -> whole tensor, in the order of the table, made up by all ranks together when it is asked for.

    local: this rank's parts by the name of their parameter. All ranks must ask for the same ones in the same order.
    """

    def __init__(self, assembled: Assembled, local: Mapping[str, Tensor]) -> None:
        self._assembled, self._local = assembled, local

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
        """From the first rank of the pipeline that has it to the others."""
        pp, device = self._assembled.context.pp, self._assembled.device
        ranks = torch.tensor([pp.size if whole is None else pp.rank], device=device)
        if pp.group is not None:
            torch.distributed.all_reduce(ranks, torch.distributed.ReduceOp.MIN, group=pp.group)
        if whole is None:
            dtype = next(iter(self._local.values())).dtype
            whole = torch.empty(self._assembled.table[name].shape, dtype=dtype, device=device)
        return broadcast(whole.contiguous(), int(ranks.item()), pp)
