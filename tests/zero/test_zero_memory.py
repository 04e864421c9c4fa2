"""The memory of DeepSpeed's engine: states have as many bytes as a dry run tells, in every stage."""

from collections.abc import Iterable

import pytest
from cases import batches, build, make_recipe
from test_zero_layouts import STAGES
from torch import Tensor

from megaresnorm.memory import memory_per_rank
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]
EXACT = ("weights", "masters", "optimizer", "copies")


def in_memory(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory that tensors lie in, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocated(recipe: Recipe) -> dict[str, int]:
    """What one rank has after a step."""
    _, engine = build(recipe)
    stage = recipe.engine.zero_stage
    engine.step(batches(engine, recipe), 1e-3)
    parameters, zero = list(engine.assembled.parameters().values()), engine._engine.optimizer
    masters = [piece.master for piece in engine._partitions.pieces.values()]
    weights = [zero.lp_param_buffer] if stage == 3 else parameters
    return {
        "weights": in_memory(weights),
        "masters": in_memory([*masters, *weights]) - in_memory(weights),
        "optimizer": in_memory(t for master in masters for t in engine._optimizer.state_of(master).values()),
        "copies": 0 if engine._low_precision is None else in_memory(engine._low_precision.copies),
    }


def allocated_by_all(rank: int, recipes: list[Recipe]) -> list[dict[str, int]]:
    return [allocated(recipe) for recipe in recipes]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "tensor_layout": "columns"}], ids=["dp4", "tp2 dp2"])
def test_states_have_the_bytes_that_are_told(parallel, compute):
    recipes = [
        make_recipe("keel", "llama", parallel, compute, num_blocks=3, engine={"name": "deepspeed", "zero_stage": stage})
        for stage in STAGES
    ]
    for stage, told, *ranks in zip(
        STAGES, [memory_per_rank(r, 4) for r in recipes], *run_ranks(4, allocated_by_all, recipes), strict=True
    ):
        for kind in EXACT:
            found = max(rank[kind] for rank in ranks)
            assert getattr(told, kind) == found, (stage, kind, getattr(told, kind), [rank[kind] for rank in ranks])
