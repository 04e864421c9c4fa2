"""Products in BF16 or FP16, on FP32 weights or on BF16 ones. FP16's gradients need a loss scale (loss_scale.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.linear_kernel import PlainLinear


class HalfLinear(PlainLinear):
    """Products of 16-bit numbers, by a copy of the weight where the layer has one (``HalfCopies``).

    A microbatch's gradient of a weight is FP32 where the product can write that, else rounded to the input's type, in
    which what FP16 cannot hold is infinite; from there on it is accumulated over microbatches, clipped and applied in
    FP32.
    """

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``. On a GPU the product's FP32 sums are written as they are."""
        if not dy.is_cpu and dtype == torch.float32:
            return torch.mm(dy.t(), x, out_dtype=torch.float32)
        return super().weight_grad(dy, x, dtype)

    def add_weight_grad(self, total: Tensor, dy: Tensor, x: Tensor) -> None:
        """See ``LinearKernel``. On a GPU the product adds its FP32 sums itself."""
        if not dy.is_cpu and total.dtype == torch.float32:
            torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)
        else:
            super().add_weight_grad(total, dy, x)


class WidenedHalfLinear(PlainLinear):
    """The same products of the same 16-bit numbers by FP32 instructions, for CPUs without those of the type.

    There torch's product is a plain loop, many times slower than one in FP32. Sums are FP32 in either.
    """

    def forward(self, x: Tensor, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        rounded = None if bias is None else bias.to(x.dtype).float()
        return F.linear(x.float(), _widened(operand, x.dtype), rounded).to(x.dtype)

    def input_grad(self, dy: Tensor, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.float() @ _widened(operand, dy.dtype)).to(dy.dtype)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.float().t() @ x.float()).to(dtype)

    def add_weight_grad(self, total: Tensor, dy: Tensor, x: Tensor) -> None:
        """See ``LinearKernel``."""
        super().add_weight_grad(total, dy.float(), x.float())


def _widened(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """The 16-bit numbers of a copy, or of a weight that is rounded here, in FP32."""
    return operand.to(dtype).float()


def half_linear(dtype: torch.dtype, device: torch.device) -> PlainLinear:
    """The products of a model that computes in BF16 or FP16 on this device."""
    known = torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        native = device.type != "cpu" or (known and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    else:
        native = device.type != "cpu" or (known and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return HalfLinear() if native else WidenedHalfLinear()


class HalfCopies:
    """16-bit copies of the weights of linear layers that compute so, made anew in one call after they have changed.

    Autocast would cast every weight in every microbatch. Not for weights that FSDP2 gathers for the time of their use:
    copies of all would undo the sharding. A weight that FP16 cannot hold is infinite in its copy, and the loss tells.

    Args:
        model: with memory; linear layers whose kernel is not ``half_linear`` are left out.
        dtype: BF16 or FP16.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._copies: dict[nn.Parameter, Tensor] = {}
        for module in model.modules():
            if isinstance(module, Linear) and isinstance(module.kernel, HalfLinear | WidenedHalfLinear):
                if module.weight not in self._copies:  # tied ones share a copy
                    self._copies[module.weight] = torch.empty_like(module.weight.detach(), dtype=dtype)
                module.operand = self._copies[module.weight]
        self.refresh()

    @property
    def tensors(self) -> list[Tensor]:
        """See ``WeightCopies``."""
        return list(self._copies.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
