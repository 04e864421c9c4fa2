"""What an engine must do on every device: here on CPUs, and with ``-m gpu`` the same on a GPU."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from digests import engine_digest
from torch.distributed.device_mesh import init_device_mesh

from megaresnorm.assemble import build_model
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.kernels.cross_entropy import cross_entropy_sums
from megaresnorm.parallel.data_parallel import local, replicate_model, shard_model
from megaresnorm.parallel.gathered import gather_in
from megaresnorm.parallel.mesh import MESH_AXES, Axis, ParallelContext, urgent_options
from megaresnorm.parallel.transport import transport_of
from megaresnorm.precision.dtypes import half_dtype
from megaresnorm.recipe import KernelRecipe, ModelRecipe, ParallelRecipe, PrecisionRecipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer, train

SIX = ("pre", "deepnorm", "keel", "sandwich", "gated", "layerscale")
MODEL = {"dim": 64, "num_blocks": 4, "num_heads": 4, "seq_len": 32, "vocab_size": 256, "qk_norm": "head", "bias": True}
REFERENCE = {"add_norm": "reference", "attention": "reference", "activation": "reference", "cross_entropy": "reference"}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


def engine_on(device, topology="keel", compute="fp32", kernels=None, **train):
    recipe = build_recipe({
        "model": {**MODEL, "topology": topology},
        "data": {"path": "none"},
        "train": {"output": "none", "steps": 60, "global_batch": 4, "micro_batch": 2, **train},
        "precision": {"compute": compute},
        "kernels": kernels or {},
    })  # fmt: skip
    return NativeEngine(recipe, device=device)


def step_batch(device, count=2, seed=0):
    """Rows that count upwards from a random token: something to be learned."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(256, (count, 2, 1), generator=generator)
    rows = (starts + 3 * torch.arange(33)) % 256
    parts = [Batch(r[:, :-1].to(device), r[:, 1:].to(device), torch.arange(2, device=device)) for r in rows]
    return StepBatch.of(parts)


@pytest.mark.parametrize("topology", SIX)
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_gradients_are_those_of_the_reference_kernels_on_a_cpu(topology, compute, device):
    engines = [engine_on("cpu", topology, "fp32", REFERENCE), engine_on(device, topology, compute)]
    found = []
    for engine in engines:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # away from gates of 0, behind which nothing could be seen
            for p in engine.assembled.parameters().values():
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.device))
        engine.weights_changed()
        loss, _ = engine.gradients(step_batch(engine.assembled.device))
        found.append((loss, {n: p.grad.cpu() for n, p in engine.assembled.parameters().items()}))
    (want_loss, want), (loss, got) = found
    bound = 2e-4 if compute == "fp32" else 0.1
    assert loss == pytest.approx(want_loss, rel=bound / 10)
    floor = 2e-2 * max(g.norm() for g in want.values())  # biases of keys, whose gradients are zero in mathematics
    for name, gradient in want.items():
        assert (got[name] - gradient).norm() <= bound * torch.maximum(gradient.norm(), floor), name


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_the_loss_goes_down(compute, device):
    engine = engine_on(device, "deepnorm", compute)
    losses = [engine.step(step_batch(device, seed=step), 3e-3).loss for step in range(60)]
    assert losses[0] == pytest.approx(math.log(256), rel=0.2)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]


def recipe_on(tiny, device, folder, **train):
    return tiny(train={"device": device.type, "deterministic": True, "output": str(folder), "eval_every": 0, **train})


def test_a_resumed_run_is_bit_for_bit_the_one_that_never_stopped(device, tiny, tmp_path):
    whole = recipe_on(tiny, device, tmp_path / "whole", steps=8)
    train(whole)
    parts = recipe_on(tiny, device, tmp_path / "parts", steps=8)
    with Run(parts) as run:
        for _ in range(3):
            Trainer(run).step()
        run.save()
        run.saver.wait()
    train(parts)
    with Run(whole) as one, Run(parts) as other:
        assert engine_digest(one.engine) == engine_digest(other.engine)


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_checkpoint_goes_from_one_device_to_the_other(device, there, tiny, tmp_path):
    recipe = recipe_on(tiny, device, tmp_path / "run", steps=4)
    train(recipe)
    moved = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": there, "steps": 8})})
    with Run(moved) as run:
        assert run.steps_done == 4 and run.engine.assembled.device.type == there
        record = Trainer(run).step()
    with Run(moved.model_copy(update={"train": moved.train.model_copy(update={"device": "cpu"})})) as run:
        assert Trainer(run).step()["loss"] == pytest.approx(record["loss"], rel=1e-4)


@pytest.fixture
def group(device, tmp_path):
    """A process group of one rank: the way of several, as far as one can go it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_collective_on_one_rank_gives_what_it_was_given(group, device, dtype):
    transport = transport_of(group, 0, 1, device.type)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert torch.equal(transport.start_all_reduce(x.clone(), overwrite=True)(), x)
    assert torch.equal(transport.start_all_reduce(x, overwrite=False)(), x)
    assert torch.equal(transport.start_all_gather(x)(), x.unsqueeze(0))
    assert torch.equal(transport.start_reduce_scatter(x.unsqueeze(0))(), x)


@pytest.mark.parametrize(
    ("wrap", "compute"), [("ddp", "fp32"), ("fsdp2", "fp32"), ("ddp", "bf16"), ("fsdp2", "bf16"), ("fsdp2", "fp16")]
)
def test_data_parallelism_around_a_model_leaves_its_gradients(group, device, wrap, compute):
    """In 16 bits FSDP2 gathers matrices so, small blocks ahead of time on a GPU; DDP's gradients are views."""
    mesh = init_device_mesh(device.type, (1,) * len(MESH_AXES), mesh_dim_names=MESH_AXES)
    context = replace(ParallelContext.single(), mesh=mesh)
    data = Axis("dp", 1, 0, group, transport_of(group, 0, 1, device.type))
    recipe, tokens = ModelRecipe(**{**MODEL, "num_blocks": 2}), step_batch(device, 1).microbatches[0].tokens
    found = []
    for wrapped in (False, True):
        shard = None
        if wrapped and wrap == "fsdp2":
            shard = lambda model: shard_model(model, model.parts(), context, reshard_after_forward=True)  # noqa: E731
        options = (PrecisionRecipe(compute=compute), KernelRecipe(), ParallelRecipe(), context)
        model = build_model(recipe, *options, device=device, shard=shard).model
        if shard is not None and (half := half_dtype(options[0])) is not None:
            gather_in(half, model)
        module = replicate_model(model, data) if wrapped and wrap == "ddp" else model
        for _ in range(2):  # the second time gathered weights are written where those of the first were
            model.zero_grad()
            cross_entropy_sums(module(tokens), tokens.flatten())[1].backward()
        found.append([local(p.grad).clone() for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_tensor_parallel_group_of_nccl_sends_on_an_urgent_stream(group, device):
    override = {"tp": urgent_options(device.type)}
    mesh = init_device_mesh(device.type, (1,) * len(MESH_AXES), mesh_dim_names=MESH_AXES, backend_override=override)
    tp = mesh.get_group("tp")
    assert tp._get_backend(device).options.is_high_priority_stream
    assert not mesh.get_group("dp_shard")._get_backend(device).options.is_high_priority_stream
    x = torch.randn(6, 4, device=device)
    assert torch.equal(transport_of(tp, 0, 1, device.type).start_all_reduce(x, overwrite=False)(), x)
