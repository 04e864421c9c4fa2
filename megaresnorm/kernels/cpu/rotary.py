"""Rotary on CPUs: the reference, whose norms of heads are add_norm's in C. Attention in C rotates by itself."""

from megaresnorm.kernels.add_norm.op import fused_add_norm
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.registry import register_kernel
from megaresnorm.kernels.rotary import rotary_after

register_kernel("rotary", "cpu", requires=build.requires)(rotary_after(fused_add_norm("cpu")))
