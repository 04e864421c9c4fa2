"""What bench_kernels.py compares: our add_norm, also with FP8, eager PyTorch, and the kernels of other projects."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.kernels.add_norm.reference import AddNormArgs, AddNormKernel, NormWeights
from megaresnorm.kernels.add_norm.spec import FORMS
from megaresnorm.kernels.fp8.formats import E4M3, Fp8, Fp8Output
from megaresnorm.kernels.fp8.quantize import QuantizeKernels
from megaresnorm.kernels.registry import backends, choose_kernel


def calls(
    device: torch.device, dtype: torch.dtype, precision: str, kind: str, weight: Tensor, bias: Tensor
) -> dict[str, Callable]:
    """Contenders as functions of (x, delta) that return (sum, output), and in FP8 what autograd does not see of it."""
    weight.requires_grad_()
    bias.requires_grad_()
    norm = NormWeights(kind, weight, bias if kind == "layernorm" else None, 1e-5)
    found: dict[str, Callable] = {}
    if precision.startswith("fp8-"):
        found |= in_fp8(device, precision.removeprefix("fp8-"), norm)
    else:
        for kernel in backends("add_norm"):
            if kernel.requires(device, dtype) is None:

                def ours(x: Tensor, delta: Tensor, function: AddNormKernel = kernel.function) -> tuple:
                    out = function(AddNormArgs(x, delta, next_norm=norm, residual_dtype=dtype, out_dtype=dtype))
                    return out.trunk, out.branch_input

                found[f"megaresnorm {kernel.backend}"] = ours
    own, own_bias = (t.detach().to(dtype).requires_grad_() for t in (weight, bias))

    def eager(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        z = x + delta
        if kind == "layernorm":
            return z, F.layer_norm(z, z.shape[-1:], own, own_bias, 1e-5)
        return z, F.rms_norm(z, z.shape[-1:], own, 1e-5)

    found["eager"] = eager
    if device.type == "cuda" or kind == "rmsnorm":  # on CPUs compiling layer_norm is slower than eager
        found["torch.compile of eager"] = torch.compile(eager)
    if device.type == "cuda" and kind == "rmsnorm":
        found |= others(own, dtype)
    return found


def in_fp8(device: torch.device, form: str, norm: NormWeights) -> dict[str, Callable]:
    """The chosen add_norm with its branch input in FP8, and in BF16 with the chosen kernel behind it."""
    bf16 = torch.bfloat16
    (kernel, _), (quantize, _) = (choose_kernel(op, "auto", device, bf16) for op in ("add_norm", "fp8_quantize"))
    quantizes: QuantizeKernels = quantize.implementation
    amax = torch.full((1, 1), 4.0, device=device) if form == "tensor" else None

    def call(x: Tensor, delta: Tensor, fp8: Fp8Output | None) -> tuple:
        args = AddNormArgs(x, delta, next_norm=norm, residual_dtype=bf16, out_dtype=bf16, fp8=fp8)
        out = kernel.function(args)
        made: Fp8 | None = out.fp8
        if made is None:
            values = out.branch_input.detach()
            made = quantizes.rows(values, FORMS[form]) if amax is None else quantizes.delayed(values, E4M3, amax)[0]
        return out.trunk, out.branch_input, *made.tensors

    return {
        f"megaresnorm {kernel.backend}": lambda x, delta: call(x, delta, Fp8Output(FORMS[form], amax)),
        f"megaresnorm {kernel.backend}, then {quantize.backend}": lambda x, delta: call(x, delta, None),
    }


def others(weight: Tensor, dtype: torch.dtype) -> dict[str, Callable]:
    """Fused add and RMSNorm of other projects, where they are installed."""
    found: dict[str, Callable] = {}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        def liger(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            y, z = LigerFusedAddRMSNormFunction.apply(x, delta, weight, 1e-5, 0.0, "llama", False)
            return z, y

        found["Liger"] = liger
    except ImportError:
        pass
    try:
        from quack.rmsnorm import rmsnorm

        def quack(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
            y, z = rmsnorm(x, weight, residual=delta, eps=1e-5, prenorm=True)
            return z, y

        found["quack"] = quack
    except ImportError:
        pass
    return found
