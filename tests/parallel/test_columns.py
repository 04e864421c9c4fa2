"""Norms over divided columns: exact for rows far from zero, few messages, nothing whole kept."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from cases import LAYOUTS, SEQ, build, make_recipe
from ranks import run_ranks

from megaresnorm.kernels.reference import NormWeights, normalize
from megaresnorm.model.residual import Stream
from megaresnorm.parallel import collectives, columns
from megaresnorm.parallel.collectives import GATHER_COLUMNS
from megaresnorm.parallel.context import ParallelContext, Sizes

ROWS, COLUMNS = 64, 256
KINDS = ["layernorm", "rmsnorm"]


def rows_far_from_zero(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """z with a mean of 100 deviations, weight, bias, and a gradient of y. Drawn in FP32, the same numbers for every type."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(ROWS, COLUMNS, generator=generator) + 100.0
    weight, bias = 1 + 0.1 * torch.randn(2, COLUMNS, generator=generator)
    dy = torch.randn(ROWS, COLUMNS, generator=generator)
    return tuple(t.to(dtype) for t in (z, weight, bias, dy))


def divided_norm(rank: int, kind: str, form: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """y and the gradients of z, weight and bias, whole."""
    axis = ParallelContext.create(Sizes(tp=dist.get_world_size()), "cpu").tp
    z, weight, bias, dy = (t.chunk(axis.size, dim=-1)[rank].clone() for t in rows_far_from_zero(dtype))
    leaves = [t.requires_grad_() for t in ((z, weight, bias) if kind == "layernorm" else (z, weight))]
    norm = NormWeights(kind, weight, bias if kind == "layernorm" else None, 1e-5)
    if form == "gather":
        y, _ = columns.gathered_norm(z, norm, axis, lambda x, n: whole_norm(x, n))
        (y * rows_far_from_zero(dtype)[3] / axis.size).sum().backward()  # every rank's gradient is a part of it
    else:
        y = columns.sharded_norm(z, norm, axis, dtype)
        (y * dy).sum().backward()
        y = GATHER_COLUMNS.apply(y, axis)
    return [y.detach(), *(GATHER_COLUMNS.apply(t.grad.reshape(-1, t.shape[-1]), axis) for t in leaves)]


def whole_norm(x: torch.Tensor, norm: NormWeights) -> tuple[torch.Tensor, torch.Tensor]:
    from megaresnorm.kernels.reference import normalize_with_statistics

    return normalize_with_statistics(x, norm)


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
        for got, exact in zip(run_ranks(num_ranks, divided_norm, kind, form, dtype)[0], wanted, strict=True):
            error = (got.view_as(exact).double() - exact).abs().max() / exact.abs().max()
            assert error < tolerance, (dtype, error)


def count_messages(rank: int, layout: str, norm: str) -> dict[str, Counter]:
    """Collectives and bytes (of what each rank gives) of one pre-norm block, forward and backward, without the model's ends."""
    recipe = make_recipe("pre", "llama", LAYOUTS[layout][1], "fp32", 2)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"norm": norm})})
    assembled, _ = build(recipe)
    model, found = assembled.model, {"forward": Counter(), "backward": Counter()}
    now = "forward"

    def counting(name, function):
        def run(*arguments, **options):
            given = arguments[1] if name in ("all_gather", "reduce_scatter") else arguments[0]
            found[now][name] += 1
            found[now]["bytes"] += given.nbytes
            return function(*arguments, **options)

        return run

    collectives.all_gather_single = columns.all_gather_single = counting("all_gather", collectives.all_gather_single)
    collectives.reduce_scatter_single = counting("reduce_scatter", collectives.reduce_scatter_single)
    dist.all_reduce = counting("all_reduce", dist.all_reduce)
    tokens = torch.zeros((2, SEQ), dtype=torch.int64)
    rows = model.rows(tokens)
    local = torch.randn(assembled.layout.tokens(torch.zeros(2 * SEQ)).shape[0], assembled.layout.width(16))
    x = model.blocks["1"](Stream(local.requires_grad_()), rows, None)
    closed = model.add_norm.trunk(x)
    now = "backward"
    closed.sum().backward()
    return found


@pytest.mark.parametrize("norm", KINDS)
def test_messages_of_a_block(norm):
    """As docs/parallel.md has them. T = 16 rows of D = 16 columns in FP32, two ranks."""
    rows, floats = 16, {"layernorm": 2, "rmsnorm": 1}[norm]
    whole, half, statistics = rows * 16 * 4, rows * 16 * 2, rows * floats * 4
    merging = "all_gather" if norm == "layernorm" else "all_reduce"
    vectors = 2 * floats * 8 * 4  # gathering: two norms' weights (and biases) travel with the stream
    expected = {
        "tp2 full": [{"all_reduce": 2, "bytes": 2 * whole}] * 2,
        "tp2 tokens": [{"all_gather": 2, "reduce_scatter": 2, "bytes": 2 * whole + 2 * half}] * 2,
        "tp2 columns, merge": [
            Counter({"all_gather": 2, "reduce_scatter": 2, "bytes": 2 * (whole + half + statistics)}) + Counter({merging: 2}),
            {"all_gather": 2, "reduce_scatter": 2, "all_reduce": 2, "bytes": 2 * (whole + half + statistics)},
        ],
        "tp2 columns, gather": [
            {"all_gather": 2, "reduce_scatter": 2, "bytes": 2 * (whole + half) + vectors},
            {"all_gather": 2, "reduce_scatter": 2, "bytes": 2 * (whole + half + 2 * statistics)},
        ],
    }  # fmt: skip
    for layout, (forward, backward) in expected.items():
        for found in run_ranks(2, count_messages, layout, norm):
            assert dict(found["forward"]) == dict(forward), (layout, "forward")
            assert dict(found["backward"]) == dict(backward), (layout, "backward")


def saved_widths(rank: int, topology: str, layout: str) -> list[tuple[int, ...]]:
    """Shapes that norms and residuals of one block keep for backward: what is saved outside of the branches."""
    assembled, _ = build(make_recipe(topology, "llama", LAYOUTS[layout][1], "fp32", 2))
    model = assembled.model
    kept: list[torch.Tensor] = []
    inside = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        if not inside:
            kept.append(t)
        return t

    block = model.blocks["1"]
    for branch in (block.attention.branch, block.ffn.branch):
        branch.register_forward_pre_hook(lambda *a: inside.append(1))
        branch.register_forward_hook(lambda *a: inside.clear())
    rows = model.rows(torch.zeros((2, SEQ), dtype=torch.int64))
    x = torch.randn(2 * SEQ, assembled.layout.width(16)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.add_norm.trunk(block(Stream(x), rows, None))
    return [tuple(t.shape) for t in kept if t.dim() == 2 and t.shape[0] == 2 * SEQ]


@pytest.mark.parametrize("topology", ["pre", "deepnorm", "keel", "sandwich", "layerscale", "subln"])
def test_norms_and_residuals_keep_no_whole_rows(topology):
    """Merging: nothing wider than D/tp. Gathering: the branch input alone, which the branch's first linear keeps anyway."""
    (shapes, _) = run_ranks(2, saved_widths, topology, "tp2 columns, merge")
    assert shapes and max(width for _, width in shapes) <= 8, shapes
    (gathered, _) = run_ranks(2, saved_widths, topology, "tp2 columns, gather")
    assert sum(width > 8 for _, width in gathered) <= 2, gathered
