"""Compiled blocks: how many graphs there are, that they compute the same, and when they are left out."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from megaresnorm.assemble import build_model
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.model.compiled import equal_runs, num_kinds, resolve_compile_mode
from megaresnorm.model.dropout import DropoutKey
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.precision.dtypes import half_dtype
from megaresnorm.precision.half import HalfCopies
from megaresnorm.recipe import KernelRecipe, ModelRecipe, PrecisionRecipe, RecomputeRecipe
from megaresnorm.recipe.load import build_recipe

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
TOKENS, LABELS = torch.randint(64, (2, 2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs, which run as they were traced: a code generator takes a quarter of a minute for each."""
    counter, compile_ = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    return counter


def model_recipe(num_blocks, topology="pre", **settings):
    return ModelRecipe(
        dim=16, num_blocks=num_blocks, num_heads=2, seq_len=8, vocab_size=64, topology=topology, **settings
    )


def built(recipe, compute="fp32", compiled="blocks", recompute=None):
    kernels = KernelRecipe(add_norm="reference", activation="reference")  # as compiled blocks take them
    assembled = build_model(recipe, PrecisionRecipe(compute=compute), kernels, compiled=compiled, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # away from gates of 0, behind which nothing could be seen
        for p in assembled.model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    if (half := half_dtype(PrecisionRecipe(compute=compute))) is not None:
        HalfCopies(assembled.model, half)
    return assembled.model


def backward(model, tokens=TOKENS, labels=LABELS, dropout=None):
    model.zero_grad()
    loss = cross_entropy_sums(model(tokens, dropout=dropout), labels.flatten())[1]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "settings",
    [{}, {"dropout": 0.25}, {"compute": "bf16"}, {"compute": "fp16"}, {"bias": True, "ffn": "gelu"}],
)
def test_a_model_is_two_graphs_at_any_depth(settings, graphs, monkeypatch):
    """The blocks that get the stream with an add pending, and the first ones."""
    monkeypatch.setattr("megaresnorm.model.compiled.BLOCKS_PER_GRAPH", 2)
    settings = dict(settings)
    compute = settings.pop("compute", "fp32")
    model = built(model_recipe(12, **settings), compute)
    for step in range(2):
        backward(model, dropout=DropoutKey(step, torch.arange(16)) if "dropout" in settings else None)
    assert graphs.frame_count == 2


def test_a_post_norm_stream_has_nothing_pending_and_one_graph(graphs):
    backward(built(model_recipe(16, "deepnorm")))
    assert graphs.frame_count == 1


@pytest.mark.parametrize(
    ("compute", "topology"), [*(("fp32", t) for t in TOPOLOGIES), ("bf16", "keel"), ("bf16", "gated")]
)
def test_compiled_blocks_compute_what_the_others_do(topology, compute, graphs):
    recipe = model_recipe(3, topology, dropout=0.25, qk_norm="head")
    key = DropoutKey(7, torch.arange(16))
    (want_loss, want), (loss, got) = (
        backward(built(recipe, compute, mode), dropout=key) for mode in ("none", "blocks")
    )
    assert graphs.frame_count > 0
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    floor = 1e-3 * max(g.norm() for g in want.values())
    bound = 1e-4 if compute == "fp32" else 0.02  # a sum is associated otherwise, which may round otherwise in BF16
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= bound * torch.maximum(gradient.norm(), floor), name


@needs_compiler
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_generated_code_computes_what_the_blocks_do(compute):
    """The same by Inductor, over all gradients together."""
    recipe = model_recipe(2, "keel", qk_norm="head")
    (want_loss, want), (loss, got) = (backward(built(recipe, compute, mode)) for mode in ("none", "blocks"))
    bound = 2e-5 if compute == "fp32" else 0.03
    assert (loss - want_loss).abs() <= bound * want_loss
    error = sum((got[n] - g).square().sum() for n, g in want.items()).sqrt()
    assert error <= bound * sum(g.square().sum() for g in want.values()).sqrt()


def test_other_shapes_evaluation_and_generation_leave_the_blocks_as_they_are(graphs):
    model, plain = built(model_recipe(8, "deepnorm")), built(model_recipe(8, "deepnorm"), compiled="none")
    backward(model)
    compiled = graphs.frame_count
    _, got = backward(model, TOKENS[:1], LABELS[:1])
    _, want = backward(plain, TOKENS[:1], LABELS[:1])
    with torch.no_grad():
        model(TOKENS)
    assert graphs.frame_count == compiled
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_documents_that_are_kept_apart_are_compiled_as_well(graphs):
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 1, 1]])
    found = []
    for mode in ("none", "blocks"):
        model = built(model_recipe(8, positions="rope"), compiled=mode)
        found.append(model(TOKENS, documents_BS=documents))
    assert graphs.frame_count == 1
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_an_engine_trains_alike_with_compiled_blocks(graphs):
    losses = []
    for mode in ("none", "blocks"):
        recipe = build_recipe({
            "model": {"dim": 16, "num_blocks": 8, "num_heads": 2, "seq_len": 8, "vocab_size": 64, "topology": "keel"},
            "data": {"path": "none"},
            "train": {"output": "none", "steps": 4, "global_batch": 4, "micro_batch": 2, "compile": mode},
            "precision": {"compute": "bf16"},
        })  # fmt: skip
        engine = NativeEngine(recipe)
        batches = [Batch(TOKENS, LABELS, torch.arange(2)), Batch(LABELS, TOKENS, torch.arange(2, 4))]
        losses.append([engine.step(StepBatch.of(batches), 1e-3).loss for _ in range(4)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and losses[0][-1] < losses[0][0]


def test_runs_are_of_equal_blocks_and_of_one_length_where_that_divides():
    lengths = lambda n, topology="pre", **options: [  # noqa: E731
        len(run) for run in equal_runs(model_recipe(n, topology, **options), range(n), 8)
    ]
    assert lengths(200) == [8] * 25 and lengths(12) == [6, 6] and lengths(5) == [5] and lengths(13) == [7, 6]
    mixed = equal_runs(model_recipe(16, "mix_ln"), range(16), 8)
    assert mixed[0] == [0, 1, 2, 3] and [n for run in mixed for n in run] == list(range(16))


def test_auto_compiles_narrow_equal_blocks_on_a_cpu_alone(monkeypatch):
    why_not = "megaresnorm.model.compiled._cannot_generate"
    monkeypatch.setattr(why_not, lambda device_type: None)
    narrow, wide = model_recipe(200), model_recipe(4).model_copy(update={"dim": 1024})
    assert resolve_compile_mode("auto", narrow, "cpu").mode == "blocks"
    assert resolve_compile_mode("auto", narrow, "cuda").mode == "blocks"
    opaque = {"opaque": "kernels.add_norm=te"}
    for recipe, options in ((wide, {}), (narrow, {"tp": 2}), (narrow, {"sharded": True}), (narrow, opaque)):
        chosen = resolve_compile_mode("auto", recipe, "cpu", **options)
        assert chosen.mode == "none" and chosen.why.startswith("auto: ")
    scaled = next(t for t in TOPOLOGIES if num_kinds(model_recipe(12, t)) > 3)  # constants that depend on the depth
    assert resolve_compile_mode("auto", model_recipe(12, scaled), "cpu").mode == "none"
    monkeypatch.setattr(why_not, lambda device_type: "no C++ compiler was found (CXX, or g++)")
    assert "compiler" in resolve_compile_mode("auto", narrow, "cpu").why


def test_on_a_gpu_a_compiler_fuses_activation_and_rotary_positions():
    narrow = model_recipe(4)
    if resolve_compile_mode("auto", narrow, "cuda").mode == "none":
        pytest.skip("no code can be generated here")
    assert resolve_compile_mode("blocks", narrow, "cuda", tp=2).fused == ("activation", "rotary")
    assert "rotary" in resolve_compile_mode("blocks", narrow, "cpu").fused


@pytest.mark.parametrize("settings", [{}, {"attention_softcap": 5.0}, {"qk_norm": "full"}])
def test_attention_after_rotary_is_one_graph_as_well(settings, graphs):
    """The way that GPUs take, where no kernel of attention rotates by itself."""
    recipe = model_recipe(3, **{"qk_norm": "head"} | settings)
    found = []
    for mode in ("none", "blocks"):
        kernels = KernelRecipe(
            add_norm="reference", activation="reference", rotary="reference", attention="reference"
        )  # fmt: skip
        model = build_model(recipe, PrecisionRecipe(), kernels, compiled=mode).model
        found.append(backward(model))
    assert graphs.frame_count == 1
    (want_loss, want), (loss, got) = found
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


POLICIES = [
    {"policy": "norm"},
    {"policy": "ffn"},
    {"policy": "branch"},
    {"policy": "block"},
    {"policy": "every", "every": 3},
    {
        "policy": "none",
        "blocks": [{"first": 1, "last": 1, "policy": "block"}, {"first": 3, "last": 3, "policy": "norm"}],
    },
]


@pytest.mark.parametrize(
    "topology", ["pre", *(pytest.param(name, marks=pytest.mark.slow) for name in ("keel", "peri"))]
)
def test_compiled_blocks_that_recompute_have_the_bits_of_those_that_do_not(topology, monkeypatch):
    """By AOT autograd, which divides a graph into forward and backward and then runs it as it is."""
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_(function, backend="aot_eager", **options)
    )
    recipe, key = model_recipe(4, topology, dropout=0.25), DropoutKey(7, torch.arange(16))
    want_loss, want = backward(built(recipe), dropout=key)
    for policy in POLICIES:
        torch._dynamo.reset()
        loss, got = backward(built(recipe, recompute=RecomputeRecipe(**policy)), dropout=key)
        different = [name for name, gradient in want.items() if not torch.equal(got[name], gradient)]
        assert torch.equal(loss, want_loss) and not different, (policy, different)


def test_blocks_that_are_run_again_one_by_one_are_one_graph(graphs):
    recipe = model_recipe(12)
    backward(built(recipe, recompute=RecomputeRecipe(policy="block")))
    assert graphs.frame_count == 1
