"""FP8 products by torch: by cuBLAS and CUTLASS on NVIDIA GPUs, in FP32 on CPUs.

                scales of a and b           GPUs                                          CPUs
    tensorwise  TENSOR, TENSOR              compute capability 8.9 and newer              torch 2.11 and newer
    rowwise     ROW, ROW                    8.9 and newer                                 torch 2.13 and newer
    block       BLOCK, TILE or BLOCK        9.0 alone, E4M3 alone, cuBLAS 12.9 or newer   no

On GPUs K and N must be multiples of 16 (K is padded: it may be a number of tokens), one of the operands must be in
E4M3, and only BF16 results can have a bias. That is what torch's source says; it has not been run on a GPU yet. So
whether a device has a recipe is not looked up but tried, once for each, with small products that are compared with
those of the emulation.

M rows   N outputs   K summed   L blocks of 128 along K
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from megaresnorm.kernels.fp8.formats import (
    BLOCK,
    E4M3,
    E5M2,
    ROW,
    TENSOR,
    TILE,
    Form,
    Fp8,
    dequantize,
    quantize,
)  # fmt: skip
from megaresnorm.kernels.fp8.product import FORMS, emulated, padded
from megaresnorm.kernels.registry import Refusal, register_kernel

_TRIED = {  # recipe -> forms of b, and types of a; b is in E4M3
    "tensorwise": ((TENSOR,), (E4M3, E5M2)),
    "rowwise": ((ROW,), (E4M3, E5M2)),
    "block": ((TILE, BLOCK), (E4M3,)),
}
_SCALINGS = {
    TENSOR: ScalingType.TensorWise, ROW: ScalingType.RowWise, BLOCK: ScalingType.BlockWise1x128,
    TILE: ScalingType.BlockWise128x128,
}  # fmt: skip
_ALIGNED = 4  # a multiple of so many scales stands between two columns of 128 x 128


def _requires(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return "made for CPUs and NVIDIA GPUs"
    return "torch sees no GPU here" if device.type == "cuda" and not torch.cuda.is_available() else None


def _has(recipe: str) -> Refusal:
    return lambda device, dtype: _failure(recipe, device)


def _avoid(device: torch.device, dtype: torch.dtype) -> str | None:
    # One thread of an EPYC without AMX, torch 2.13: BF16 results take 2.4 times the emulation's time at M = 2048 and
    # K = N = 1024, 4 and more at 512, 9 for one token; FP32 results 1.2. It decodes slowly, and multiplies in FP32.
    return "several times slower than the emulation on CPUs" if device.type == "cpu" else None


@register_kernel("fp8_product", "torch", _requires, _avoid, kinds={recipe: _has(recipe) for recipe in _TRIED})
def product(a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
    """See ``emulated``."""
    if dtype != torch.float32:
        return _scaled_mm(a, b, None if bias is None else bias.to(dtype), dtype, precise)
    if a.form == ROW:  # with rows' own scales only some GPUs write FP32; powers of two are as exact afterwards
        one = a.inverse.new_ones(1, 1)
        sums = _scaled_mm(Fp8(a.codes, one, TENSOR), Fp8(b.codes, one, TENSOR), None, dtype, precise)
        y = sums.mul_(a.inverse).mul_(b.inverse.t())
    else:
        y = _scaled_mm(a, b, None, dtype, precise)
    return y if bias is None else y.add_(bias)


def _scaled_mm(a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, precise: bool) -> Tensor:
    codes_a, codes_b = padded(a).codes.contiguous(), padded(b).codes.contiguous().t()
    scale_a, scale_b = _laid_out(a), _laid_out(b)
    if b.form == ROW:
        scale_b = scale_b.t()
    fast = not precise and a.form != BLOCK  # blocks are always summed in FP32
    if a.codes.is_cpu and not _has_scaled_mm_on_cpus():
        return torch._scaled_mm(codes_a, codes_b, scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)
    return F.scaled_mm(
        codes_a, codes_b, scale_a, _SCALINGS[a.form], scale_b, _SCALINGS[b.form],
        bias=bias, output_dtype=dtype, use_fast_accum=fast,
    )  # fmt: skip


@cache
def _has_scaled_mm_on_cpus() -> bool:
    """Whether F.scaled_mm runs on CPUs, as from torch 2.13 on; before, the function that it replaces does."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU")


def _laid_out(q: Fp8) -> Tensor:
    """Inverse scales as torch reads them."""
    rows, columns = q.inverse.shape
    if q.form == BLOCK:  # [M, L], a block of all rows after another
        return torch.empty_strided((rows, columns), (1, rows), device=q.inverse.device).copy_(q.inverse)
    if q.form == TILE:  # [L, N / 128], L a multiple of 4 and innermost
        padded = q.inverse.new_zeros(rows, -(-columns // _ALIGNED) * _ALIGNED)
        padded[:, :columns] = q.inverse
        return padded.t()
    return q.inverse.contiguous()


@cache
def _failure(recipe: str, device: torch.device) -> str | None:
    """Why this device cannot multiply as a recipe wants it; None where it can."""
    if device.type == "cpu" and recipe != "tensorwise" and not _has_scaled_mm_on_cpus():
        return f"torch {torch.__version__} has no {recipe} product on CPUs"
    forms, types = _TRIED[recipe]
    for form in forms:
        b = _sample(160, form, E4M3, device)
        for type_a in types:
            a = _sample(48, FORMS[recipe].rows, type_a, device)
            for dtype, bias in ((torch.bfloat16, a.inverse.new_ones(160)), (torch.float32, None)):
                try:
                    got = product(a, b, bias, dtype, precise=bias is None)
                except (RuntimeError, ValueError) as e:
                    said = (str(e) or type(e).__name__).splitlines()[0][:100]
                    return f"torch {torch.__version__} has no {recipe} product here ({said.rstrip('.')})"
                if not _agree(got, a, b, bias):
                    return f"torch {torch.__version__} computes {recipe} products otherwise than the emulation"
    return None


def _sample(rows: int, form: Form, dtype: torch.dtype, device: torch.device, columns: int = 272) -> Fp8:
    """Numbers [rows, columns] whose scales differ, with a block that is not whole."""
    i = torch.arange(rows * columns, device=device).view(rows, columns)
    sizes = torch.exp2((i // columns % 5 + i % columns // 128 * 2 + i // columns // 128).float())
    return quantize((i.float() * 0.7).sin() * sizes, form, dtype)


def _agree(got: Tensor, a: Fp8, b: Fp8, bias: Tensor | None) -> bool:
    """Whether a product is right but for its sums, of which GPUs may keep no more than 13 bits."""
    want = emulated(a, b, bias, torch.float32, precise=True)
    sizes = dequantize(a).abs() @ dequantize(b).abs().t()
    return bool(((got.float() - want).abs() <= 2.0**-9 * sizes + 2.0**-8 * want.abs()).all())
