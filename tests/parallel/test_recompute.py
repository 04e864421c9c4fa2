"""Recomputation changes no bit, runs nothing three times, and sends what its policy says."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from cases import LAYOUTS, batches, build, found_with, make_recipe

from megaresnorm.model.branches import Attention, FeedForward
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import Recipe
from megaresnorm.recompute import Region, saves_last
from megaresnorm.testing import run_ranks

POLICIES: dict[str, dict] = {
    "norm": {"policy": "norm"},
    "attention": {"policy": "attention"},
    "ffn": {"policy": "ffn"},
    "branch": {"policy": "branch"},
    "block": {"policy": "block"},
    "every 3": {"policy": "every", "every": 3},
    "ranges": {"policy": "block", "blocks": [{"first": 1, "last": 1, "policy": "norm"}]},
}
BLOCKS = 4
ONE: tuple[int, dict] = (1, {})
PLACES = {
    "alone": ONE,
    **{name: LAYOUTS[name] for name in ("tp2 full", "tp2 tokens", "tp2 columns, merge", "tp2 columns, gather")},
    **{name: LAYOUTS[name] for name in ("pp2 1f1b", "fsdp2", "fsdp2 gradients", "dp2 ddp")},
    "pp2 interleaved": (2, {"pp": 2, "pipeline": "interleaved"}),
}
COMPUTE = ("fp32", "bf16", "bf16 stream")
GATHER = "tp2 columns, gather"  # of a stream in the type of compute


def recipe_of(topology: str, variant: str, place: str, compute: str, recompute: dict, **sections: dict) -> Recipe:
    keep = {} if recompute.get("policy") in ("block", "every") else sections.pop("keep", {})
    return make_recipe(
        topology, variant, PLACES[place][1], compute, BLOCKS, recompute={**recompute, **keep}, **sections
    )


def run(place: str, function, *arguments) -> list:
    """What each rank returns."""
    return run_ranks(2, function, *arguments) if PLACES[place][0] == 2 else [function(0, *arguments)]


def compare(place: str, cases: list[tuple[str, str, str, list[str]]], **sections: dict) -> None:
    """Each case (topology, variant, compute, policies) against none."""
    recipes = [
        recipe_of(topology, variant, place, compute, POLICIES.get(policy, {}), **sections)
        for topology, variant, compute, policies in cases
        for policy in ("none", *policies)
    ]
    for results in run(place, found_with, recipes):
        found = iter(results)
        for topology, variant, compute, policies in cases:
            loss, wanted = next(found)
            for policy in policies:
                other, got = next(found)
                different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
                assert loss == other and not different, (place, topology, variant, compute, policy, different[:3])


def types_of(place: str) -> tuple[str, ...]:
    return ("fp32", "bf16 stream") if place == GATHER else COMPUTE


def some_cases(place: str) -> list[tuple[str, str, str, list[str]]]:
    """Every third topology with two policies, in one type, with dropout or without: which ones, changes with the place.

    Alone all topologies.
    """
    names, at, types = list(POLICIES), list(PLACES).index(place), types_of(place)
    return [
        (
            topology,
            ("gpt", "llama")[(i // 3 + at) % 2],
            types[(i + at) % len(types)],
            [names[(2 * i + at + j) % len(names)] for j in (0, 3)],
        )
        for i, topology in enumerate(TOPOLOGIES)
        if place == "alone" or i % 3 == at % 3
    ]


OFTEN = ("alone", "tp2 tokens", "tp2 columns, merge", "pp2 1f1b", "pp2 interleaved", "fsdp2")  # in CI


@pytest.mark.parametrize(
    "place", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in PLACES]
)
def test_topologies_have_the_bits_of_none(place):
    compare(place, some_cases(place))


@pytest.mark.slow
@pytest.mark.parametrize(("place", "compute"), [(place, compute) for place in PLACES for compute in types_of(place)])
def test_every_topology_has_the_bits_of_none_under_every_policy(place, compute):
    for variant in ("llama", "gpt"):  # without and with dropout and documents
        compare(place, [(topology, variant, compute, list(POLICIES)) for topology in TOPOLOGIES])


@pytest.mark.parametrize(
    "place", [GATHER, *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2 tokens", "tp2 columns, merge"))]
)
def test_gathered_rows_that_are_kept_change_nothing(place):
    compute = types_of(place)[1]
    cases = [("deepnorm", "gpt", compute, ["norm", "branch"]), ("keel", "llama", "fp32", ["attention", "ffn"])]
    compare(place, cases, keep={"gathered": "keep"})


# --- how often --------------------------------------------------------------------------------------------------------


def counted(rank: int, recipes: list[Recipe]) -> list[tuple[dict[str, int], dict[str, int], int]]:
    """Runs of branches, collectives over tp, and microbatches."""
    results = []
    for recipe in recipes:
        _, engine = build(recipe)
        runs, sent = Counter(), Counter()

        def counting(real, name, counter):
            def call(*arguments, **options):
                counter[name] += 1
                return real(*arguments, **options)

            return call

        branches = {kind: kind.forward for kind in (Attention, FeedForward)}
        for kind, real in branches.items():
            kind.forward = counting(real, kind.__name__, runs)
        transport = engine.context.tp.transport
        for name in ("all_reduce", "all_gather", "reduce_scatter"):
            if transport is not None:
                real = getattr(transport, f"start_{name}")
                object.__setattr__(transport, f"start_{name}", counting(real, name, sent))  # it is frozen
        batch = batches(engine, recipe)
        engine.gradients(batch)
        for kind, real in branches.items():
            kind.forward = real
        results.append((dict(runs), dict(sent), len(batch.microbatches)))
    return results


@pytest.mark.parametrize("topology", ["pre", "gated", "deepnorm"])
def test_no_branch_is_run_three_times(topology):
    policies = ("none", *POLICIES)
    recipes = [recipe_of(topology, "gpt", "alone", "fp32", POLICIES.get(policy, {})) for policy in policies]
    again = {"none": (0, 0), "norm": (0, 0), "attention": (4, 0), "ffn": (0, 4), "ranges": (3, 3)}
    for policy, (runs, _, microbatches) in zip(policies, counted(0, recipes), strict=True):
        attention, ffn = again.get(policy, (4, 4))
        assert runs["Attention"] == microbatches * (BLOCKS + attention), policy
        assert runs["FeedForward"] == microbatches * (BLOCKS + ffn), policy


# What a block sends more than under none, in a microbatch: (all-reduce, all-gather, reduce-scatter). A branch that is
# run again gathers its input, as its linear does in backward otherwise, and stops before its own sum is sent. Of a
# block that is run again the first branch's sum is sent again, and under columns, merge, the statistics of the second
# norm are merged again; in deepnorm also the second sum, which the norm at the block's end keeps, and its statistics.
MORE: dict[tuple[str, str], tuple[int, int, int]] = {
    ("pre", "tp2 full"): (1, 0, 0),
    ("pre", "tp2 tokens"): (0, 0, 1),
    ("pre", "tp2 columns, merge"): (0, 1, 1),
    ("pre", "tp2 columns, gather"): (0, 0, 1),
    ("deepnorm", "tp2 full"): (2, 0, 0),
    ("deepnorm", "tp2 tokens"): (0, 0, 2),
    ("deepnorm", "tp2 columns, merge"): (0, 2, 2),
}


@pytest.mark.parametrize(("topology", "place"), MORE)
def test_collectives_are_as_many_as_the_policy_says(topology, place):
    policies = ("none", "norm", "branch", "block")
    recipes = [recipe_of(topology, "llama", place, "fp32", POLICIES.get(policy, {})) for policy in policies]
    for results in run(place, counted, recipes):
        (_, base, microbatches), *others = results
        for policy, (_, sent, _) in zip(policies[1:], others, strict=True):
            times = microbatches * BLOCKS if policy == "block" else 0
            wanted = Counter(base)
            for name, more in zip(("all_reduce", "all_gather", "reduce_scatter"), MORE[topology, place], strict=True):
                wanted[name] += times * more
            assert Counter(sent) == +wanted, (policy, sent, base)


def test_a_span_of_one_block_sends_what_policy_block_sends():
    recipes = [
        recipe_of("pre", "llama", "tp2 tokens", "fp32", recompute)
        for recompute in ({"policy": "block"}, {"policy": "every", "every": 1})
    ]
    for (_, block, _), (_, every, _) in run("tp2 tokens", counted, recipes):
        assert every == block


def gathers_of_fsdp(rank: int, recipes: list[Recipe]) -> list[int]:
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    real, counts = module.foreach_all_gather, []

    def counting(*arguments, **options):
        counts[-1] += 1
        return real(*arguments, **options)

    module.foreach_all_gather = counting
    for recipe in recipes:
        _, engine = build(recipe)
        counts.append(0)
        engine.gradients(batches(engine, recipe))
    return counts


def test_weights_are_gathered_again_only_where_they_have_been_freed():
    """A block that is run again in its own backward pass has them; of three blocks two have not yet."""
    policies = ("none", "norm", "branch", "block", "every 3")
    for place, more in (("fsdp2", 2), ("fsdp2 gradients", 0)):
        recipes = [recipe_of("keel", "llama", place, "fp32", POLICIES.get(policy, {})) for policy in policies]
        for none, *others, every in run(place, gathers_of_fsdp, recipes):
            assert others == [none] * 3
            assert every == none + more * 2  # two microbatches a rank


# --- regions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_for_a_garbage_collection(policy):
    recipe = recipe_of("keel", "gpt", "alone", "fp32", POLICIES[policy])
    _, engine = build(recipe)
    batch = batches(engine, recipe)
    engine.gradients(batch)
    gc.collect()
    gc.disable()
    try:
        engine.gradients(batch)
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("topology", ["pre", "keel"])
def test_a_graph_that_is_dropped_without_backward_leaves_no_region(topology, offload, monkeypatch):
    """Autograd hands a node's own output to the hooks: kept as it is, node and output would keep each other alive."""
    made: list[weakref.ref] = []

    class Noted(Region):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr("megaresnorm.model.spans.Region", Noted)
    recipe = recipe_of(topology, "llama", "alone", "fp32", {"policy": "block", "offload": offload})
    build(recipe)[0].model(torch.arange(32).view(2, 16) % 20)
    assert len(made) == BLOCKS and not any(region() is not None for region in made)


def test_a_region_runs_to_the_last_tensor_that_is_kept_and_frees_each_when_it_is_read():
    trace: list[str] = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            saves_last(x)
            trace.append(name)
            ctx.save_for_backward(x)
            ctx.name = name
            return x * x

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            trace.append(f"{ctx.name} backward")
            return 2 * x * dy, None

    x = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    with Region() as region:
        x_again = region.keep(x)
        region.begin(lambda: Square.apply(Square.apply(x_again(), "first"), "second"))
        y = Square.apply(Square.apply(x, "first"), "second")
        inner = weakref.ref(region)
    del region
    y.backward()
    assert trace == ["first", "second", "first", "second backward", "first backward"]
    assert torch.equal(x.grad, 4 * x.detach() ** 3)
    del y
    assert inner() is None


def test_a_graph_may_be_differentiated_twice():
    x = torch.randn(3, requires_grad=True)
    with Region() as region:
        x_again = region.keep(x)
        region.begin(lambda: x_again().exp().sin())
        y = x.exp().sin().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_function_that_saves_another_number_of_tensors_is_an_error():
    x = torch.randn(3, requires_grad=True)
    with Region() as region:
        x_again = region.keep(x)
        region.begin(lambda: x_again().exp())
        y = x.exp().sin().sum()
    with pytest.raises(RuntimeError, match="has made 1 tensors where forward had saved 2"):
        y.backward()


def test_a_function_that_saves_other_tensors_is_an_error():
    """It ends with the last that is wanted, so that their number alone would not tell that there were more."""
    x = torch.randn(3, requires_grad=True)
    with Region() as region:
        x_again = region.keep(x)
        region.begin(lambda: x_again().double().cos().exp().sin())
        y = x.exp().sin().sum()
    with pytest.raises(RuntimeError, match="has made"):
        y.backward()


FROZEN = {  # what has no gradient: all before a branch, or also all of a branch
    "gated": lambda name: name.startswith("embedding") or name == "blocks.0.attention.norm_in.weight",
    "pre": lambda name: name.startswith(("embedding", "blocks.0.", "blocks.1.attention.")),
}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("topology", FROZEN)
def test_frozen_parameters_change_nothing(topology, compute):
    found = []
    for policy in ("none", "branch", "block", "every 3"):
        model = build(recipe_of(topology, "llama", "alone", compute, POLICIES.get(policy, {})))[0].model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not FROZEN[topology](name))
        model(torch.arange(32).view(2, 16) % 20).float().square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in found[0].items())


def test_an_error_within_a_region_leaves_no_hooks():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(ZeroDivisionError), Region() as region:
        region.begin(lambda: None)
        raise ZeroDivisionError
    x.exp().sum().backward()
    assert torch.equal(x.grad, x.detach().exp())
