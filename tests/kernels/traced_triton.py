"""add_norm by Triton as torch.compile sees it. Run by test_triton.py in a process of its own, with a stub for a driver.

Prints the operators of the forward and the backward graph, and how often each kernel was launched when they ran.
"""

import json
import sys
from pathlib import Path

import torch
from torch._dynamo.backends.common import aot_autograd

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import stub_driver

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm import op
from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights

stub_driver.install()
load_backends()
kernel = op.fused_add_norm("triton")
graphs: list[list[str]] = []


def note(graph: torch.fx.GraphModule, inputs: list) -> object:
    graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward


def boxed(graph: torch.fx.GraphModule, inputs: list) -> object:
    from functorch.compile import make_boxed_func

    return make_boxed_func(note(graph, inputs))


def keel(x, delta, weights):
    norms = [NormWeights("rmsnorm", weight, None, 1e-5) for weight in weights]
    out = kernel(
        AddNormArgs(x, delta, alpha=2.0, norm=norms[0], next_norm=norms[1], residual_dtype=torch.float32,
                    out_dtype=torch.bfloat16)
    )  # fmt: skip
    return out.trunk, out.branch_input


if __name__ == "__main__":
    x = torch.zeros(64, 256, requires_grad=True)
    delta = torch.zeros(64, 256, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.ones(256, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(keel, backend=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), fullgraph=True)
    trunk, branch = compiled(x, delta, weights)
    torch.autograd.backward((trunk, branch), (torch.zeros_like(trunk), torch.zeros_like(branch)))
    print(json.dumps({"graphs": graphs, "launches": stub_driver.launches}))
