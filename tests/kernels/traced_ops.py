"""Activation and rotary by Triton as torch.compile sees them, as traced_triton.py does it for add_norm."""

import json

import torch
from torch._dynamo.backends.common import aot_autograd
from traced_triton import boxed, graphs, stub_driver

from megaresnorm.kernels.activation import fused_activation
from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.kernels.rotary import fused_rotary

activate, rotary = fused_activation("triton"), fused_rotary("triton")


def both(h, bias, qkv, table, weights):
    norms = [NormWeights("rmsnorm", weight, None, 1e-5) for weight in weights]
    return activate(h, bias, "geglu"), *rotary(qkv, 1, cos=table, sin=table, q_norm=norms[0], k_norm=norms[1])


if __name__ == "__main__":
    stub_driver.launches.clear()
    h, bias = torch.zeros(64, 256, requires_grad=True), torch.zeros(256, requires_grad=True)
    qkv, table = torch.zeros(2, 8, 4, 16, requires_grad=True), torch.zeros(8, 16)
    weights = [torch.ones(16, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(both, backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True)
    outputs = compiled(h, bias, qkv, table, weights)
    torch.autograd.backward(outputs, [torch.zeros_like(t) for t in outputs])
    print(json.dumps({"graphs": graphs, "launches": stub_driver.launches}))
