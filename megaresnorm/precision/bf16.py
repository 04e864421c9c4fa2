"""BF16 products, on FP32 weights or on BF16 ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaresnorm.parallel.linear import Linear
from megaresnorm.parallel.linear_kernel import PlainLinear


class Bf16Linear(PlainLinear):
    """BF16 products, by a BF16 copy of the weight where the layer has one (``Bf16Copies``).

    A microbatch's gradient of a weight is FP32 where the product can write that, else rounded to BF16; from there on it
    is accumulated over microbatches, clipped and applied in FP32.
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


class WidenedBf16Linear(PlainLinear):
    """The same products of the same BF16 numbers by FP32 instructions, for CPUs without those of BF16.

    There torch's BF16 product is a plain loop, many times slower than one in FP32. Sums are FP32 in either.
    """

    def forward(self, x: Tensor, operand: Tensor, bias: Tensor | None) -> Tensor:
        """See ``LinearKernel``."""
        return F.linear(x.float(), _widened(operand), None if bias is None else bias.to(x.dtype).float()).to(x.dtype)

    def input_grad(self, dy: Tensor, operand: Tensor) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.float() @ _widened(operand)).to(dy.dtype)

    def weight_grad(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See ``LinearKernel``."""
        return (dy.float().t() @ x.float()).to(dtype)

    def add_weight_grad(self, total: Tensor, dy: Tensor, x: Tensor) -> None:
        """See ``LinearKernel``."""
        super().add_weight_grad(total, dy.float(), x.float())


def _widened(operand: Tensor) -> Tensor:
    """BF16 numbers of a copy, or of a weight that is rounded here, in FP32."""
    return operand.to(torch.bfloat16).float()


def bf16_linear(device: torch.device) -> PlainLinear:
    """The products of a model that computes in BF16 on this device."""
    native = device.type != "cpu" or (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return Bf16Linear() if native else WidenedBf16Linear()


class Bf16Copies:
    """BF16 copies of the weights of linear layers that compute in BF16, made anew in one call after they have changed.

    Autocast would cast every weight in every microbatch. Not for weights that FSDP2 gathers for the time of their use:
    copies of all would undo the sharding.

    Args:
        model: with memory; linear layers whose kernel is not ``bf16_linear`` are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies: dict[nn.Parameter, Tensor] = {}
        for module in model.modules():
            if not isinstance(module, Linear) or module.weight.dtype == torch.bfloat16:  # such are read as they are
                continue
            if isinstance(module.kernel, Bf16Linear | WidenedBf16Linear):
                if module.weight not in self._copies:  # tied ones share a copy
                    self._copies[module.weight] = torch.empty_like(module.weight.detach(), dtype=torch.bfloat16)
                module.operand = self._copies[module.weight]
        self.refresh()

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current weights."""
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self._copies))
