"""FP8 all-gathers of the weights that FSDP2 shards and FP8 products read: a byte an element, rounded once a step.

N outputs, in rows that are sharded   K inputs   p ranks of dp_shard
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.device_mesh import DeviceMesh

from megaresnorm.kernels.fp8.formats import (
    E4M3,
    TENSOR,
    TILE,
    Form,
    Fp8,
    amax_of,
    exponents,
    quantize,
    scales,
    scales_of,
    scales_shape,
)
from megaresnorm.parallel.collectives import all_gather_blocks, largest
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.gathered import set_gather
from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.precision.fp8 import Fp8Linear


class Fp8Shards:
    """This rank's rows of every weight that is read in FP8, as FSDP2 is to send them.

    A gathered weight is codes that the layer's products read; the FP32 tensor that FSDP2 reduces gradients for has no
    values, and no memory after its first use.

    Args:
        layers: whose weights FSDP2 has sharded, with memory and initial values, before any has been gathered.
    """

    def __init__(self, layers: Mapping[str, tuple[Linear, Fp8Linear]], context: ParallelContext) -> None:
        self._context = context
        self._shards = [_Shard(layer, kernel, context.dp_shard) for layer, kernel in layers.values()]
        self.refresh()

    @property
    def tensors(self) -> list[Tensor]:
        """See ``WeightCopies``."""
        return [tensor for shard in self._shards for tensor in (shard.codes, shard.inverse)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the current weights.

        Communication:
            One all-gather for all weights: tensorwise of a number for each over model_shards; else over dp_shard, of a
            number for each 128 x 128 elements (block), or of a byte for each scale of this rank's rows.
        """
        tensorwise = self._shards[0].form == TENSOR
        axis = self._context.model_shards if tensorwise else self._context.dp_shard
        if tensorwise or self._shards[0].form == TILE:
            own = [shard.amax() for shard in self._shards]
            whole = largest(torch.cat([amax.flatten() for amax in own]), axis).split([amax.numel() for amax in own])
            for shard, amax, like in zip(self._shards, whole, own, strict=True):
                shard.round(amax.view_as(like))
            return
        sent = [exponents(shard.round(None)) for shard in self._shards]
        everyone = all_gather_blocks(torch.cat([one.flatten() for one in sent]), axis)
        for shard, all_rows, one in zip(self._shards, everyone.split([s.numel() for s in sent], 1), sent, strict=True):
            shard.take_scales(all_rows.reshape(-1, one.shape[1]))


class _Shard:
    """This rank's rows of one weight.

    Attributes:
        codes: [rows, K], filled up with zeros where other ranks have more rows.
        inverse: scales of the whole weight.
    """

    codes: Tensor
    inverse: Tensor

    def __init__(self, layer: Linear, kernel: Fp8Linear, axis: Axis) -> None:
        weight: Any = layer.weight
        self.form: Form = kernel.forms.weight
        self._num_rows, width = weight.shape
        self._rows = -(-self._num_rows // axis.size)
        self._first = self._rows * axis.rank
        self._mine = local(weight.detach())
        self._grid = -(-self._num_rows // TILE.rows), -(-width // TILE.columns)
        self._kernel = kernel
        # What FSDP2 calls hangs on the tensor that it gathers; to_local may be a view of it.
        set_gather(cast(Any, layer.weight)._local_tensor, self._before, self._after)

    def amax(self) -> Tensor:
        """What the shared scales are for, as far as this rank's rows say: [1, 1], or of each tile of the weight."""
        if self.form == TENSOR:
            return amax_of(self._mine, TENSOR)
        found = self._mine.new_zeros(self._grid, dtype=torch.float32)
        if len(self._mine):
            first, padded = self._in_tiles()
            here = amax_of(padded, TILE)
            found[first : first + len(here)] = here
        return found

    def round(self, amax: Tensor | None) -> Tensor:
        """Make codes of the current weights.

        Args:
            amax: what shared scales are for; None where each row has its own.

        Returns:
            The inverse scales of as many rows as each rank has, or the shared ones.
        """
        if self.form == TILE and amax is not None:
            inverse = scales_of(amax, E4M3)[1]
            codes = torch.empty_like(self._mine, dtype=E4M3)
            if len(codes):
                first, padded = self._in_tiles()
                tiles = scales_shape(padded.shape, TILE)[0]
                codes = quantize(padded, TILE, amax=amax[first : first + tiles]).codes[len(padded) - len(codes) :]
        else:
            codes, inverse, _ = quantize(self._mine, self.form, amax=amax)
        missing = self._rows - len(codes)
        self.codes = F.pad(codes.view(torch.uint8), (0, 0, 0, missing)) if missing else codes.view(torch.uint8)
        self._kernel.shard = self.codes[: len(codes)].view(E4M3)
        if amax is None:
            return F.pad(inverse, (0, 0, 0, missing))
        self.inverse = inverse
        return inverse

    def take_scales(self, all_rows: Tensor) -> None:
        """Take over the scales of all ranks' rows, as ``exponents``."""
        self.inverse = scales(all_rows[: self._num_rows])

    def _in_tiles(self) -> tuple[int, Tensor]:
        """The number of the first row of tiles, and this rank's rows below the rows of other ranks in it."""
        above = self._first % TILE.rows
        return self._first // TILE.rows, F.pad(self._mine, (0, 0, above, 0))

    def _before(
        self, mesh: DeviceMesh, size: torch.Size, stride: tuple[int, ...], module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        return (self.codes,), None

    @torch.no_grad()
    def _after(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Give the layer its codes. FSDP2 wants a tensor of the weight's shape, which nothing reads."""
        codes = gathered[0][: self._num_rows].view(E4M3)
        self._kernel.weight = Fp8(codes, self.inverse, self.form)
        if out is None:
            whole = codes.new_empty(codes.shape, dtype=dtype)
            return whole, (whole,)
        with _unsafe_preserve_version_counter(out):
            out.untyped_storage().resize_(0)  # FSDP2 has given it memory again
        return None
