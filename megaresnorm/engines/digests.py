"""What several ranks hold alike, compared bit for bit: where one of them differs, it is found, named and repaired.

Under data parallelism every rank of dp_replicate has the same weights, moments and averages; what is whole over tp,
such as weights of norms, is on each of its ranks; a tied embedding is on the first and the last stage. Nothing keeps
them alike but that all compute the same, so a bit that memory or a chip has flipped stays, and nothing else tells.

What this cannot see: a gradient that was wrong before it was reduced, which reaches all ranks alike (replay.py); shards
of FSDP2 or ZeRO, and what is sharded over tp, without a second data-parallel copy; a rank alone. Copies of weights in
16 bits or FP8 are made anew in every step, and are not compared.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaresnorm.checkpoint.format import TensorSlices
from megaresnorm.engines.engine import Engine
from megaresnorm.errors import CorruptionError
from megaresnorm.kernels.digest import digest
from megaresnorm.parallel.collectives import all_gather_blocks
from megaresnorm.parallel.control import all_gather_json
from megaresnorm.parallel.environment import host_name
from megaresnorm.parallel.mesh import MESH_AXES, Axis, ParallelContext
from megaresnorm.parallel.sharding import broadcast

AXES = ("dp_replicate", "dp_shard", "tp", "embedding")


@dataclass(frozen=True)
class Odd:
    """Ranks that should hold the same and do not.

    Attributes:
        axis: over which they are compared.
        members: those that are compared, by their numbers in the job.
        odd: those that differ from more than half of them; empty where there is no such majority.
        tensors: all that differ, as ``weights blocks.7.ffn.up.weight``.
        hosts: of the members, in their order.
    """

    axis: str
    members: tuple[int, ...]
    odd: tuple[int, ...]
    tensors: tuple[str, ...]
    hosts: tuple[str, ...]

    @property
    def line(self) -> str:
        """One line: which tensors, ranks and hosts, and which of them is the odd one."""
        first, more = self.tensors[0], len(self.tensors) - 1
        what = f"{first} and {more} more differ" if more else f"{first} differs"
        others = [rank for rank in self.members if rank not in self.odd]
        compared = [*others[:1], *self.odd] if self.odd else list(self.members)
        between = f"{what} between {_ranks(compared)} ({self.axis})"
        if not self.odd:
            hosts = ", ".join(f"rank {r} on {h}" for r, h in zip(self.members, self.hosts, strict=True))
            return f"{between}; of {len(self.members)} copies none is in the majority: {hosts}"
        names = " and ".join(f"rank {r} on {self.hosts[self.members.index(r)]}" for r in self.odd)
        verb = "is the odd one" if len(self.odd) == 1 else "are the odd ones"
        return f"{between}; {names} {verb} of {len(self.members)}"


class ReplicaDigests:
    """Compares what several ranks hold alike. Collective, from the making on.

    Which tensors an axis has alike is not told by names: they are those of which all its ranks hold the same slices.
    So it serves any engine: under ZeRO-1, for example, weights are compared over dp, partitions of moments are not.

    Args:
        engine: its ``tensors``: weights, moments, averages of clipping, histories of FP8.

    Communication:
        Making it: two all-gathers over each axis, of 8 bytes and of 8 bytes a tensor.
    """

    def __init__(self, engine: Engine, context: ParallelContext) -> None:
        self._engine, self._context = engine, context
        self._tensors = {
            f"{group} {name}": slices
            for group, members in engine.tensors.items()
            for name, slices in members.items()
            if slices.local is not None
        }
        self._names = list(self._tensors)
        self._alike = {name: self._held_alike(getattr(context, name)) for name in AXES}
        self._any = sorted({i for indices in self._alike.values() for i in indices})
        sizes = [getattr(context, axis).size for axis in (*MESH_AXES, "embedding")]
        self._compares = max(sizes) > 1

    def _held_alike(self, axis: Axis) -> list[int]:
        """Numbers of the tensors of which all ranks of an axis hold the same slices."""
        if axis.size == 1:
            return []
        names = self._tied() if axis.name == "embedding" else list(range(len(self._names)))
        counts = all_gather_blocks(torch.tensor([len(names)], device=self._device), axis)
        if not counts.min():  # a pipeline whose embedding is not tied: the last stage has none
            return []
        held = torch.tensor([_hash_of(self._tensors[self._names[i]]) for i in names], device=self._device)
        everyone = all_gather_blocks(held, axis)
        same = (everyone == everyone[0]).all(0).tolist()
        return [i for i, alike in zip(names, same, strict=True) if alike and self._local(i).numel()]

    def _tied(self) -> list[int]:
        """Numbers of the tensors of the tied embedding, in an order that both stages have."""
        tied = "embedding.weight"
        states = [name for name in self._names if name.endswith(f".{tied}")]
        return sorted(
            (self._names.index(n) for n in self._names if n.partition(" ")[2] == tied or n in states),
            key=lambda i: self._names[i],
        )

    @property
    def _device(self) -> torch.device:
        return self._engine.assembled.device

    def _local(self, i: int) -> Tensor:
        local = self._tensors[self._names[i]].local
        assert local is not None
        return local

    def num_compared(self, axis: str) -> int:
        """Number of this rank's tensors that are compared over an axis."""
        return len(self._alike[axis])

    def check(self) -> list[Odd]:
        """Compare. Collective.

        Returns:
            Groups of ranks that differ, the same on all ranks; empty where all is well.

        Communication:
            One all-gather over all ranks of 8 bytes for each of four axes. Only where they differ: over the axes that
            do, of 8 bytes a tensor, and ``all_gather_json`` of names of tensors.
        """
        if not self._compares:
            return []
        digests = self._digests()
        folded = [self._folded(digests, name) for name in AXES]
        everyone = all_gather_blocks(torch.stack(folded), self._context.world).tolist()
        differing = [
            (name, members)
            for column, name in enumerate(AXES)
            for members in groups(self._context, name)
            if len({everyone[member][column] for member in members}) > 1
        ]
        return self._named(digests, differing) if differing else []

    def _named(self, digests: dict[int, Tensor], differing: Sequence[tuple[str, list[int]]]) -> list[Odd]:
        """What differs in which groups, after another look at theirs, told to all ranks."""
        rank = self._context.world.rank
        mine = [self._compared(digests, name, members) for name, members in differing if rank in members]
        said = all_gather_json([host_name(), mine], self._context.world, self._device)  # control is the saver's
        found = []
        for sender, (_, of_rank) in enumerate(said):
            for axis, members, odd, tensors in of_rank:
                if sender == members[0]:
                    hosts = tuple(said[member][0] for member in members)
                    found.append(Odd(axis, tuple(members), tuple(odd), tuple(tensors), hosts))
        return found

    def _digests(self) -> dict[int, Tensor]:
        return {i: digest(self._local(i)).to(self._device) for i in self._any}

    def _folded(self, digests: dict[int, Tensor], axis: str) -> Tensor:
        alike = [digests[i] for i in self._alike[axis]]
        return digest(torch.stack(alike)) if alike else torch.zeros((), dtype=torch.int64, device=self._device)

    def _compared(self, digests: dict[int, Tensor], axis: str, members: list[int]) -> list[Any]:
        """What a group of ranks that differ finds tensor by tensor, the same on each."""
        alike = self._alike[axis]
        table = all_gather_blocks(torch.stack([digests[i] for i in alike]), getattr(self._context, axis)).tolist()
        odd, decided, differing = set[int](), True, []
        for i, column in zip(alike, zip(*table, strict=True), strict=True):
            (usual, count), *others = Counter(column).most_common()
            if others:
                differing.append(self._names[i])
                decided &= 2 * count > len(members)
                odd |= {member for member, one in zip(members, column, strict=True) if one != usual}
        named = sorted(odd) if decided and len(odd) < len(members) else []
        return [axis, members, named, differing]

    @torch.no_grad()
    def restore(self, found: Sequence[Odd]) -> bool:
        """Copy what differs from a rank of the majority to the odd ranks, where there is one. Collective.

        Args:
            found: what ``check`` has returned.

        Returns:
            Whether all are alike now: one axis may have had no majority, and what it compares one over another axis.

        Communication:
            One broadcast of each tensor that differs over its axis; that of the engine's ``weights_changed``, and of
            ``check``.
        """
        for one in found:
            if not one.odd or self._context.world.rank not in one.members:
                continue
            source = next(n for n, rank in enumerate(one.members) if rank not in one.odd)
            for name in one.tensors:
                _send(self._local(self._names.index(name)), source, getattr(self._context, one.axis), self._device)
        self._engine.weights_changed()
        return not self.check()


class Sentry:
    """Compares replicas every so many steps.

    Args:
        every: ``guard.digest_every``; 0: never.
    """

    def __init__(self, engine: Engine, context: ParallelContext, every: int) -> None:
        self.digests = ReplicaDigests(engine, context) if every else None
        self._every = every

    def due(self, step: int) -> bool:
        """Whether step ``step``, counted from 1, is followed by a comparison."""
        return self.digests is not None and step % self._every == 0

    def check(self, step: int) -> None:
        """Compare what ranks hold alike after a step. Collective.

        Raises:
            CorruptionError: it differs; on all ranks. ``found`` is what ``ReplicaDigests.restore`` takes.

        Communication:
            That of ``ReplicaDigests.check``.
        """
        found = self.digests.check() if self.digests is not None else []
        if found:
            more = f"; and {len(found) - 1} more groups of ranks differ" if len(found) > 1 else ""
            error = CorruptionError(f"step {step}: {found[0].line}{more}")
            error.found = found
            raise error


def groups(context: ParallelContext, name: str) -> list[list[int]]:
    """The groups of ranks, by their numbers in the job, that an axis makes of all of them.

    >>> groups(ParallelContext.single(), "dp_replicate")
    []
    """
    shape = [getattr(context, axis).size for axis in MESH_AXES]
    ranks = torch.arange(context.world.size).view(shape)
    if name == "embedding":
        ranks, dim = ranks[[0, -1]], 0
        size = 2 if shape[0] > 1 else 1
    else:
        dim, size = MESH_AXES.index(name), getattr(context, name).size
    return ranks.movedim(dim, -1).reshape(-1, size).tolist() if size > 1 else []


def _ranks(ranks: Sequence[int]) -> str:
    return "ranks " + ", ".join(map(str, ranks[:-1])) + f" and {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"


def _hash_of(slices: TensorSlices) -> int:
    """63 bits of which slices of which tensor are held."""
    numbers = [len(slices.shape), *slices.shape, slices.dtype.itemsize]
    numbers += [bound for box in slices.boxes for bounds in box for bound in bounds]
    return int(digest(torch.tensor(numbers, dtype=torch.int64)))


def _send(x: Tensor, source: int, axis: Axis, device: torch.device) -> None:
    """Write one rank's tensor into those of an axis, as bytes: not every backend knows every dtype."""
    data = x.to(device, copy=True, memory_format=torch.contiguous_format)
    broadcast(data.view(-1).view(torch.uint8), source, axis)
    x.copy_(data)
