"""What a branch reads, and the three products of the linear that reads it: one result whatever is kept."""

import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, batches, build, found_with, gradients, make_recipe

from megaresnorm.kernels.add_norm.reference import NormWeights
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.parallel.collectives import start_all_gather
from megaresnorm.parallel.linear import WeightGradQueue, queue_weight_grads
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.parallel.sharded_norm import ShardedNorm
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

SHARDED = ["tp2 tokens", "tp2 columns, merge", "tp2 columns, gather"]


def assert_equal_bits(one: tuple[float, dict], other: tuple[float, dict], why: str) -> None:
    assert one[0] == other[0], why
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), (why, name)


@pytest.mark.parametrize("compute", ["fp32", pytest.param("bf16 stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", SHARDED)
def test_gathering_again_gives_the_bits_of_keeping(layout, compute):
    """For every topology: the rows that backward makes once more are those of forward."""
    recipes = [
        make_recipe(topology, "llama" if i % 2 else "gpt", LAYOUTS[layout][1], compute, 2, recompute={"gathered": how})
        for i, topology in enumerate(TOPOLOGIES)
        for how in ("again", "keep")
    ]
    for found in run_ranks(2, found_with, recipes):
        for topology, again, keep in zip(TOPOLOGIES, found[::2], found[1::2], strict=True):
            assert_equal_bits(again, keep, topology)


@pytest.mark.parametrize("layout", ["tp2 columns, merge", pytest.param("tp2 columns, gather", marks=pytest.mark.slow)])
def test_merging_in_chunks_gives_the_bits_of_merging_at_once(layout):
    topologies = ["deepnorm", "sandwich", "subln"]
    recipes = [
        make_recipe(topology, "gpt", LAYOUTS[layout][1] | {"merge_chunks": chunks}, "fp32", 2)
        for topology in topologies
        for chunks in (1, 64)  # more chunks than rows: some are empty
    ]
    for found in run_ranks(2, found_with, recipes):
        for i, topology in enumerate(topologies):
            assert_equal_bits(found[2 * i], found[2 * i + 1], topology)


def order_of_merging(rank: int, chunks: int) -> tuple[list[str], int]:
    """What the norm does, in order, and the bytes that it sends."""
    from megaresnorm.parallel import sharded_norm as module

    axis, trace, sent = ParallelContext.create(Sizes(tp=dist.get_world_size()), "cpu").tp, [], []

    def traced_gather(x, axis):
        number = len(sent)
        sent.append(x.nbytes)
        trace.append(f"start {number}")
        wait = start_all_gather(x, axis)

        def waited():
            trace.append(f"wait {number}")
            return wait()

        return waited

    module.start_all_gather = traced_gather
    norm = ShardedNorm(axis, chunks=chunks)
    real = norm.kernels

    def stats(z, kind):
        trace.append("sum")
        return real.stats(z, kind)

    def apply(*arguments):
        trace.append("apply")
        return real.apply(*arguments)

    norm = ShardedNorm(axis, real._replace(stats=stats, apply=apply), chunks)
    norm(torch.randn(12, 4), NormWeights("layernorm", torch.ones(4), None, 1e-5), torch.float32)
    return trace, sum(sent)


def test_a_chunk_is_merged_under_the_sums_of_the_next_and_the_norm_of_the_one_before():
    (whole, sent_at_once), _ = run_ranks(2, order_of_merging, 1)
    assert whole == ["sum", "start 0", "wait 0", "apply"]
    (chunked, sent), _ = run_ranks(2, order_of_merging, 3)
    assert chunked == [
        "sum", "start 0", "sum", "wait 0", "start 1", "apply", "sum", "wait 1", "start 2", "apply", "wait 2", "apply",
    ]  # fmt: skip
    assert sent == sent_at_once


def with_queue(rank: int, recipe: Recipe) -> tuple[list, int, int]:
    """Gradients without and with a queue for those of weights; how many had none before it ran, and had waited."""
    results = []
    for queue in (None, WeightGradQueue()):
        assembled, engine = build(recipe)
        for model in assembled.models.values():
            queue_weight_grads(model, queue)
        if engine.pipeline is not None:
            engine.pipeline.queue = queue
        loss, _ = engine.gradients(batches(engine, recipe))
        missing = sum(p.grad is None for p in assembled.parameters().values())
        waiting = 0 if queue is None else len(queue)
        if queue is not None:
            queue.run()
            assert len(queue) == 0
        results.append((loss, gradients(assembled)))
    return results, missing, waiting


@pytest.mark.parametrize("layout", ["tp2 full", *SHARDED, "pp2 1f1b"])
def test_weight_gradients_may_be_computed_later(layout):
    """Same bits: the order of microbatches is kept, and a branch's rows are gathered when they are needed."""
    for topology, variant in (("deepnorm", "llama"), ("keel", "gpt")):
        for results, missing, waiting in run_ranks(2, with_queue, make_recipe(topology, variant, LAYOUTS[layout][1])):
            if layout == "pp2 1f1b":  # which has computed them itself
                assert missing == waiting == 0
            else:  # four microbatches, 4 matrices in each of 8 blocks
                assert missing >= 32 and waiting >= 4 * 32, (missing, waiting)
            if variant == "gpt":  # a tied matrix adds up its two gradients in another order
                (loss, wanted), (other, got) = results
                assert loss == other
                for name, gradient in wanted.items():
                    torch.testing.assert_close(got[name], gradient, rtol=1e-13, atol=1e-14, msg=name)
            else:
                assert_equal_bits(*results, topology)


def refusal(rank: int) -> str:
    assembled, engine = build(make_recipe("deepnorm", "llama", {"dp_shard": 2, "reshard_after_forward": False}))
    engine.evaluate(batches(engine, make_recipe("deepnorm", "llama", {})))  # after which weights stay gathered
    with pytest.raises(ValueError, match="FSDP2"):
        queue_weight_grads(assembled.model, WeightGradQueue())
    return "refused"


def test_weight_gradients_that_fsdp_reduces_cannot_wait():
    assert run_ranks(2, refusal) == ["refused"] * 2
