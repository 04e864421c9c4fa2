"""Every topology in every layout against one process: values, gradients and weights."""

import functools

import pytest
import torch
from cases import LAYOUTS, VARIANTS, Outcome, errors, make_recipe, outcome, outcomes

from megaresnorm.model.topology import TOPOLOGIES

FP64_TOLERANCE = 1e-11
TWO_RANKS = ["tp2 full", "tp2 tokens", "tp2 columns, merge", "tp2 columns, gather", "pp2 1f1b", "dp2 ddp", "fsdp2"]
PAIRS = [(topology, variant) for topology in TOPOLOGIES for variant in VARIANTS]
IN_FULL = "tp2 columns, merge"  # all pairs
# The layouts of each kind share the topologies out among them, each topology in one variant.
KINDS = [
    ["pp2 1f1b"],
    ["dp2 ddp"],
    ["tp2 full", "tp2 tokens", "tp2 columns, gather"],
    ["fsdp2", "fsdp2 gradients", "fsdp2 unsharded"],
    ["pp2 gpipe", "pp4 interleaved", "pp2 interleaved dp2"],
    ["pp2 interleaved fsdp2", "hsdp", "pp2 fsdp2 unsharded"],
    ["hsdp tp2", "pp2 hsdp", "tp2 pp2 dp2", "tp2 pp2 fsdp2"],
]


def some_of_the_pairs(layout: str) -> list[tuple[str, str]]:
    """Those that are compared in every run of the tests; all are with ``-m slow``."""
    if layout == IN_FULL:
        return PAIRS
    (kind,) = (kind for kind in KINDS if layout in kind)
    variants = list(VARIANTS)
    return [
        (topology, variants[(i // len(kind)) % len(variants)])
        for i, topology in enumerate(TOPOLOGIES)
        if i % len(kind) == kind.index(layout)
    ]


def test_layouts_of_a_kind_have_all_topologies_and_each_layout_both_variants():
    assert sorted([IN_FULL, *(layout for kind in KINDS for layout in kind)]) == sorted(LAYOUTS)
    for kind in KINDS:
        pairs = {layout: some_of_the_pairs(layout) for layout in kind}
        assert {topology for some in pairs.values() for topology, _ in some} == set(TOPOLOGIES)
        assert all({variant for _, variant in some} == set(VARIANTS) for some in pairs.values())


@functools.cache
def alone(topology: str, variant: str, num_blocks: int) -> Outcome:
    """What one process computes."""
    return outcome(make_recipe(topology, variant, {}, num_blocks=num_blocks))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_topologies_are_the_same_in_fp64(layout):
    """Loss, every gradient and the weights after two steps of SGD; all ranks end with one digest."""
    compare_with_one_process(layout, some_of_the_pairs(layout), blocks_of(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != IN_FULL])
def test_every_topology_in_both_variants_is_the_same_in_fp64(layout):
    for first in range(0, len(PAIRS), 8):  # ranks start anew: each model has groups of its own, with threads
        compare_with_one_process(layout, PAIRS[first : first + 8], blocks_of(layout))


def blocks_of(layout: str) -> int:
    return 8 if LAYOUTS[layout][1].get("pp", 1) > 2 else 4


PUBLISHED = ("tp2 columns, gather", "pp2 1f1b", "fsdp2")  # in CI


@pytest.mark.parametrize(
    "layout",
    [
        name if name in PUBLISHED else pytest.param(name, marks=pytest.mark.slow)
        for name in (*TWO_RANKS, "tp2 pp2 fsdp2")
    ],
)
def test_settings_of_published_models_are_the_same_in_fp64(layout):
    compare_with_one_process(layout, [("sandwich", "gemma"), ("pre", "granite"), ("post", "own alpha")], 4)


IN_PARTS = ("tp2 columns, gather", "pp2 1f1b", "fsdp2")  # in CI


@pytest.mark.parametrize(
    "layout",
    [
        name if name in IN_PARTS else pytest.param(name, marks=pytest.mark.slow)
        for name in (*TWO_RANKS, "pp2 gpipe", "pp2 interleaved fsdp2", "tp2 pp2 fsdp2")
    ],
)
def test_an_output_matrix_in_parts_is_the_same_in_fp64(layout):
    """Also where it is the embedding, with a cap, a scale, a penalty of log Z, and padding."""
    pairs = [("deepnorm", "gpt"), ("keel", "llama"), ("sandwich", "gemma")]
    compare_with_one_process(layout, pairs, 4, logit_rows=5)


def test_an_output_matrix_in_parts_is_the_same_on_one_rank():
    for topology, variant in (("deepnorm", "gpt"), ("keel", "llama"), ("sandwich", "gemma")):
        wanted = alone(topology, variant, 4)
        got = outcome(make_recipe(topology, variant, {}, num_blocks=4, logit_rows=5))
        assert abs(got.loss - wanted.loss) < FP64_TOLERANCE * abs(wanted.loss)
        for what in ("gradients", "weights"):
            assert max(errors(getattr(got, what), getattr(wanted, what)).values()) < FP64_TOLERANCE, (topology, what)


def compare_with_one_process(
    layout: str, pairs: list[tuple[str, str]], blocks: int, logit_rows: int | None = None
) -> None:
    num_ranks, parallel = LAYOUTS[layout]
    cases = [(topology, variant, blocks) for topology, variant in pairs]
    recipes = [make_recipe(t, v, parallel, num_blocks=blocks, logit_rows=logit_rows) for t, v in pairs]
    results = outcomes(num_ranks, recipes, {})
    for i, case in enumerate(cases):
        got, wanted = results[0][i], alone(*case)
        assert abs(got.loss - wanted.loss) < FP64_TOLERANCE * abs(wanted.loss), (layout, case)
        for what in ("gradients", "weights"):
            found = errors(getattr(got, what), getattr(wanted, what))
            worst = max(found, key=found.__getitem__)
            assert found[worst] < FP64_TOLERANCE, f"{layout}, {case}: {what} of {worst} are off by {found[worst]:.1e}"
        assert {result[i] for result in results[1:]} == {got.digest}, (layout, case)


TWICE = ("tp2 columns, gather", "pp2 1f1b")  # in CI


@pytest.mark.parametrize(
    "layout",
    [*TWICE, *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2 tokens", "dp2 ddp", "fsdp2"))],
)
def test_the_same_layout_twice_is_the_same_bit_for_bit(layout):
    num_ranks, parallel = LAYOUTS[layout]
    recipes = [make_recipe("deepnorm", "gpt", parallel, "bf16 stream"), make_recipe("keel", "llama", parallel, "fp32")]
    runs = [outcomes(num_ranks, recipes, {"optimizer": "adamw"})[0] for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.steps == second.steps and first.digest == second.digest
        assert all(torch.equal(g, second.gradients[name]) for name, g in first.gradients.items())


@pytest.mark.parametrize(
    "compute", ["bf16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16 stream"))]
)
@pytest.mark.parametrize("names", [("deepnorm", "sandwich"), pytest.param(("pre", "keel"), marks=pytest.mark.slow)])
def test_at_24_blocks_rounding_is_that_of_one_process(names, compute):
    """Against FP64: at most 4 times the error of one process in FP32, 1.5 times in BF16 (mean over the tensors)."""
    layouts = ["tp2 full", "tp2 tokens", "tp2 columns, merge", "pp2 1f1b", "dp2 ddp", "fsdp2"]
    if compute == "bf16 stream":
        # Not sandwich, 1.9 times: its branch norms magnify that partial sums of a branch are rounded.
        names = tuple(name for name in names if name != "sandwich")
        layouts = ["tp2 tokens", "tp2 columns, merge", "tp2 columns, gather", "pp2 1f1b"]
    exact = [outcome(make_recipe(t, "llama", {}, "fp64", 24), steps=0) for t in names]
    one = [outcome(make_recipe(t, "llama", {}, compute, 24), steps=0) for t in names]
    recipes = [make_recipe(t, "llama", LAYOUTS[layout][1], compute, 24) for layout in layouts for t in names]
    results = outcomes(2, recipes, {"steps": 0})[0]
    bound = 4.0 if compute == "fp32" else 1.5
    for i, got in enumerate(results):
        layout, name = layouts[i // len(names)], names[i % len(names)]
        wanted = exact[i % len(names)].gradients
        mine, alone = (errors(o.gradients, wanted) for o in (got, one[i % len(names)]))
        if compute == "fp32":
            assert max(mine.values()) <= bound * max(alone.values()), (layout, name, max(mine.values()))
        assert sum(mine.values()) <= bound * sum(alone.values()), (
            layout,
            name,
            sum(mine.values()),
            sum(alone.values()),
        )


ADAMW_LAYOUTS = ["tp2 columns, gather", "pp2 1f1b"]
SLOW_ADAMW_LAYOUTS = ["tp2 full", "tp2 tokens", "dp2 ddp", "fsdp2"]
# Not reached: AdamW divides gradients of the size of rounding by their own size, and one process in FP32 is 5.2e-6 from
# FP64 there.
NOT_REACHED = pytest.mark.xfail(reason="2.3e-6 under tp2 full", raises=AssertionError)


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("pre", "keel")]


@pytest.mark.parametrize("name", ["deepnorm", *OTHERS])
@pytest.mark.parametrize("layouts", [ADAMW_LAYOUTS, pytest.param(SLOW_ADAMW_LAYOUTS, marks=pytest.mark.slow)])
def test_twenty_steps_of_adamw_have_the_same_losses(layouts, name):
    check_adamw(name, 12, layouts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("pre", marks=NOT_REACHED), "deepnorm", "keel"])
def test_twenty_steps_of_adamw_have_the_same_losses_at_100_blocks(name):
    check_adamw(name, 100, SLOW_ADAMW_LAYOUTS + ADAMW_LAYOUTS)


def check_adamw(name: str, num_blocks: int, layouts: list[str]) -> None:
    """Losses within 2e-6 of one process's, gradient norms within 1e-4."""
    options = {"steps": 20, "optimizer": "adamw"}
    one = outcome(make_recipe(name, "llama", {}, "fp32", num_blocks), **options)
    for layout in layouts:
        recipe = make_recipe(name, "llama", LAYOUTS[layout][1], "fp32", num_blocks)
        got = outcomes(2, [recipe], options)[0][0]
        pairs = list(zip(got.steps, one.steps, strict=True))
        losses, norms = max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) / b[1] for a, b in pairs)
        assert losses < 2e-6 and norms < 1e-4, (layout, losses, norms)
