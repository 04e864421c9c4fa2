"""The kernels as operators: what torch.compile, torch.export, selective recomputation and a second derivative see."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megaresnorm.kernels import load_backends, registry
from megaresnorm.kernels.activation import fused_activation
from megaresnorm.kernels.add_norm.op import fused_add_norm
from megaresnorm.kernels.add_norm.reference import AddNormArgs, NormWeights
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cpu.attention import fused_attention

load_backends()
cpu_activation = fused_activation("cpu")
pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
F32, BF16 = torch.float32, torch.bfloat16
ops = torch.ops.megaresnorm
fused = fused_add_norm("cpu")


def leaf(*shape, dtype=F32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def layer(x, delta, weight, bias):
    """A norm, a product and an activation, as a block has them."""
    out = fused(
        AddNormArgs(
            x,
            delta,
            alpha=2.0,
            next_norm=NormWeights("layernorm", weight, bias, 1e-5),
            residual_dtype=F32,
            out_dtype=F32,
        )
    )
    y, _ = fused_attention((out.branch_input @ torch.ones(16, 24)).view(2, 4, 6, 4), 2)
    return out.trunk + cpu_activation(y.reshape(8, 8), None, "gelu").repeat(1, 2)


def arguments():
    return leaf(8, 16), leaf(8, 16, seed=1), leaf(16, seed=2), leaf(16, seed=3)


NONE, RMS, LAYER = ("none", "none", "none"), ("none", "rmsnorm", "rmsnorm"), ("layernorm", "none", "layernorm")
EPS = [1e-5] * 3


def add_norm_samples():
    x, delta, gate = leaf(5, 16), leaf(5, 16, dtype=BF16, seed=1), leaf(16, seed=2)
    w = [leaf(16, seed=i) for i in range(6)]
    key, rows, plain = torch.tensor(7), torch.arange(5), (0.0, 0, "none")
    yield (x, delta, *[None] * 6, w[0], None, w[1], None, RMS, EPS, 2.0, 1.0, F32, BF16, "cpu", *plain)
    yield (x, delta, gate, None, key, rows, *w[:2], None, None, *w[4:], LAYER, EPS, 1.0, 1.0, BF16, F32, "cpu", *plain)
    turned = leaf(16, 5, seed=7).t()
    yield (
        turned,
        delta,
        *[None] * 8,
        w[1],
        None,
        ("none", "none", "rmsnorm"),
        EPS,
        1.0,
        1.0,
        F32,
        F32,
        "cpu",
        *plain,
    )
    yield (x, x.detach().clone().requires_grad_(), *[None] * 10, NONE, EPS, 1.0, 1.0, F32, BF16, "cpu", *plain)


def test_add_norm_passes_the_checks_of_torch_library():
    for sample in add_norm_samples():
        torch.library.opcheck(ops.add_norm.default, sample, rtol=1e-4, atol=1e-5)


def test_attention_and_activation_pass_the_checks_of_torch_library():
    tables = [t.detach() for t in (leaf(6, 4), leaf(6, 4, seed=1))]
    torch.library.opcheck(ops.attention.default, (leaf(2, 6, 4, 4), *tables, None, 1, 0.5), rtol=1e-4, atol=1e-5)
    for kind, columns in (("gelu", 8), ("swiglu", 16)):
        torch.library.opcheck(
            ops.activation.default, (leaf(5, columns), leaf(columns, seed=1), kind, "cpu"), rtol=1e-4, atol=1e-5
        )


def test_torch_compile_sees_whole_operators_and_gives_the_same_numbers():
    inputs = arguments()
    graphs = []

    def remember(graph, example):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    want = layer(*inputs)
    wanted = torch.autograd.grad(want.sum(), inputs)
    got = torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got.sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.compile(layer, backend=remember, fullgraph=True)(*inputs)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    for name in ("add_norm", "attention", "activation"):
        assert sum(f"megaresnorm.{name}" in c for c in called) == 1, called


def test_export_with_a_dynamic_batch():
    class Layer(torch.nn.Module):
        def forward(self, x, delta, weight):
            norm = NormWeights("rmsnorm", weight, None, 1e-5)
            return fused(AddNormArgs(x, delta, next_norm=norm, residual_dtype=F32, out_dtype=F32)).branch_input

    inputs = [t.detach() for t in arguments()[:3]]
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Layer(), tuple(inputs), dynamic_shapes=({0: rows}, {0: rows}, None))
    assert sum("add_norm" in str(node.target) for node in program.graph.nodes) == 1
    longer = [torch.cat((t, t)) for t in inputs[:2]]
    torch.testing.assert_close(program.module()(*longer, inputs[2]), Layer()(*longer, inputs[2]), rtol=0, atol=0)


def test_selective_recomputation_can_keep_or_repeat_a_kernel(monkeypatch):
    calls = []
    entry = registry.kernel_named("add_norm", "cpu")
    backend = entry.implementation
    counted = backend._replace(forward=lambda *a: (calls.append(1), backend.forward(*a)))
    monkeypatch.setitem(registry._KERNELS["add_norm"], "cpu", replace(entry, implementation=counted))
    inputs = arguments()
    want = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for policy, runs in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)):

        def keep(context, op, *args, policy=policy, **kwargs):
            return policy if op is ops.add_norm.default else CheckpointPolicy.PREFER_RECOMPUTE

        calls.clear()
        out = checkpoint(
            layer, *inputs, use_reentrant=False, context_fn=lambda keep=keep: create_selective_checkpoint_contexts(keep)
        )
        got = torch.autograd.grad(out.sum(), inputs)
        assert len(calls) == runs
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_way_past_the_dispatcher_gives_the_same_bits():
    from megaresnorm.kernels import custom_op as operator

    inputs = arguments()
    direct = layer(*inputs)
    gradients = torch.autograd.grad(direct.sum(), inputs)
    plain, operator._PLAIN = operator._PLAIN, ()
    try:
        through = layer(*inputs)
        assert torch.equal(direct, through)
        assert all(
            torch.equal(a, b) for a, b in zip(torch.autograd.grad(through.sum(), inputs), gradients, strict=True)
        )
    finally:
        operator._PLAIN = plain


def test_a_second_derivative_is_refused():
    inputs = arguments()
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(layer(*inputs).sum(), inputs, create_graph=True)
