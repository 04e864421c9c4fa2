"""Depth telemetry is the same in every layout and under every recomputation, and changes no bit of a step."""

import json
from math import isnan

import pytest
import torch
from cases import LAYOUTS, SEQ, VOCAB, batches, build, make_recipe
from digests import engine_digest

from megaresnorm.data.loader import Batch
from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import Recipe
from megaresnorm.telemetry.depth import rows as rows_module
from megaresnorm.telemetry.depth.probe import DepthProbe
from megaresnorm.telemetry.depth.watch import DepthWatch
from megaresnorm.testing import run_ranks

LR = 1e-3


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """Of two sequences of eight tokens every second, in the forked ranks as well."""
    monkeypatch.setattr(rows_module, "ROWS", 8)


def probed_batch(recipe: Recipe) -> Batch:
    generator = torch.Generator().manual_seed(9)
    rows = torch.randint(VOCAB, (2, SEQ + 1), generator=generator)
    documents = torch.randint(2, (2, SEQ), generator=generator).cumsum(1) if recipe.data.mask_documents else None
    return Batch(rows[:, :-1], rows[:, 1:], torch.arange(2), documents)


def figures_of(recipe: Recipe) -> list[dict]:
    """Of two watched steps and two probes, which leave the bits of an engine that makes the same steps unseen."""
    _, plain = build(recipe)
    assembled, engine = build(recipe)
    watch = DepthWatch(recipe.model, assembled, TensorNorms(engine, recipe.optim))
    probe = DepthProbe(recipe.model, assembled, engine, probed_batch(recipe), seed=7)
    found = []
    for step in (1, 2):
        part = batches(engine, recipe, seed=step)
        stats = plain.step(part, LR)
        with watch.watching(LR):
            assert engine.step(part, LR) == stats
        assert engine_digest(engine) == engine_digest(plain)
        figures = watch.figures
        found.append({"by_sublayer": figures.by_sublayer, "by_block": figures.by_block, "whole": figures.whole})
        found.append(probe.probe(step))
        del found[-1]["whole"]["seconds"]
        assert engine_digest(engine) == engine_digest(plain)
        assert all(p.grad is None for p in assembled.parameters().values())
    return json.loads(json.dumps(found))


def _of_ranks(rank: int, recipes: list[Recipe]) -> list[list[dict]]:
    return [figures_of(recipe) for recipe in recipes]


def numbers(record: object, path: str = "") -> dict[str, float | None]:
    """Every number of a record by its path."""
    if isinstance(record, dict):
        return {k: v for name, part in record.items() for k, v in numbers(part, f"{path}/{name}").items()}
    if isinstance(record, list):
        return {k: v for i, part in enumerate(record) for k, v in numbers(part, f"{path}/{i}").items()}
    return {path: record}


def assert_same(found: list[dict], wanted: list[dict], tolerance: float = 1e-9) -> None:
    got, reference = numbers(found), numbers(wanted)
    assert got.keys() == reference.keys() and len(got) > 150
    for path, number in reference.items():
        if number is None:
            assert got[path] is None, path
        else:
            assert not isnan(number) and got[path] == pytest.approx(number, rel=tolerance, abs=1e-12), path


def check(variant: str, topology: str, names: list[str], **options) -> None:
    """On layouts of as many ranks, which start once."""
    (ranks,) = {LAYOUTS[name][0] for name in names}
    wanted = figures_of(make_recipe(topology, variant, {}, **options))
    recipes = [make_recipe(topology, variant, LAYOUTS[name][1], **options) for name in names]
    for of_rank in run_ranks(ranks, _of_ranks, recipes):
        for found in of_rank:
            assert_same(found, wanted)


def test_figures_are_those_of_one_process():
    """With dropout, documents, tied embeddings and a norm of branches."""
    check("gpt", "peri", ["tp2 full", "tp2 columns, merge", "pp2 1f1b", "fsdp2"], num_blocks=2)


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("variant", ["llama", "gpt"])
def test_figures_of_every_topology_are_those_of_one_process(variant, topology):
    check(variant, topology, [name for name, (ranks, _) in LAYOUTS.items() if ranks == 2], num_blocks=4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize("variant", ["llama", "gpt"])
def test_figures_of_combined_layouts_are_those_of_one_process(variant, ranks):
    check(variant, "keel", [name for name, (needed, _) in LAYOUTS.items() if needed == ranks])


RECOMPUTED = [{"policy": policy} for policy in ("norm", "attention", "ffn", "branch", "block")]
RECOMPUTED += [{"policy": "every", "every": 2}]


@pytest.mark.parametrize(
    "recompute",
    [pytest.param(one, marks=() if one["policy"] in ("branch", "every") else pytest.mark.slow) for one in RECOMPUTED],
    ids=lambda recompute: recompute["policy"],
)
@pytest.mark.parametrize(
    ("variant", "topology"), [("gpt", "pre"), pytest.param("llama", "gated", marks=pytest.mark.slow)]
)
def test_what_is_run_again_counts_once(variant, topology, recompute):
    plain = figures_of(make_recipe(topology, variant, {}, num_blocks=3))
    assert_same(figures_of(make_recipe(topology, variant, {}, num_blocks=3, recompute=recompute)), plain, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTED, ids=lambda recompute: recompute["policy"])
def test_what_is_run_again_on_ranks_counts_once(recompute):
    names = ["tp2 tokens", "tp2 columns, gather", "pp2 1f1b", "fsdp2"]
    check("gpt", "deepnorm", names, num_blocks=4, recompute=recompute)
