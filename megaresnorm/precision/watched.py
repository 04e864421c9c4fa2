"""Linear layers watched for a step: their products are what they were, and what they read is counted.

K in_dim   N out_dim   T tokens
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput
from megaresnorm.kernels.fp8.formats import LARGEST, TENSOR, Fp8, Rows
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.layouts import TensorLayout
from megaresnorm.parallel.linear import ColumnLinear, Linear
from megaresnorm.parallel.linear_kernel import LinearKernel, LinearOver
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.counting import GRADIENT, INPUT, WEIGHT, Counts, Tally, count
from megaresnorm.precision.fp8 import Fp8Linear, OutputGradient
from megaresnorm.recompute import is_running_again


class Watched(LinearOver):
    """The products of another kernel, to the bit, of which inputs and outputs' gradients are counted.

    An input is counted when the forward pass multiplies it: not when backward reads it once more, nor in a second run
    of a recomputed part. What all ranks of tp have alike, the first of them counts.

    Args:
        kernel: makes the products.
        seen: takes the counts of a tensor of the class INPUT or GRADIENT.
        counts_whole: whether this rank counts what all ranks of tp have alike.
        writes_part: whether ``add_norm`` has other rows on each rank of tp.
        shards: dim over which tp shards the weight: 0 as ``ColumnLinear``, 1 as ``RowLinear``.
    """

    def __init__(
        self,
        kernel: LinearKernel,
        seen: Callable[[int, Counts], None],
        *,
        counts_whole: bool,
        writes_part: bool,
        shards: int,
    ) -> None:
        super().__init__(kernel)
        self._seen = seen
        self._counts_written = counts_whole or writes_part
        self._counts_rows = counts_whole or shards == 1
        self._counts_gradients = counts_whole or shards == 0
        self._input: tuple[Tensor, Rows] | None = None  # that the next product may read: values, as it is read

    def write(self, add_norm: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
        """See ``LinearKernel``. Values that the kernel may not have written are computed beside its results."""
        out = self._kernel.write(add_norm, args)
        if out.fp8 is not None and self._counts_written and not is_running_again():
            with torch.no_grad():
                values = add_norm(args).branch_input
            assert values is not None
            self._input = values, out.fp8
        return out

    def part(self, x: Tensor, axis: Axis, dim: int) -> Rows:
        """See ``LinearKernel``."""
        part = self._kernel.part(x, axis, dim)
        if isinstance(part, Fp8) and not is_running_again():
            self._input = x, part
        return part

    def rows(self, x: Rows) -> Any:
        """See ``LinearKernel``."""
        rows = self._kernel.rows(x)
        if isinstance(x, Tensor) and self._counts_rows and not is_running_again():
            self._input = x, rows
        return rows

    def forward(self, x: Any, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        if self._input is not None:
            values, read = self._input
            self._input = None
            self._seen(INPUT, _counts(values, read))
        return self._kernel.forward(x, operand, bias)

    def gradient(self, dy: Tensor) -> Any:
        """See ``LinearKernel``."""
        read = self._kernel.gradient(dy)
        if self._counts_gradients:
            codes = read.codes if isinstance(read, OutputGradient) else None
            self._seen(GRADIENT, _counts(dy, codes or dy))
        return read

    def weight_grad(self, dy: Any, x: Any, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        self._input = None  # which backward has read once more
        return self._kernel.weight_grad(dy, x, dtype)

    def add_weight_grad(self, total: Tensor, dy: Any, x: Any) -> None:
        """See ``LinearKernel``."""
        self._input = None
        self._kernel.add_weight_grad(total, dy, x)


class Watch:
    """The linear layers of the blocks that this rank has, to be watched for single steps.

    Args:
        blocks: (number in the model, block), with memory, before FSDP2 has gathered any.
        num_blocks: of the whole model.
        layout: the stream's.
        dtype: that products which are not in FP8 read.
        weights: by the id of a parameter what this rank has of it, where that is not the parameter's own memory.
    """

    def __init__(
        self,
        blocks: Iterable[tuple[int, torch.nn.Module]],
        num_blocks: int,
        layout: TensorLayout,
        dtype: torch.dtype,
        device: torch.device,
        weights: Mapping[int, Tensor],
    ) -> None:
        self._layers = [
            (number, layer, weights.get(id(layer.weight), local(layer.weight.detach())))
            for number, block in blocks
            for layer in block.modules()
            if isinstance(layer, Linear)
        ]
        self._num_blocks, self._layout, self._dtype, self._device = num_blocks, layout, dtype, device

    @contextmanager
    def watching(self) -> Iterator[Tally]:
        """Count the weights now, and what passes of a step within read. Not for compiled blocks.

        Weights are counted as often as there are replicas of them, as all of a block are.
        """
        tally = Tally(self._num_blocks, self._device)
        kernels = [layer.kernel for _, layer, _ in self._layers]
        for number, layer, weight in self._layers:
            tally.add(number, WEIGHT, self._counts_of_weight(layer.kernel, weight))
            layer.kernel = self._watched(layer, tally, number)
        try:
            yield tally
        finally:
            for (_, layer, _), kernel in zip(self._layers, kernels, strict=True):
                layer.kernel = kernel

    def _watched(self, layer: Linear, tally: Tally, number: int) -> Watched:
        return Watched(
            layer.kernel,
            lambda which, counts: tally.add(number, which, counts),
            counts_whole=self._layout.axis.rank == 0,
            writes_part=self._layout.name == "tokens",
            shards=0 if isinstance(layer, ColumnLinear) else 1,
        )

    @torch.no_grad()
    def _counts_of_weight(self, kernel: LinearKernel, weight: Tensor) -> Counts:
        """Of this rank's rows and columns of a weight, whose scales are its own and so clamp nothing."""
        if isinstance(kernel, Fp8Linear):
            return count(weight, kernel.weight.codes if kernel.shard is None else kernel.shard)
        return count(weight, weight.to(self._dtype))


@torch.no_grad()
def _counts(x: Tensor, read: Rows) -> Counts:
    """Of values and what is read of them. Only a scale for a whole tensor may be of other numbers, and clamp."""
    if isinstance(read, Tensor):
        return count(x, read)
    return count(x, read.codes, LARGEST[read.codes.dtype] * read.inverse if read.form == TENSOR else None)
