"""Weights that FSDP2 sends in 16 bits and ahead of time, and DDP's gradients as views of its buckets: the same bits."""

from datetime import timedelta
from types import SimpleNamespace

import cases
import pytest
import torch
import torch.distributed as dist
from cases import batches, build, make_recipe, outcome
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megaresnorm.model.transformer import Transformer
from megaresnorm.parallel import data_parallel, mesh
from megaresnorm.parallel.data_parallel import local, parts_ahead, prefetch
from megaresnorm.parallel.gathered import gather_in
from megaresnorm.parallel.linear import ColumnLinear, RowLinear
from megaresnorm.parallel.mesh import TIMEOUT, ParallelContext, Sizes, urgent_options
from megaresnorm.precision import copies
from megaresnorm.testing import run_ranks

ALL_GATHER = (
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
)  # before torch 2.13
CASES = [
    ("keel", "llama", "bf16", {}),
    ("pre", "gpt", "fp16", {}),
    ("gated", "llama", "bf16", {"reshard_after_forward": False}),
]


def count_all_gathers() -> list[int]:
    """Bytes of every all-gather that FSDP2 makes from now on, as they arrive."""
    sent: list[int] = []
    real = getattr(dist, ALL_GATHER)

    def spy(output_tensor, input_tensor, **options):
        sent.append(output_tensor.nbytes)
        return real(output_tensor, input_tensor, **options)

    setattr(dist, ALL_GATHER, spy)
    return sent


def run_of(rank: int, parallel: dict, topology: str, variant: str, compute: str, rounded: bool) -> list:
    cases.SAMPLES, cases.MICRO = 6, 1  # as many microbatches on each of two ranks or three
    sent = count_all_gathers()
    if not rounded:
        copies.gather_in = lambda dtype, model, but=(): None
    result = outcome(make_recipe(topology, variant, parallel, compute, num_blocks=3), optimizer="adamw")
    return [result.loss, result.steps, result.gradients, result.digest, sent]


@pytest.mark.parametrize("num_shards", [2, 3])
def test_gathers_in_16_bits_are_bit_for_bit_those_of_fp32(num_shards):
    """Three ranks divide no matrix evenly. Losses, gradients, and two steps of AdamW; as many messages, but smaller."""
    for topology, variant, compute, options in CASES if num_shards == 2 else CASES[:1]:
        arguments = {"dp_shard": num_shards} | options, topology, variant, compute
        for got, wanted in zip(
            run_ranks(num_shards, run_of, *arguments, True),
            run_ranks(num_shards, run_of, *arguments, False),
            strict=True,
        ):
            assert got[:2] == wanted[:2] and got[3] == wanted[3]
            assert all(torch.equal(gradient, wanted[2][name]) for name, gradient in got[2].items())
            assert len(got[4]) == len(wanted[4])
            assert sum(got[4]) < 0.65 * sum(wanted[4])


def bytes_of_parts(rank: int, topology: str, variant: str) -> list[list[int]]:
    """For one forward pass: bytes of each message; as counted from matrices in 2 bytes and all else in 4."""
    assembled, engine = build(make_recipe(topology, variant, {"dp_shard": 2}, "bf16", num_blocks=3))
    model, sent = assembled.model, count_all_gathers()
    rounded = {
        module.weight
        for module in model.modules()
        if isinstance(module, ColumnLinear | RowLinear) and module is not (model.head if variant == "gpt" else None)
    }
    parts = list(model.parts())
    inside = {parameter for part in parts for parameter in part.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in inside]
    wanted = [  # what remains of the model first, then its parts as they run
        sum((2 if p in rounded else 4) * 2 * -(-p.shape[0] // 2) * (p.numel() // p.shape[0]) for p in group)
        for group in (rest, *([*part.parameters()] for part in parts))
    ]
    engine.evaluate(batches(engine, make_recipe(topology, variant, {"dp_shard": 2}, "bf16", num_blocks=3)))
    return [sent[: len(wanted)], wanted]


@pytest.mark.parametrize(("topology", "variant"), [("keel", "llama"), ("gated", "gpt")])
def test_a_module_is_one_message_of_bf16_matrices_and_fp32_norms(topology, variant):
    for sent, wanted in run_ranks(2, bytes_of_parts, topology, variant):
        assert sent == wanted


def types_of(rank: int) -> list:
    recipe = make_recipe("keel", "llama", {"dp_shard": 2}, "bf16", num_blocks=3)
    assembled, engine = build(recipe)
    engine.gradients(batches(engine, recipe))
    gradients = [local(p.grad) for p in assembled.parameters().values()]
    engine.step(batches(engine, recipe), 1e-3)
    states = [t for p in assembled.parameters().values() for t in engine._optimizer.state(p).values()]
    slices = [s.local for group in engine.tensors.values() for s in group.values() if s.local is not None]
    updated = [t.detach() for t in engine._optimizer.tensors]
    kinds = {(type(t) is Tensor, t.dtype) for t in (*gradients, *states, *slices, *updated)}
    held = [p.untyped_storage().nbytes() for part in assembled.model.modules() for p in gathered_by(part)]
    return [len(kinds), kinds == {(True, torch.float32)}, sum(held)]


def gathered_by(part: torch.nn.Module) -> list[Tensor]:
    """The tensors in which FSDP2 receives the weights of a module, after its own step."""
    if not hasattr(part, "_get_fsdp_state"):
        return []
    group = part._get_fsdp_state()._fsdp_param_group
    return [t for p in group.fsdp_params for t in (*p.all_gather_outputs, *p._unsharded_inner_tensors)] if group else []


def test_shards_gradients_moments_and_slices_of_checkpoints_are_plain_fp32():
    """And nothing that was gathered is left after a step."""
    assert run_ranks(2, types_of) == [[1, True, 0]] * 2


def test_a_model_that_is_not_sharded_has_nothing_to_gather():
    assembled, _ = build(make_recipe("keel", "llama", {}, "bf16", num_blocks=3))
    with pytest.raises(ValueError, match="not sharded"):
        gather_in(torch.bfloat16, assembled.model)


def test_parts_are_in_the_order_in_which_they_run():
    model = build(make_recipe("keel", "llama", {}, num_blocks=3))[0].model
    assert list(model.parts()) == [model.embedding, *model.blocks.values(), model.head]
    tied = build(make_recipe("pre", "gpt", {}, num_blocks=3))[0].model
    assert list(tied.parts()) == list(tied.blocks.values())


def test_large_parts_gather_nothing_ahead_and_small_ones_at_least_the_next():
    assert [len(ahead) for ahead in parts_ahead([1 << 24] * 3)] == [0, 0, 0]
    assert parts_ahead([1, 100, 1], 10)[0] == range(1, 2)
    assert [len(ahead) for ahead in parts_ahead([3] * 6, 10)] == [3, 3, 3, 2, 1, 0]


def gathered_ahead(rank: int, num_elements: int) -> list:
    recipe = make_recipe("keel", "llama", {"dp_shard": 2}, "bf16", num_blocks=6)
    assembled, engine = build(recipe)
    model: Transformer = assembled.model
    if num_elements:
        prefetch(list(model.parts()), backward=True, num_elements=num_elements)
    sent, at_blocks = count_all_gathers(), []
    for block in model.blocks.values():
        block.register_forward_hook(lambda *_: at_blocks.append(len(sent)))
    result, _ = engine.gradients(batches(engine, recipe))
    gradients = {name: local(p.grad) for name, p in assembled.parameters().items()}
    return [result, gradients, at_blocks[:6], len(sent)]


def test_blocks_start_the_gathers_of_the_blocks_that_follow():
    """As many gathers, only earlier: when a block ends, three more of about 2,000 elements are there already."""
    ahead, plain = run_ranks(2, gathered_ahead, 6000)[0], run_ranks(2, gathered_ahead, 0)[0]
    assert ahead[0] == plain[0] and all(torch.equal(g, plain[1][name]) for name, g in ahead[1].items())
    assert plain[2] == [3, 4, 5, 6, 7, 8]  # the rest, the embedding, a block
    assert ahead[2] == [6, 7, 8, 9, 9, 9]  # the head is the last
    assert ahead[3] == plain[3]


class CopiesBack(DistributedDataParallel):
    """Gradients in memory of their own beside the buckets."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options | {"gradient_as_bucket_view": False})


def run_of_ddp(rank: int, views: bool, parallel: dict, clip: str) -> list:
    if not views:
        data_parallel.DistributedDataParallel = CopiesBack
    optim = {"clip": clip, **({"adagc_warmup": 1} if clip == "adagc" else {})}
    recipe = make_recipe("deepnorm", "gpt", parallel, "bf16", num_blocks=4, optim=optim)
    result = outcome(recipe, optimizer="adamw", steps=4)
    assembled, engine = build(recipe)
    engine.gradients(batches(engine, recipe))
    gradients = [p.grad for p in assembled.parameters().values()]
    memories = {grad.untyped_storage().data_ptr() for grad in gradients}
    return [result.loss, result.steps, result.gradients, result.digest, len(memories), len(gradients)]


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "clip"),
    [
        (2, {}, "global"),
        (2, {}, "adagc"),
        pytest.param(4, {"pp": 2, "dp_replicate": 2}, "global", marks=pytest.mark.slow),
    ],
)
def test_gradients_in_the_buckets_of_ddp_are_those_that_were_copied_back(num_ranks, parallel, clip):
    """Over microbatches, in four steps with clipping and packed tensors: after the last all are views."""
    views, copied = (run_ranks(num_ranks, run_of_ddp, kind, parallel, clip) for kind in (True, False))
    for got, wanted in zip(views, copied, strict=True):
        assert got[:2] == wanted[:2] and got[3] == wanted[3]
        assert all(torch.equal(gradient, wanted[2][name]) for name, gradient in got[2].items())
        assert got[4] <= 2 and wanted[4] > wanted[5] / 3


class Options:
    """In the place of those of nccl, which torch for CPUs does not have."""

    def __init__(self, *, is_high_priority_stream: bool) -> None:
        self.is_high_priority_stream = is_high_priority_stream


def test_only_tensor_parallel_groups_of_nccl_are_urgent(monkeypatch):
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    options = urgent_options("cuda")
    assert options.is_high_priority_stream and options._timeout == timedelta(seconds=TIMEOUT)
    assert urgent_options("cpu") is None
    asked = []

    def made(device_type, shape, *, mesh_dim_names, backend_override):
        asked.append(backend_override)
        raise InterruptedError

    monkeypatch.setattr(mesh, "init_device_mesh", made)
    for sizes, device_type in ((Sizes(tp=2), "cuda"), (Sizes(dp_shard=2), "cuda"), (Sizes(tp=2), "cpu")):
        with pytest.raises(InterruptedError):
            ParallelContext.create(sizes, device_type)
    assert list(asked[0]) == ["tp"] and asked[1:] == [None, None]
    monkeypatch.delattr(dist, "ProcessGroupNCCL")
    assert urgent_options("cuda") is None
