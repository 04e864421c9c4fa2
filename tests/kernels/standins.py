"""Stand-ins for packages that tests do without: their exact signatures and type rules, computed by torch in FP32.

Transformer Engine 2.1 (norms) and 2.20 (products), Apex (its master branch), liger-kernel 0.8.5, quack-kernels 0.6.5.
What a kernel overwrites is overwritten here, too, and what it would read wrongly (rows that are not contiguous, another
type) is an error.
"""

import importlib.machinery
import sys
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F

F32, BF16 = torch.float32, torch.bfloat16
ADAPTERS = ("add_norm.te", "add_norm.apex", "fp8.te", "gpu.liger", "gpu.quack")


@contextmanager
def installed():
    """The stand-ins in the place of the packages, and none of our adapters imported, before and after."""
    mine = {name: _module(name, content) for name, content in MODULES.items()}
    adapters = [f"megaresnorm.kernels.{name}" for name in ADAPTERS]
    roots = tuple({name.split(".")[0] for name in mine})
    hidden = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] in roots}
    for name in (*hidden, *adapters):
        sys.modules.pop(name, None)
    sys.modules |= mine
    try:
        yield
    finally:
        for name in (*mine, *adapters):
            sys.modules.pop(name, None)
        sys.modules |= hidden


def _module(name, content):
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    for item in content:
        name, value = item if isinstance(item, tuple) else (item.__name__, item)
        setattr(module, name, value)
    return module


def rms(x, weight, eps):
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)


def layer(x, weight, bias, eps):
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), None if bias is None else bias.float(), eps)


def gradients(function, tensors, dy):
    """Of ``function`` in the types of its tensors, for the gradient ``dy`` of what it returns in FP32."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(function(*leaves), leaves, dy.float())


# --- Transformer Engine -----------------------------------------------------------------------------------------------


class _Norm(torch.nn.Module):
    """Input is cast to the type of the weights, which is also that of the output."""

    def __init__(self, normalized_shape, *, eps=1e-5, device=None, dtype=None, zero_centered_gamma=False, sm_margin=0):
        super().__init__()
        assert device is not None, "the default is the current CUDA device"
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(normalized_shape, device=device, dtype=dtype))


class RMSNorm(_Norm):
    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, **kwargs,
    ):  # fmt: skip
        assert hidden_size is None and params_dtype is None and sequence_parallel is None, "deprecated"
        super().__init__(normalized_shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)

    def forward(self, x):
        return rms(x.to(self.weight.dtype), self.weight, self.eps).to(self.weight.dtype)


class LayerNorm(_Norm):
    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None, zero_centered_gamma=False,
        hidden_size=None, **kwargs,
    ):  # fmt: skip
        assert hidden_size is None and params_dtype is None and sequence_parallel is None, "deprecated"
        super().__init__(normalized_shape, eps=eps, zero_centered_gamma=zero_centered_gamma, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x):
        return layer(x.to(self.weight.dtype), self.weight, self.bias, self.eps).to(self.weight.dtype)


TE_DType = {
    torch.uint8: "kByte", torch.float8_e4m3fn: "kFloat8E4M3", torch.float8_e5m2: "kFloat8E5M2",
    F32: "kFloat32", BF16: "kBFloat16",
}  # fmt: skip
_TORCH_DTYPES = {value: key for key, value in TE_DType.items()}


class Float8TensorStorage:
    def __init__(
        self, *args, data, fp8_scale_inv, fp8_dtype, fake_dtype=None, data_transpose=None, quantizer=None,
        transpose_invalid=None, **kwargs,
    ):  # fmt: skip
        assert not args and not kwargs and data_transpose is None
        assert data.dtype == torch.uint8 and data.is_contiguous() and data.dim() == 2
        assert fp8_scale_inv.shape == (1,) and fp8_scale_inv.dtype == F32
        self.dtype, self.blocks = _TORCH_DTYPES[fp8_dtype], None
        self.values = data.view(self.dtype).float() * fp8_scale_inv


class Float8BlockwiseQTensorStorage:
    def __init__(
        self, rowwise_data, rowwise_scale_inv, columnwise_data, columnwise_scale_inv, fp8_dtype, quantizer,
        is_2D_scaled, *args, fake_dtype=None, **kwargs,
    ):  # fmt: skip
        assert not args and not kwargs and columnwise_data is None and columnwise_scale_inv is None
        assert rowwise_data.dtype == torch.uint8 and rowwise_data.is_contiguous()
        assert rowwise_scale_inv.dtype == F32 and rowwise_scale_inv.is_contiguous()
        (rows, columns), self.dtype, self.blocks = rowwise_data.shape, _TORCH_DTYPES[fp8_dtype], 1 + is_2D_scaled
        tiles = -(-columns // 128)
        inner = tiles if is_2D_scaled else rows
        wanted = (-(-rows // 128) if is_2D_scaled else tiles, -(-inner // 4) * 4)
        assert rowwise_scale_inv.shape == wanted, "Float8BlockQuantizer.get_scale_shape"
        scales = rowwise_scale_inv.repeat_interleave(128, 0)[:rows] if is_2D_scaled else rowwise_scale_inv.t()[:rows]
        self.values = rowwise_data.view(self.dtype).float() * scales.repeat_interleave(128, 1)[:, :columns]


def general_gemm(
    A, B, out_dtype=None, quantization_params=None, gelu=False, gelu_in=None, alpha=1.0, beta=None, accumulate=False,
    layout="TN", out=None, bias=None, use_split_accumulator=False, grad=False, ub=None, ub_type=None, extra_output=None,
    bulk_overlap=False,
):  # fmt: skip
    assert layout == "TN" and out_dtype in TE_DType and out is None and quantization_params is None and not grad
    (outputs, summed), types = A.values.shape, {A.dtype, B.dtype}
    assert summed == B.values.shape[1] and summed % 16 == 0 and outputs % 8 == 0, "the caller must pad"
    assert torch.float8_e4m3fn in types, "two of E5M2"
    assert (A.blocks is None) == (B.blocks is None) and (A.blocks, B.blocks) != (2, 2)
    assert A.blocks is None or types == {torch.float8_e4m3fn}, "its recipe's types by default"
    assert bias is None or (bias.dtype == out_dtype == BF16 and bias.shape == (outputs,))
    return F.linear(B.values, A.values, None if bias is None else bias.float()).to(out_dtype), None, None, None


# --- Apex -------------------------------------------------------------------------------------------------------------


def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype, "its kernel reads the weights in the input's type"
    assert tuple(normalized_shape) == tuple(weight.shape)
    return rms(input, weight, eps).to(input.dtype)


def mixed_dtype_fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == tuple(weight.shape)
    return rms(input, weight, eps).to(weight.dtype)


def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == tuple(weight.shape) == tuple(bias.shape)
    return layer(input, weight, bias, eps).to(weight.dtype)


# --- Liger ------------------------------------------------------------------------------------------------------------


class LigerFusedAddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        assert casting_mode == "gemma" and offset == 0.0 and not in_place
        S = (X + R).to(X.dtype)
        assert S.dtype == torch.promote_types(X.dtype, R.dtype), "the statistics would be those of the unrounded sum"
        ctx.save_for_backward(S, W)
        ctx.eps = eps
        return rms(S, W, eps).to(X.dtype), S

    @staticmethod
    def backward(ctx, dY, dS_out):
        S, W = ctx.saved_tensors
        dX, dW = gradients(lambda s, w: rms(s, w, ctx.eps), (S.float(), W), dY)
        dX = (dX + dS_out.float()).to(S.dtype)
        return dX, dX, dW, None, None, None, None


class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode == "gemma" and offset == 0.0
        ctx.save_for_backward(X, W)
        ctx.eps, ctx.in_place = eps, in_place
        return rms(X, W, eps).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        X, W = ctx.saved_tensors
        dX, dW = gradients(lambda x, w: rms(x, w, ctx.eps), (X, W), dY)
        return dY.copy_(dX) if ctx.in_place else dX, dW, None, None, None, None, None


class LigerLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, B, eps):
        ctx.save_for_backward(X, W, B)
        ctx.eps = eps
        return layer(X, W, B, eps).to(X.dtype)

    @staticmethod
    def backward(ctx, dY):
        return *gradients(lambda *t: layer(*t, ctx.eps), ctx.saved_tensors, dY), None


class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, in_place=False):
        assert not in_place
        ctx.save_for_backward(y)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate.float()).to(y.dtype) * up

    @staticmethod
    def backward(ctx, dc):
        (y,) = ctx.saved_tensors
        return *gradients(lambda y: F.silu(y.float().chunk(2, -1)[0]) * y.float().chunk(2, -1)[1], (y,), dc), None


def geglu_forward(a, b):
    assert a.is_contiguous() and b.is_contiguous()
    return a, b, F.gelu(a.float(), approximate="tanh").to(b.dtype) * b


def geglu_backward(a, b, dc):
    assert a.is_contiguous() and b.is_contiguous() and dc.is_contiguous()
    da, db = gradients(lambda a, b: F.gelu(a.float(), approximate="tanh") * b.float(), (a, b), dc)
    return a.copy_(da), b.copy_(db)


def cross_entropy_forward(
    _input, target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
    return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    assert _input.stride(-1) == 1 and weight is None and softcap is None and label_smoothing == 0.0
    assert isinstance(return_z_loss, bool)
    ignored = target == ignore_index
    assert ((target[~ignored] >= 0) & (target[~ignored] < _input.shape[1])).all()
    log_z = _input.float().logsumexp(-1)
    at = target.clamp(min=0).unsqueeze(-1)
    z_loss = torch.where(ignored, 0.0, lse_square_scale * log_z.square())
    loss = torch.where(ignored, 0.0, log_z - _input.float().gather(-1, at).squeeze(-1)) + z_loss
    if _input.requires_grad:
        gradient = (_input.float() - log_z.unsqueeze(-1)).exp() * (1 + 2 * lse_square_scale * log_z).unsqueeze(-1)
        _input.detach().copy_(gradient.scatter_add_(-1, at, torch.full_like(at, -1.0, dtype=F32)))
    _input.detach().masked_fill_(ignored.unsqueeze(-1), 0.0)
    loss, z_loss = loss.to(_input.dtype), z_loss.to(_input.dtype) if return_z_loss else None
    if reduction != "none":
        loss, z_loss = loss.sum(), None if z_loss is None else z_loss.sum()
    return loss, z_loss, None, None, _input


# --- quack ------------------------------------------------------------------------------------------------------------


class _QuackRMSNorm(torch.autograd.Function):
    """The sum is normalized before it is rounded to the residual's type; the backward pass reads it rounded."""

    @staticmethod
    def forward(ctx, x, weight, residual, out_dtype, residual_dtype, eps):
        z = x.float() if residual is None else x.float() + residual.float()
        ctx.save_for_backward(x if residual is None else z.to(residual_dtype), weight)
        ctx.eps = eps
        y = rms(z, weight, eps).to(out_dtype)
        return y if residual is None else (y, z.to(residual_dtype))

    @staticmethod
    def backward(ctx, dy, *dz):
        z, weight = ctx.saved_tensors
        dx, dw = gradients(lambda z, w: rms(z, w, ctx.eps), (z.float(), weight), dy)
        dx = dx + dz[0].float() if dz else dx
        dx = dx.to(z.dtype)
        return dx, dw, dx if dz else None, None, None, None


def rmsnorm(
    x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False,
    weight_offset=0.0,
):  # fmt: skip
    assert bias is None and weight_offset == 0.0 and prenorm == (residual is not None)
    residual_dtype = residual.dtype if residual_dtype is None and residual is not None else residual_dtype
    return _QuackRMSNorm.apply(x, weight, residual, out_dtype or x.dtype, residual_dtype, eps)


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and x.is_contiguous() and weight.dtype == F32 and (bias is None or bias.dtype == F32)
    assert return_rstd and return_mean
    mean = x.float().mean(-1)
    rstd = (x.float().var(-1, correction=0) + eps).rsqrt()
    return layer(x, weight, bias, eps).to(x.dtype), rstd, mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert x.is_contiguous() and dout.is_contiguous()
    unit = (x.float() - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    d = dout.float() * weight
    dx = (d - d.mean(-1, keepdim=True) - unit * (d * unit).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)
    return dx.to(x.dtype), (dout.float() * unit).sum(0), dout.float().sum(0) if has_bias else None


def cross_entropy_fwd(
    x, target, target_logit=None, weight=None, ignore_index=-100, return_lse=False, return_dx=False,
    inplace_backward=False,
):  # fmt: skip
    assert x.dim() == 2 and target.dim() == 1 and x.stride(-1) == 1 and target_logit is None and weight is None
    assert x.dtype in (BF16, F32) and target.dtype == torch.int64 and return_lse and not return_dx
    log_z = x.float().logsumexp(-1)
    at_label = x.float().gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(target == ignore_index, 0.0, log_z - at_label), log_z


def cross_entropy_bwd(x, target, dloss, lse, weight=None, ignore_index=-100, inplace_backward=False):
    assert x.stride(-1) == 1 and dloss.dim() == lse.dim() == 1 and dloss.dtype == lse.dtype == F32 and weight is None
    gradient = (x.float() - lse.unsqueeze(-1)).exp()
    at = target.clamp(min=0).unsqueeze(-1)
    gradient.scatter_add_(-1, at, torch.full_like(at, -1.0, dtype=F32))
    gradient *= torch.where(target == ignore_index, 0.0, dloss).unsqueeze(-1)
    dx = x.data if inplace_backward else torch.empty_like(x)  # .data: a kernel's write is not seen by autograd
    return dx.copy_(gradient)


MODULES = {
    "transformer_engine": [],
    "transformer_engine_torch": [],
    "transformer_engine.pytorch": [LayerNorm, RMSNorm],
    "transformer_engine.pytorch.constants": [("TE_DType", TE_DType)],
    "transformer_engine.pytorch.cpp_extensions": [general_gemm],
    "transformer_engine.pytorch.tensor": [],
    "transformer_engine.pytorch.tensor.storage": [],
    "transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage": [Float8BlockwiseQTensorStorage],
    "transformer_engine.pytorch.tensor.storage.float8_tensor_storage": [Float8TensorStorage],
    "apex": [],
    "apex.normalization": [],
    "apex.normalization.fused_layer_norm": [
        fused_rms_norm_affine, mixed_dtype_fused_layer_norm_affine, mixed_dtype_fused_rms_norm_affine,
    ],
    "fused_layer_norm_cuda": [],
    "liger_kernel": [],
    "liger_kernel.ops": [],
    "liger_kernel.ops.cross_entropy": [cross_entropy_forward],
    "liger_kernel.ops.fused_add_rms_norm": [LigerFusedAddRMSNormFunction],
    "liger_kernel.ops.geglu": [geglu_backward, geglu_forward],
    "liger_kernel.ops.layer_norm": [LigerLayerNormFunction],
    "liger_kernel.ops.rms_norm": [LigerRMSNormFunction],
    "liger_kernel.ops.swiglu": [LigerFusedGateUpSiLUMulFunction],
    "quack": [],
    "quack.cross_entropy": [cross_entropy_bwd, cross_entropy_fwd],
    "quack.rmsnorm": [layernorm_bwd, layernorm_fwd, rmsnorm],
}  # fmt: skip
