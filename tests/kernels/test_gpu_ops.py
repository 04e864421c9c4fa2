"""Activation, rotary and loss in Triton: numbers in the interpreter and on a GPU."""

import json
from pathlib import Path

import numpy
import pytest
import torch
from loss_checks import FORMS, check_loss
from ops_checks import FLOATS, KINDS, check_activation, check_rotary
from test_triton import VERSION, pairwise, run_alone

from megaresnorm.assemble import build_model
from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.activation import fused_activation
from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.cross_entropy import LogitForm, LossOfPieces
from megaresnorm.kernels.gpu import backends as gpu_backends
from megaresnorm.kernels.registry import choose_kernel, kernel_named
from megaresnorm.kernels.rotary import fused_rotary
from megaresnorm.recipe import KernelRecipe, ModelRecipe

load_backends()
HERE = Path(__file__).parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(
    VERSION < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton takes int() of an array of one element, an error since NumPy 2.4",
)
def test_numbers_in_the_interpreter():
    options = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    done = run_alone(*options, HERE / "interpreted_ops.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]


def test_a_compiler_sees_the_kernels():
    done = run_alone(HERE / "traced_ops.py")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found["graphs"]) == 2
    for operators in found["graphs"]:
        assert sum("triton_kernel_wrapper" in name for name in operators) == 2
        assert not [name for name in operators if "megaresnorm" in name]
    assert found["launches"] == {"forward_kernel": 2, "backward_kernel": 2}


def test_auto_takes_them_on_a_gpu_and_what_is_fused_by_a_compiler_stays_the_reference():
    for op in ("activation", "rotary"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert choose_kernel(op, "auto", CUDA, dtype)[0].backend == "triton"
        assert choose_kernel(op, "auto", CUDA, torch.float64)[0].backend == "reference"
        assert choose_kernel(op, "auto", CUDA, torch.bfloat16, fused=True)[0].backend == "reference"
    assert set(kernel_named("activation", "triton").kinds) == set(KINDS) == set(gpu_backends.ACTIVATIONS)


@pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
def test_rotary_on_a_cpu_has_add_norm_in_c():
    assert choose_kernel("rotary", "auto", CPU, torch.float32)[0].backend == "cpu"
    for norm in (None, "rmsnorm", "layernorm"):  # in BF16 the gradients between its operations are rounded
        for name in ("cpu", "reference"):
            check_rotary(kernel_named("rotary", name).function, 4, 2, 16, norm, "row", "fp32")


def test_a_rotary_backend_by_name_runs_and_one_that_is_not_called_is_no_choice():
    model = ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=8, vocab_size=64)
    named = build_model(model, kernels=KernelRecipe(rotary="reference"))
    assert named.backends["rotary"] == "reference" and named.model.blocks["0"].attention.branch.fused_attention is None
    found = build_model(model)
    fused = found.model.blocks["0"].attention.branch.fused_attention
    assert (fused is None) == ("rotary" in found.backends)
    assert "rotary" not in build_model(model.model_copy(update={"positions": "learned"})).backends
    tokens = torch.arange(16).view(2, 8)
    torch.testing.assert_close(named.model(tokens), found.model(tokens), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"kernels.rotary=reference has no effect: model.positions=learned"):
        build_model(model.model_copy(update={"positions": "learned"}), kernels=KernelRecipe(rotary="reference"))


def test_the_choice_of_the_loss_says_how_many_logits_there_are_at_a_time():
    model = ModelRecipe(dim=16, num_blocks=1, num_heads=2, seq_len=8, vocab_size=64)
    whole, parts = (build_model(model, logit_rows=rows).kernel_choices["cross_entropy"] for rows in (None, 1024))
    start, _, why = whole.partition(" (")
    assert parts == f"{start}, logits of 1,024 tokens at a time ({why}"


def test_what_cannot_be_computed_is_refused():
    rotary, weight = fused_rotary("triton"), torch.ones(4)
    qkv = torch.ones(1, 2, 4, 4)
    with pytest.raises(TypeError, match="float64"):
        rotary(qkv.double(), 1)
    with pytest.raises(ValueError, match="4 heads of width 4, of which 2"):
        rotary(qkv, 2)
    with pytest.raises(TypeError, match=r"wanted float32 \[2, 4\] or \[1, 2, 4\]"):
        rotary(qkv, 1, cos=torch.ones(3, 4), sin=torch.ones(3, 4))
    with pytest.raises(ValueError, match="both of cos and sin"):
        rotary(qkv, 1, cos=torch.ones(2, 4))
    with pytest.raises(ValueError, match="two alike"):
        rotary(qkv, 1, q_norm=NormWeights("rmsnorm", weight, None, 1e-5))
    with pytest.raises(ValueError, match="even"):
        fused_activation("triton")(torch.ones(2, 3), None, "geglu")


SIZES = [(199, 1128), (4097, 2816), (70_000, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "bias", "dtype", "size", "strided"), pairwise(KINDS, [False, True], list(FLOATS), SIZES, [False, True])
)
def test_activation_on_a_gpu(kind, bias, dtype, size, strided):
    check_activation(fused_activation("triton"), *size, kind, bias, dtype, device="cuda", strided=strided)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "norm", "tables", "dtype"),
    pairwise(
        [(16, 16, 64), (32, 8, 128), (9, 1, 80)],
        [None, "rmsnorm", "layernorm"],
        ["none", "row", "batch", "partial"],
        list(FLOATS),
    ),
)
def test_rotary_on_a_gpu(heads, norm, tables, dtype):
    check_rotary(fused_rotary("triton"), *heads, norm, tables, dtype, batch=3, seq=333, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "dtype", "z_loss", "ranks", "size"),
    pairwise(list(FORMS), [torch.float32, torch.bfloat16], [0.0, 1e-2], [1, 2], [(199, 50_304), (65, 131_072)]),
)
def test_loss_on_a_gpu(form, dtype, z_loss, ranks, size):
    check_loss(kernel_named("cross_entropy", "triton").implementation, *size, form, dtype, z_loss, ranks, "cuda")


@pytest.mark.gpu_all
def test_a_loss_of_more_elements_than_two_to_the_31_on_a_gpu():
    """Its last row is that of the row alone."""
    rows, width = (1 << 31) // 65_536 + 3, 65_536
    pieces, last = kernel_named("cross_entropy", "triton").implementation, torch.linspace(-3, 3, width, device="cuda")
    found = []
    for count in (rows, 1):
        outputs = torch.zeros(count, width, device="cuda", dtype=torch.bfloat16)
        outputs[-1] = last
        labels = torch.full((count,), -1, device="cuda")
        labels[-1] = 7
        leaf = outputs.requires_grad_()
        nll, objective = LossOfPieces(pieces, LogitForm(width))(leaf, labels)
        (gradient,) = torch.autograd.grad(objective, leaf)
        found.append((nll, gradient[-1].clone()))
        del outputs, leaf, gradient, objective
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
