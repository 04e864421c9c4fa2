"""Norms over a sharded hidden dimension: exact for rows far from zero, few messages, nothing whole kept."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from cases import LAYOUTS, SEQ, build, make_recipe

from megaresnorm.kernels.add_norm.reference import (
    AddNormArgs,
    NormWeights,
    add_norm,
    normalize,
)
from megaresnorm.kernels.add_norm.sharded import normalize_blocks
from megaresnorm.model.stream import Stream
from megaresnorm.parallel import transport
from megaresnorm.parallel.branch_input import GATHER_COLUMNS
from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.parallel.sharded_norm import ShardedNorm, columns_add_norm, gathered_norm
from megaresnorm.parallel.shared_memory import SharedMemory
from megaresnorm.testing import run_ranks

ROWS, COLUMNS = 64, 256
KINDS = ["layernorm", "rmsnorm"]


def rows_far_from_zero(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """z with a mean of 100 deviations, weight, bias, and a gradient of y. Drawn in FP32: equal for every type."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, COLUMNS, generator=generator) + 100.0
    weight, bias = 1 + 0.1 * torch.randn(2, COLUMNS, generator=generator)
    dy = torch.randn(ROWS, COLUMNS, generator=generator)
    return tuple(t.to(dtype) for t in (z, weight, bias, dy))


def whole_row_norm(
    rank: int, kind: str, form: str, dtype: torch.dtype, keeps: bool = False, chunks: int = 1
) -> list[torch.Tensor]:
    """y and the gradients of z, weight and bias, whole."""
    axis = ParallelContext.create(Sizes(tp=dist.get_world_size()), "cpu").tp
    z, weight, bias, dy = (t.chunk(axis.size, dim=-1)[rank].clone() for t in rows_far_from_zero(dtype))
    leaves = [t.requires_grad_() for t in ((z, weight, bias) if kind == "layernorm" else (z, weight))]
    norm = NormWeights(kind, weight, bias if kind == "layernorm" else None, 1e-5)
    if form == "gather":
        u, _ = gathered_norm(z, norm, normalize_blocks, ShardedNorm(axis), keeps=keeps)
        y = u.local
        (y * rows_far_from_zero(dtype)[3] / axis.size).sum().backward()  # every rank's gradient is a part of it
    else:
        y = ShardedNorm(axis, chunks=chunks)(z, norm, dtype)
        (y * dy).sum().backward()
        y = GATHER_COLUMNS.start((y.detach(),), axis)()
    return [y.detach(), *(GATHER_COLUMNS.start((t.grad.reshape(-1, t.shape[-1]),), axis)() for t in leaves)]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("form", ["merge", "gather"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_a_mean_of_100_deviations(kind, form, num_ranks):
    z, weight, bias, dy = rows_far_from_zero(torch.float64)
    leaves = [t.requires_grad_() for t in ((z, weight, bias) if kind == "layernorm" else (z, weight))]
    y = normalize(z, NormWeights(kind, weight, bias if kind == "layernorm" else None, 1e-5))
    (y * dy).sum().backward()
    wanted = [y.detach(), *(t.grad for t in leaves)]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        for got, exact in zip(run_ranks(num_ranks, whole_row_norm, kind, form, dtype)[0], wanted, strict=True):
            error = (got.view_as(exact).double() - exact).abs().max() / exact.abs().max()
            assert error < tolerance, (dtype, error)


def count_messages(rank: int, layout: str, norm: str, stream: str, gathered: str) -> dict[str, dict[str, int]]:
    """Collectives and bytes sent per rank of one pre-norm block, forward and backward, without embedding and head."""
    precision = {"compute": "bf16", "residual_dtype": "bf16"} if stream == "bf16" else {"compute": "fp32"}
    settings = {"precision": precision} | ({} if layout == "tp2 full" else {"recompute": {"gathered": gathered}})
    recipe = make_recipe("pre", "llama", LAYOUTS[layout][1], num_blocks=2, **settings)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"norm": norm})})
    SharedMemory.holds = lambda self, x: False
    transport._SMALL = 0
    assembled, _ = build(recipe)
    model, found = assembled.model, {"forward": Counter(), "backward": Counter()}
    now = "forward"

    def counting(name, function, place):
        def run(*arguments, **options):
            found[now][name] += 1
            found[now]["bytes"] += arguments[place].nbytes
            return function(*arguments, **options)

        return run

    transport.all_gather_single = counting("all_gather", transport.all_gather_single, 1)
    dist.all_to_all_single = counting("reduce_scatter", dist.all_to_all_single, 1)
    dist.all_reduce = counting("all_reduce", dist.all_reduce, 0)
    tokens = torch.zeros((2, SEQ), dtype=torch.int64)
    rows = model.rows(tokens)
    local = torch.randn(assembled.layout.tokens(torch.zeros(2 * SEQ)).shape[0], assembled.layout.width(16))
    x = model.blocks["1"](Stream(local.to(model.add_norm.residual_dtype).requires_grad_()), rows, None)
    closed = model.add_norm.trunk(x)
    now = "backward"
    closed.sum().backward()
    return {when: dict(counted) for when, counted in found.items()}


@pytest.mark.parametrize("gathered", ["again", "keep"])
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", KINDS)
def test_messages_of_a_block(norm, stream, gathered):
    """As docs/parallel.md has them. T = 16 rows of D = 16 columns, two ranks; statistics are FP32."""
    rows, floats = 16, {"layernorm": 2, "rmsnorm": 1}[norm]
    wide = {"fp32": 4, "bf16": 2}[stream]
    whole, half, statistics = rows * 16 * wide, rows * 8 * wide, rows * floats * 4
    vectors = 2 * floats * 8 * 4  # gathering: two norms' weights (and biases) travel with the stream
    there_and_back = {"all_gather": 2, "reduce_scatter": 2}
    again = {"all_gather": 2 + 2 * (gathered == "again"), "reduce_scatter": 2}  # what branches read, once more
    more = 2 * half * (gathered == "again")
    expected = {
        "tp2 full": [{"all_reduce": 2, "bytes": 2 * whole}] * 2,
        "tp2 tokens": [there_and_back | {"bytes": 2 * (whole + half)}, again | {"bytes": 2 * (whole + half) + more}],
        "tp2 columns, merge": [
            {"all_gather": 4, "reduce_scatter": 2, "bytes": 2 * (whole + half + statistics)},
            again | {"all_reduce": 2, "bytes": 2 * (whole + half + statistics) + more},
        ],
        "tp2 columns, gather": [
            there_and_back | {"bytes": 2 * (whole + half) + vectors},
            # The row sums travel in the reduce-scatter, once to each rank; those of a BF16 stream by themselves.
            again | {"bytes": 2 * (whole + half + 2 * statistics) + more + (vectors if more else 0)}
            if stream == "fp32"
            else again | {"all_reduce": 2, "bytes": 2 * (whole + half + statistics) + more + (vectors if more else 0)},
        ],
    }
    for layout, (forward, backward) in expected.items():
        for found in run_ranks(2, count_messages, layout, norm, stream, gathered):
            assert dict(found["forward"]) == forward, (layout, "forward")
            assert dict(found["backward"]) == backward, (layout, "backward")


def gathered_without_statistics(rank: int, kind: str) -> float:
    """Largest difference that it makes when a backend gives no statistics: of z's gradient."""
    axis = ParallelContext.create(Sizes(tp=2), "cpu").tp
    z, weight, bias, _ = (t.chunk(2, dim=-1)[rank].clone() for t in rows_far_from_zero(torch.float64))
    norm = NormWeights(kind, weight, bias if kind == "layernorm" else None, 1e-5)
    found = []
    for kernel in (add_norm, lambda args: add_norm(args)._replace(statistics=None)):
        leaf = z.clone().requires_grad_()
        args = AddNormArgs(leaf, next_norm=norm, residual_dtype=torch.float64, out_dtype=torch.float64)
        _, u = columns_add_norm(kernel, args, ShardedNorm(axis), gather=True, keeps=False)
        (u.local * torch.linspace(0, 1, COLUMNS)).sum().backward()
        found.append(leaf.grad)
    return (found[0] - found[1]).abs().max().item() / found[0].abs().max().item()


@pytest.mark.parametrize("kind", KINDS)
def test_gathering_needs_no_statistics_of_a_backend(kind):
    assert max(run_ranks(2, gathered_without_statistics, kind)) < 1e-13


def saved_shapes(rank: int, topology: str, layout: str, gathered: str) -> list[tuple[int, ...]]:
    """Shapes [T, ...] that one block keeps for backward, norms, residuals and branches."""
    recompute = {"gathered": gathered}
    assembled, _ = build(make_recipe(topology, "llama", LAYOUTS[layout][1], "fp32", 2, recompute=recompute))
    model = assembled.model
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    block = model.blocks["1"]
    rows = model.rows(torch.zeros((2, SEQ), dtype=torch.int64))
    local = assembled.layout.tokens(torch.zeros(2 * SEQ)).shape[0]
    x = torch.randn(local, assembled.layout.width(16)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.add_norm.trunk(block(Stream(x), rows, None))
    return [tuple(t.shape) for t in kept.values() if t.dim() == 2]


@pytest.mark.parametrize("layout", ["tp2 tokens", "tp2 columns, merge", "tp2 columns, gather"])
@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel", "sandwich", "layerscale", "subln"])
def test_a_block_keeps_whole_rows_only_where_it_is_told_to(topology, layout):
    """[T, D] is [16, 16]: with ``again`` none is kept, with ``keep`` that of each branch's first linear."""
    (again, _) = run_ranks(2, saved_shapes, topology, layout, "again")
    assert again and (16, 16) not in again, again
    (kept, _) = run_ranks(2, saved_shapes, topology, layout, "keep")
    assert kept.count((16, 16)) == 2, kept
