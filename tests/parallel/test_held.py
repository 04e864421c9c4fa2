"""What a rank keeps between microbatches and after steps: FSDP2 shards of gradients, a pipeline the buffers it uses."""

import gc

import pytest
import torch
from cases import VOCAB, build, make_recipe
from torch.distributed.fsdp import FSDPModule

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.parallel.head import HeadLoss
from megaresnorm.parallel.stages import smallest_batch
from megaresnorm.testing import run_ranks

SEQ = 8


def microbatches(count: int, seed: int = 5) -> list[Batch]:
    rows = torch.randint(37, (count, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    return [Batch(row[None, :-1], row[None, 1:], torch.tensor([i])) for i, row in enumerate(rows)]


def unsharded_gradient_bytes(module: torch.nn.Module) -> int:
    """Of what FSDP2 keeps beside the shards."""
    found = 0
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in filter(None, groups):
                for p in group.fsdp_params:
                    accumulated = p.unsharded_accumulated_grad
                    found += 0 if accumulated is None else accumulated.nbytes
                    unsharded = getattr(p, "_unsharded_param", None)
                    found += 0 if unsharded is None or unsharded.grad is None else unsharded.grad.nbytes
    return found


def held_by_fsdp(rank: int, parallel: dict) -> tuple[list[int], int, float, dict]:
    assembled, engine = build(make_recipe("deepnorm", "llama", parallel, "fp64", 4))
    (module,) = engine.modules.values()
    held, real = [], engine.passes.train

    def losses(*arguments):
        held.append(unsharded_gradient_bytes(module))
        return real(*arguments)

    engine.passes.train = losses
    loss, _ = engine.gradients(StepBatch.of(microbatches(8)[rank::2], engine.stack))
    found = {name: p.grad.to_local().clone() for name, p in assembled.parameters().items()}
    whole = sum(p.numel() * 8 for p in assembled.parameters().values())
    return held, whole, loss, found


def test_fsdp_keeps_no_unsharded_gradient_between_microbatches():
    """Sharded and unsharded accumulation give the same gradients; only the latter keeps a whole model of them."""
    sharded = run_ranks(2, held_by_fsdp, {"dp_shard": 2})
    unsharded = run_ranks(2, held_by_fsdp, {"dp_shard": 2, "accumulate": "unsharded"})
    for (held, whole, loss, found), (held_before, _, loss_before, wanted) in zip(sharded, unsharded, strict=True):
        assert held == [0, 0, 0, 0]
        assert held_before == [0, whole, whole, whole]
        assert loss == loss_before
        for name, gradient in found.items():
            assert torch.allclose(gradient, wanted[name], rtol=1e-12, atol=1e-15), name


def wires(engine: NativeEngine) -> int:
    """Tensors of the wire's shape that are alive on this rank, each memory once."""
    (wire,) = next(iter(engine.assembled.models.values())).wire(1, SEQ)
    shape, dtype = tuple(wire.shape), wire.dtype
    gc.collect()
    tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    return len(
        {t.data_ptr() for t in tensors if tuple(t.shape) == shape and t.dtype == dtype and t.device.type == "cpu"}
    )


def held_by_pipeline(rank: int, parallel: dict, counts: list[int]) -> tuple[list[int], list[float], dict]:
    assembled, engine = build(make_recipe("deepnorm", "llama", parallel, "fp64", 8))
    held, losses = [], []
    for count in counts:
        loss, _ = engine.gradients(StepBatch.of(microbatches(count), engine.stack))
        held.append(wires(engine))
        losses.append(loss)
    evaluated = engine.evaluate(StepBatch.of(microbatches(counts[-1]), engine.stack))
    held.append(wires(engine))
    return held, [*losses, evaluated], {n: p.grad.clone() for n, p in assembled.parameters().items()}


def without_rings(rank: int, parallel: dict, counts: list[int]) -> tuple[list[int], list[float], dict]:
    """With torch's own stages, which keep a buffer for every microbatch and direction."""
    from torch.distributed.pipelining import PipelineStage

    from megaresnorm.parallel import pipeline

    class Last(PipelineStage):
        _validate_fwd_outputs = pipeline._LastStage._validate_fwd_outputs

        def get_fwd_send_ops(self, chunk):  # it would look for where to send the second of its losses
            return []

    pipeline._Stage, pipeline._LastStage = PipelineStage, Last
    return held_by_pipeline(rank, parallel, counts)


@pytest.mark.parametrize(
    "pipeline",
    [pytest.param("1f1b", marks=pytest.mark.slow), pytest.param("gpipe", marks=pytest.mark.slow), "interleaved"],
)
def test_a_pipeline_keeps_no_more_receive_buffers_than_its_stage_uses(pipeline):
    """After ramps of microbatches; the bits are those of a buffer for each microbatch."""
    parallel, counts = {"pp": 4, "pipeline": pipeline}, [8, 32]
    rings = run_ranks(4, held_by_pipeline, parallel, counts)
    before = run_ranks(4, without_rings, parallel, counts)
    for stage, ((held, losses, found), (held_before, losses_before, wanted)) in enumerate(
        zip(rings, before, strict=True)
    ):
        if pipeline == "1f1b":
            assert max(held) <= 4 - stage + 1, (stage, held)
            assert held_before[1] >= 32
        if pipeline != "gpipe" or stage == 0:  # which keeps all activations, and one gradient
            assert held[1] < held_before[1], (stage, held, held_before)
        assert max(held) <= max(held_before), (stage, held, held_before)
        assert losses == losses_before
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in found.items())


def logits_in_evaluation(rank: int, parallel: dict, count: int) -> tuple[int, int]:
    """The most logits that are alive in a loss of an evaluation, and after a forward pass of it."""
    assembled, engine = build(make_recipe("deepnorm", "llama", parallel, "fp64", 8))
    in_loss, after = [0], []
    gc.freeze()  # what there is already, which a collection would go through each time

    def alive() -> int:
        gc.collect()
        shapes = {(SEQ, VOCAB), (SEQ, assembled.models[max(assembled.models)].recipe.padded_vocab_size)}
        of_logits = (o for o in gc.get_objects() if type(o) is torch.Tensor and tuple(o.shape) in shapes)
        return len({o.data_ptr() for o in of_logits})

    for model in assembled.models.values():
        model.register_forward_hook(lambda *_: after.append(alive()))
        if model.head is not None:
            compute = model.head.loss.compute
            looking = lambda *inputs, compute=compute: in_loss.append(alive()) or compute(*inputs)  # noqa: E731
            model.head.loss = HeadLoss(looking)
    engine.evaluate(StepBatch.of(microbatches(count), engine.stack))
    return max(in_loss), max(after)


@pytest.mark.parametrize(
    "pipeline", ["1f1b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpipe", "interleaved"))]
)
def test_an_evaluation_has_the_logits_of_one_microbatch_and_keeps_none(pipeline):
    assert run_ranks(2, logits_in_evaluation, {"pp": 2, "pipeline": pipeline}, 8) == [(0, 0), (1, 0)]


def forwards(rank: int, count: int) -> int:
    _, engine = build(
        make_recipe("deepnorm", "llama", {"pp": 2, "pipeline": "interleaved", "stages_per_rank": 4}, "fp64", 8)
    )
    calls = []
    for model in engine.assembled.models.values():
        model.register_forward_hook(lambda *_: calls.append(1))
    engine.gradients(StepBatch.of(microbatches(count), engine.stack))
    return len(calls)


@pytest.mark.parametrize(("count", "forward"), [(1, 8), (2, 8), (3, 12), (4, 16)])
def test_interleaved_runs_as_many_microbatches_as_there_are_or_ranks(count, forward):
    """Four stages a rank: each microbatch is four forward passes of a rank."""
    assert run_ranks(2, forwards, count) == [forward, forward]


def test_the_smallest_batch_is_one_that_torch_takes():
    for pp in (2, 3, 4, 8):
        for count in range(1, 40):
            batch = smallest_batch(count, pp, "interleaved")
            rounds = max(1, batch // pp)
            assert batch >= max(count, pp) and batch % rounds == 0
            assert count % pp or batch == max(count, pp)
