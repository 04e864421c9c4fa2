"""The depth probe's ||dF|| in every layout finds a local depth, a wrong slice of a scaled matrix, a lost reduction."""

import pytest
import torch
import torch.distributed as dist

from megaresnorm.assemble import Assembled
from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.model.stream import Stream
from megaresnorm.parallel.branch_input import whole_rows
from megaresnorm.parallel.data_parallel import local
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.recipe.load import build_recipe
from megaresnorm.studies.probe_depth import LEARNING_RATE, ProbeSetting, probe
from megaresnorm.testing import run_ranks

BLOCKS = 12
SOME_TOPOLOGIES = ["pre", "post", "deepnorm", "keel", "completep", "lns", "mix_ln"]


def hidden(assembled: Assembled, tokens: torch.Tensor) -> torch.Tensor | None:
    """What the output matrix reads, on the last stage; the stages one after the other."""
    model, pp = assembled.model, assembled.context.pp
    rows = model.rows(tokens)
    if model.stage.has_embedding:
        stream = model.embed(tokens, rows)
    else:
        x = torch.empty(tokens.numel(), assembled.layout.width(model.recipe.dim), dtype=torch.float64)
        dist.recv(x, group=pp.group, group_src=pp.rank - 1)
        stream = Stream.from_wire((x,))
    stream = model.run_blocks(stream, rows)
    if model.stage.has_head:
        return whole_rows(model.finish(stream))
    (wire,) = stream.to_wire(model.add_norm)
    dist.send(wire, group=pp.group, group_dst=pp.rank + 1)
    return None


def updates(rank: int, parallel: dict) -> list[float | None]:
    """RMS of the change of the hidden state by one SGD step on the blocks' matrices, per unit of learning rate."""
    found = []
    for topology in SOME_TOPOLOGIES:
        setting = ProbeSetting()
        recipe = build_recipe(
            {
                "model": setting.model(topology, BLOCKS).model_dump(exclude_none=True),
                "data": {"path": "none"},
                "train": {"output": "none", "steps": 1, "global_batch": 4, "seed": 1},
                "precision": {"compute": "fp64"},
                "parallel": parallel,
            }
        )
        context = ParallelContext.create(Sizes(pp=parallel.get("pp", 1), tp=parallel.get("tp", 1)), "cpu")
        engine = NativeEngine(recipe, context)
        assembled = engine.assembled
        generator = torch.Generator().manual_seed(1)
        tokens, labels = torch.randint(setting.vocab_size, (2, setting.batch, setting.seq_len), generator=generator)
        engine.gradients(StepBatch.of([Batch(tokens, labels, torch.arange(4))], engine.stack))
        with torch.no_grad():
            before = hidden(assembled, tokens)
            for name, p in assembled.parameters().items():
                if name.startswith("blocks.") and p.dim() == 2 and p.grad is not None:
                    local(p).sub_(p.grad, alpha=LEARNING_RATE)
            after = hidden(assembled, tokens)
        found.append(None if after is None else ((after - before).square().mean().sqrt() / LEARNING_RATE).item())
    return found


@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [
        pytest.param(2, {"tp": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"tp": 2, "tensor_layout": "tokens"}, marks=pytest.mark.slow),
        (2, {"tp": 2, "tensor_layout": "columns"}),
        pytest.param(2, {"pp": 2}, marks=pytest.mark.slow),
        (4, {"pp": 4}),
    ],
    ids=str,
)
def test_the_model_update_is_that_of_one_process(num_ranks, parallel):
    last = run_ranks(num_ranks, updates, parallel)[-1]
    for topology, got in zip(SOME_TOPOLOGIES, last, strict=True):
        assert got == pytest.approx(probe(topology, BLOCKS, 1, ProbeSetting()).sgd_update, rel=1e-8), topology
