"""FP8 products by NVIDIA Transformer Engine, 2.12 and newer, whose GEMM takes codes and inverse scales as they are.

Written against its source, versions 2.12 to 2.20; it has not been run with the package on a GPU yet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.cpp_extensions import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage import Float8BlockwiseQTensorStorage
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

from megaresnorm.kernels.fp8.formats import TENSOR, TILE, Fp8
from megaresnorm.kernels.fp8.product import padded

ALIGNED = 4  # scales of a row are as many as a multiple of this


def product(a: Fp8, b: Fp8, bias: Tensor | None, dtype: torch.dtype, *, precise: bool) -> Tensor:
    """See ``emulated``; with one scale for each tensor, or 128 x 128 in b and 128 of a row in a, or those in both."""
    fused = None if bias is None or dtype == torch.float32 else bias.to(dtype)
    y, *_ = general_gemm(
        _stored(b), _stored(a), out_dtype=dtype, layout="TN", bias=fused, use_split_accumulator=precise
    )
    return y if bias is None or fused is not None else y.add_(bias)


def _stored(q: Fp8) -> Float8TensorStorage | Float8BlockwiseQTensorStorage:
    """Codes and scales as the GEMM reads them. Blocks of a row: [blocks, rows]; of 128 x 128: as they are."""
    codes, dtype = padded(q).codes.contiguous().view(torch.uint8), TE_DType[q.codes.dtype]
    if q.form == TENSOR:
        return Float8TensorStorage(data=codes, fp8_scale_inv=q.inverse.view(1), fp8_dtype=dtype)
    inverse = q.inverse if q.form == TILE else q.inverse.t()
    return Float8BlockwiseQTensorStorage(
        rowwise_data=codes,
        rowwise_scale_inv=F.pad(inverse, (0, -inverse.shape[1] % ALIGNED)).contiguous(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=dtype,
        quantizer=None,
        is_2D_scaled=q.form == TILE,
    )
