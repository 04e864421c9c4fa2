"""Products in FP8 on FP32 weights: what each linear layer reads, and the codes of its weight.

A product sums along the last dimension of both of its operands, whose elements share scales there as the recipe says:

                      input x [T, K]      weight w [N, K]      gradient dy [T, N]
    tensorwise        the tensor          the tensor           the tensor
    rowwise           a token             an output            a token
    block             128 of a token      128 x 128            128 of a token
    mxfp8             32 of a token       32 of an output      32 of a token

    y  = x w^T     x and w as in the table
    dx = dy w      the same codes of w, transposed. Under rowwise its scales lie along the sum: dy is multiplied by
                   them before it is rounded, which is exact. Under mxfp8 codes are scaled anew, along the outputs
    dw = dy^T x    BF16: dy as it is, and x as y's product has read it. FP8: both with scales along the tokens; codes
                   of x are scaled anew

Codes that are scaled anew are the same numbers, but for those that fall below the smallest normal one.

T tokens   K in_dim   N out_dim
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, AddNormOutput
from megaresnorm.kernels.fp8.formats import (
    E4M3,
    E5M2,
    MX,
    ROW,
    TENSOR,
    Fp8,
    Fp8Output,
    Rows,
    amax_of,
    dequantize,
    transposed,
)
from megaresnorm.kernels.fp8.product import FORMS, ProductKernel
from megaresnorm.kernels.fp8.quantize import QuantizeKernels
from megaresnorm.parallel.collectives import largest
from megaresnorm.parallel.linear import ColumnLinear, Linear
from megaresnorm.parallel.linear_kernel import LinearKernel
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.delayed import GRADIENTS, INPUTS, Delayed, DelayedScales
from megaresnorm.recipe import Fp8Recipe

_TYPES = {"e4m3": E4M3, "e5m2": E5M2}


class OutputGradient(NamedTuple):
    """An output's gradient [T, N] as products read it.

    Attributes:
        values: in BF16.
        codes: for the product for the input's gradient; None where that is in BF16.
    """

    values: Tensor
    codes: Fp8 | None


class Fp8Linear:
    """The products of one linear layer in FP8.

    Args:
        recipe: how they are scaled.
        product: the backend of FP8 products.
        quantize: the backend that rounds what no norm has written in FP8.
        bf16: the products that stay in BF16.
        inputs: the axis over which inputs are sharded, as in ``RowLinear``; None: they are whole.
        outputs: the axis over which outputs are sharded, as in ``ColumnLinear``.

    Attributes:
        weight: the weight in FP8, which ``Fp8Weights`` or ``Fp8Shards`` renew.
        shard: the codes of this rank's rows of the weight, where FSDP2 has sharded it; None: ``weight`` has them.
        delayed: the largest numbers of earlier steps; None with current scaling.
    """

    weight: Fp8
    shard: Tensor | None = None

    def __init__(
        self,
        recipe: Fp8Recipe,
        product: ProductKernel,
        quantize: QuantizeKernels,
        bf16: LinearKernel,
        *,
        inputs: Axis | None = None,
        outputs: Axis | None = None,
    ) -> None:
        self.forms = FORMS[recipe.recipe]
        self._gradients = _TYPES.get(recipe.gradients)
        self._weight_grad_in_fp8 = recipe.weight_grad == "fp8"
        self._product, self._quantize, self._bf16 = product, quantize, bf16
        self._inputs, self._outputs = inputs, outputs
        self.delayed: Delayed | None = None

    def write(self, add_norm: AddNormKernel, args: AddNormArgs) -> AddNormOutput:
        """See ``LinearKernel``. One scale for all needs to be known before."""
        if self.forms.rows != TENSOR:
            return add_norm(replace(args, fp8=Fp8Output(self.forms.rows)))
        amax = None if self.delayed is None else self.delayed.amax(INPUTS)
        if self.delayed is None or amax is None:
            return add_norm(args)
        out = add_norm(replace(args, fp8=Fp8Output(TENSOR, amax)))
        assert out.amax is not None
        self.delayed.saw(INPUTS, out.amax)
        return out

    def rows(self, x: Rows) -> Fp8:
        """See ``LinearKernel``."""
        return x if isinstance(x, Fp8) else self._quantized(x, self._inputs if self.forms.rows == TENSOR else None)

    def part(self, x: Tensor, axis: Axis, dim: int) -> Rows:
        """See ``LinearKernel``. Columns of which scales are shared with other ranks' by halves are sent as they are."""
        form = self.forms.rows
        if form.spans(dim):
            return self._quantized(x, axis)
        return self._quantized(x, None) if dim == 0 or form.divides(x.shape[1]) else x

    def gradient(self, dy: Tensor) -> OutputGradient:
        """See ``LinearKernel``."""
        dtype, (form, weight) = self._gradients, self.forms
        if dtype is None:
            return OutputGradient(dy, None)
        if form != TENSOR:
            factor = self.weight.inverse.flatten() if weight == ROW else None
            return OutputGradient(dy, self._quantize.rows(dy, form, dtype, factor=factor))
        return OutputGradient(dy, self._in_tensor(dy, dtype, self._outputs, GRADIENTS))

    def forward(self, x: Rows, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        assert isinstance(x, Fp8)
        return self._product(x, self.weight, bias, torch.bfloat16, precise=False)

    def input_grad(self, dy: OutputGradient, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        if dy.codes is None:
            return self._bf16.input_grad(dy.values, dequantize(self.weight, dy.values.dtype))
        if self.forms.weight == MX:
            weight = self._quantize.transposed(self.weight, MX, E4M3)
        else:
            weight = transposed(self.weight)
        if weight.form == ROW.transposed:  # whose scales are in dy
            weight = Fp8(weight.codes, torch.ones_like(weight.inverse.t()[:1]).expand(len(weight.codes), 1), ROW)
        return self._product(dy.codes, weight, None, dy.values.dtype, precise=True)

    def weight_grad(self, dy: OutputGradient, x: Rows, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        assert isinstance(x, Fp8)
        values = dy.values
        if not self._weight_grad_in_fp8:
            return self._bf16.weight_grad(values, dequantize(x, values.dtype), dtype)
        form = self.forms.rows
        assert dy.codes is not None and self._gradients is not None, "checked with the recipe"
        if form == TENSOR:
            return self._product(transposed(dy.codes), transposed(x), None, dtype, precise=True)
        x_KT = self._quantize.transposed(x, form, E4M3)
        dy_NT = self._quantize.transposed(values, form, self._gradients)
        return self._product(dy_NT, x_KT, None, dtype, precise=True)

    def add_weight_grad(self, total: Tensor, dy: OutputGradient, x: Rows) -> None:
        """See ``LinearKernel``."""
        total += self.weight_grad(dy, x, total.dtype)

    def _quantized(self, x: Tensor, axis: Axis | None) -> Fp8:
        """x in FP8.

        Args:
            axis: of ranks that share scales.
        """
        form = self.forms.rows
        if form == TENSOR:
            return self._in_tensor(x, E4M3, axis, INPUTS)
        return self._quantize.rows(x, form, E4M3, amax=None if axis is None else largest(amax_of(x, form), axis))

    def _in_tensor(self, x: Tensor, dtype: torch.dtype, axis: Axis | None, which: int) -> Fp8:
        """x with one scale: of earlier steps' largest numbers, else of its own, and of other ranks' on the axis."""
        before = None if self.delayed is None else self.delayed.amax(which)
        if before is None:
            own = amax_of(x, TENSOR)
            q = self._quantize.rows(x, TENSOR, dtype, amax=own if axis is None else largest(own, axis))
        else:
            q, own = self._quantize.delayed(x, dtype, before)
        if self.delayed is not None:
            self.delayed.saw(which, own)
        return q


def compute_in_fp8(
    blocks: Iterable[nn.Module], recipe: Fp8Recipe, product: ProductKernel, quantize: QuantizeKernels
) -> None:
    """Let the linear layers of blocks, which compute in BF16, compute in FP8."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Linear):
                axes = {"outputs": module.axis} if isinstance(module, ColumnLinear) else {"inputs": module.layout.axis}
                module.kernel = Fp8Linear(recipe, product, quantize, module.kernel, **axes)


def fp8_layers(models: Iterable[nn.Module]) -> dict[str, tuple[Linear, Fp8Linear]]:
    """The layers in FP8 by the name of their weight, and the products of each."""
    return {
        f"{name}.weight": (module, module.kernel)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, Linear) and isinstance(module.kernel, Fp8Linear)
    }


def delayed_scales(
    layers: Mapping[str, tuple[Linear, Fp8Linear]], names: Sequence[str], recipe: Fp8Recipe, device: torch.device
) -> DelayedScales:
    """Let layers take their scales from earlier steps.

    Args:
        layers: in FP8, by the name of their weight.
        names: of weights whose layers may be in FP8, in the order of the scales.
    """
    scales = DelayedScales(len(names), recipe.history, device)
    for number, name in enumerate(names):
        if name in layers:
            layers[name][1].delayed = Delayed(scales, number)
    return scales


def fp8_blocks(recipe: Fp8Recipe, num_blocks: int) -> range:
    """The blocks whose linear layers are in FP8."""
    return range(recipe.bf16_first_blocks, num_blocks - recipe.bf16_last_blocks)
