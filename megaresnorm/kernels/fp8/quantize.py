"""Quantization as an op with backends: what linear layers read that no norm has written in FP8.

kernels/fp8/formats.py is the specification. Triton is imported when its backend is called and not before.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megaresnorm.kernels.fp8 import formats
from megaresnorm.kernels.fp8.formats import BLOCK, E4M3, MX, ROW, TENSOR, Form, Fp8, Rows, amax_of, tensors_of
from megaresnorm.kernels.gpu.requires import fp8_requires
from megaresnorm.kernels.registry import register_kernel


class QuantizeKernels(NamedTuple):
    """The kernels of a backend, each as the function of ``formats`` that it is named after.

    Attributes:
        rows: ``quantize``.
        delayed: ``quantize_delayed``.
        transposed: ``quantize_transposed``.
    """

    rows: Callable[..., Fp8]
    delayed: Callable[[Tensor, torch.dtype, Tensor], tuple[Fp8, Tensor]]
    transposed: Callable[[Rows, Form, torch.dtype], Fp8]


REFERENCE = QuantizeKernels(formats.quantize, formats.quantize_delayed, formats.quantize_transposed)
register_kernel("fp8_quantize", "reference", implementation=REFERENCE)(formats.quantize)


_ALONG = (ROW, BLOCK, MX)  # forms whose scales belong to one row


def _run(name: str, x: Tensor, *arguments: Any, **options: Any) -> Any:
    with torch.cuda.device_of(x):
        return getattr(importlib.import_module("megaresnorm.kernels.fp8.triton_quantize"), name)(*arguments, **options)


def _rows(
    x: Tensor, form: Form, dtype: torch.dtype = E4M3, *, amax: Tensor | None = None, factor: Tensor | None = None
) -> Fp8:
    if form not in (TENSOR, *_ALONG):
        return formats.quantize(x, form, dtype, amax=amax, factor=factor)
    if form == TENSOR and amax is None:
        amax = amax_of(x if factor is None else x * factor.to(x.dtype), TENSOR)
    return _run("quantize", x, x, form, dtype, amax=amax, factor=factor)


def _delayed(x: Tensor, dtype: torch.dtype, amax: Tensor) -> tuple[Fp8, Tensor]:
    return _run("quantize_delayed", x, x, dtype, amax)


def _transposed(x: Rows, form: Form, dtype: torch.dtype = E4M3) -> Fp8:
    if form not in _ALONG or (isinstance(x, Fp8) and x.form not in _ALONG):
        return formats.quantize_transposed(x, form, dtype)
    return _run("quantize_transposed", tensors_of(x)[0], x, form, dtype)


register_kernel(
    "fp8_quantize", "triton", requires=fp8_requires, implementation=QuantizeKernels(_rows, _delayed, _transposed)
)(_rows)
