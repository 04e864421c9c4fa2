"""FP8 in parallel and under recomputation: the same codes, the same scales, and one byte an element on the wire."""

from collections import Counter

import cases
import pytest
import torch
from cases import LAYOUTS, batches, build, errors, found_with, gradients, make_recipe, outcome, outcomes
from test_gathered import count_all_gathers
from torch import Tensor

from megaresnorm.kernels.fp8.formats import dequantize
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.parallel.data_parallel import gathered_weights
from megaresnorm.precision.fp8 import fp8_layers
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks

WIDTHS = {"dim": 64, "ffn_dim": 96}
RECIPES: dict[str, dict] = {
    "rowwise": {"recipe": "rowwise"},
    "block": {"recipe": "block"},
    "mxfp8": {"recipe": "mxfp8"},
    "tensorwise": {"recipe": "tensorwise"},
    "delayed": {"recipe": "tensorwise", "scaling": "delayed", "history": 2},
    "rowwise, all FP8": {"recipe": "rowwise", "weight_grad": "fp8"},
    "tensorwise, all FP8": {"recipe": "tensorwise", "weight_grad": "fp8"},
    "rowwise, BF16 backward": {"recipe": "rowwise", "backward": "bf16"},
}
TP = ("tp2 full", "tp2 tokens", "tp2 columns, merge")
ALL = {"bf16_first_blocks": 0, "bf16_last_blocks": 0}


def recipe_of(
    topology: str, fp8: str, place: str = "", *, variant: str = "llama", stream: str = "fp32", num_blocks: int = 3,
    outer: dict = ALL, model: dict = WIDTHS, **sections: dict,
) -> Recipe:  # fmt: skip
    precision = {"compute": "fp8", "residual_dtype": stream, "fp8": RECIPES[fp8] | outer}
    parallel = sections.pop("parallel", LAYOUTS[place][1] if place else {})
    return make_recipe(
        topology, variant, parallel, num_blocks=num_blocks, model=model, **({"precision": precision} | sections)
    )


def wide(recipe: Recipe, compute: str) -> Recipe:
    precision = recipe.precision.model_validate({"compute": compute})
    return recipe.model_copy(update={"precision": precision})


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of all gradients together, as a share of their norm."""
    off = sum((got[name].double() - t.double()).square().sum().item() for name, t in wanted.items())
    return (off / sum(t.double().square().sum().item() for t in wanted.values())) ** 0.5


IN_CI = ("rowwise",)
SOME = [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]


@pytest.mark.parametrize("fp8", SOME)
def test_layouts_of_tensor_parallelism_agree_and_differ_from_one_process_by_less_than_the_format(fp8):
    """Between layouts merged statistics differ in their last bits; from one process also the BF16 sums of two partial
    products, and what FP8 makes of that. Gradients stay nearer to one process's than that is to FP32."""
    topologies = ("deepnorm", "gated") if fp8 in IN_CI else ("pre", "deepnorm", "keel", "gated")
    alone = found_with(0, [recipe_of(topology, fp8) for topology in topologies])
    exact = found_with(0, [wide(recipe_of(topology, fp8), "fp32") for topology in topologies])
    everywhere = run_ranks(2, found_with, [recipe_of(topology, fp8, place) for place in TP for topology in topologies])
    for found in everywhere:
        full, tokens, columns = (found[i : i + len(topologies)] for i in range(0, len(found), len(topologies)))
        for i, topology in enumerate(topologies):
            for place, (loss, got) in zip(TP[1:], (tokens[i], columns[i]), strict=True):
                assert loss == pytest.approx(full[i][0], rel=1e-5), (topology, place)
                assert distance(got, full[i][1]) < 2**-6, (topology, place)
            assert abs(full[i][0] - alone[i][0]) < 2**-9 * alone[i][0], topology
            assert distance(full[i][1], alone[i][1]) < distance(alone[i][1], exact[i][1]), topology


@pytest.mark.slow
def test_gathering_layout_reads_the_rows_that_one_process_reads():
    """tensor_layout columns with a BF16 stream gathers what is stored, and rounds whole rows."""
    recipes = [recipe_of("deepnorm", fp8, "tp2 columns, gather", stream="bf16") for fp8 in ("rowwise", "tensorwise")]
    merged = [recipe_of("deepnorm", fp8, "tp2 columns, merge", stream="bf16") for fp8 in ("rowwise", "tensorwise")]
    (gathering, merging), _ = ((found[:2], found[2:]) for found in run_ranks(2, found_with, [*recipes, *merged]))
    for (loss, got), (other, wanted) in zip(gathering, merging, strict=True):
        assert loss == pytest.approx(other, rel=2e-4) and distance(got, wanted) < 0.1


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "place",
    [
        "pp2 1f1b",
        "dp2 ddp",
        "fsdp2",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("pp2 gpipe", "fsdp2 gradients")),
    ],
)
def test_stages_and_shards_of_samples_and_weights_change_nothing(place, every):
    """Each topology in one of the recipes. Stages: to the bit. Shards of the samples: but for the order of sums, and on
    CPUs for microbatches' weight gradients, which are BF16."""
    cases = [(topology, list(RECIPES)[i % len(RECIPES)]) for i, topology in enumerate(TOPOLOGIES)][1::every]
    alone = found_with(0, [recipe_of(topology, fp8) for topology, fp8 in cases])
    for found in run_ranks(2, found_with, [recipe_of(topology, fp8, place) for topology, fp8 in cases]):
        for case, (loss, got), (wanted_loss, wanted) in zip(cases, found, alone, strict=True):
            if place.startswith("pp2"):
                assert loss == wanted_loss and all(torch.equal(got[n], wanted[n]) for n in wanted), case
            else:
                assert loss == pytest.approx(wanted_loss, rel=1e-6), case
                assert distance(got, wanted) < 2**-8, case


def test_blocks_of_columns_that_ranks_have_whole_travel_in_fp8():
    """Widths of whole blocks of 128 under the layout that shards columns, where one rank has scales of its own."""
    model = {"dim": 256, "ffn_dim": 256}
    recipes = [recipe_of("pre", "block", place, model=model, num_blocks=2) for place in TP]
    for found in run_ranks(2, found_with, recipes):
        (full, wanted), *others = found
        for loss, got in others:
            assert loss == pytest.approx(full, rel=1e-5) and distance(got, wanted) < 2**-8


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "place", ["", "tp2 tokens", pytest.param("tp2 columns, merge", marks=pytest.mark.slow), "fsdp2"]
)
def test_recomputed_branches_have_the_scales_of_forward(place, whole):
    """To the bit, with every policy and in every recipe; delayed scales are those of a step before."""
    policies = ("none", "norm", "branch", "block", "every") if whole else ("none", "branch", "block")
    some = list(RECIPES) if not place else ["rowwise", "delayed", "block"]
    some = some if whole else ["rowwise", "delayed"]
    names = ("pre", "deepnorm", "keel", "gated")
    cases = [(names[i % 4], fp8) for i, fp8 in enumerate(some)]
    recipes = [
        recipe_of(topology, fp8, place, recompute={"policy": policy} | ({"every": 2} if policy == "every" else {}))
        for topology, fp8 in cases
        for policy in policies
    ]
    for results in run_ranks(2, second_gradients, recipes) if place else [second_gradients(0, recipes)]:
        found = iter(results)
        for case in cases:
            loss, wanted = next(found)
            for policy in policies[1:]:
                other, got = next(found)
                assert loss == other and all(torch.equal(got[n], wanted[n]) for n in wanted), (case, policy)


def second_gradients(rank: int, recipes: list[Recipe]) -> list[tuple[float, dict[str, Tensor]]]:
    """After one step, so that delayed scales have a history."""
    results = []
    for recipe in recipes:
        assembled, engine = build(recipe)
        engine.step(batches(engine, recipe), 1e-3)
        loss, _ = engine.gradients(batches(engine, recipe, seed=4))
        results.append((loss, gradients(assembled)))
    return results


def bytes_gathered(rank: int, recipes: list[Recipe]) -> list[dict[str, int]]:
    """Bytes that this rank gives to all-gathers over tp in one evaluation, by type."""
    results = []
    for recipe in recipes:
        _, engine = build(recipe)
        transport, sent = engine.context.tp.transport, Counter()
        real = transport.start_all_gather

        def counting(x, real=real, sent=sent):
            sent[str(x.dtype).removeprefix("torch.")] += x.nbytes
            return real(x)

        object.__setattr__(transport, "start_all_gather", counting)  # it is frozen
        engine.evaluate(batches(engine, recipe))
        results.append(dict(sent))
    return results


def test_gathers_of_rows_and_columns_carry_a_byte_an_element_and_one_for_each_scale():
    """Under tokens a row of 64 has one scale, or under mxfp8 two. Under columns rowwise shares its scales by one
    message of four bytes a row, and a rank's 32 columns are a block of mxfp8."""
    tokens, columns = "tp2 tokens", "tp2 columns, merge"
    recipes = [
        recipe_of("pre", fp8, place, num_blocks=2)
        for place, fp8 in (
            (tokens, "rowwise"), (tokens, "mxfp8"), (tokens, "delayed"), (columns, "rowwise"), (columns, "mxfp8"),
            (columns, "block"),
        )
    ]  # fmt: skip
    in_bf16 = [wide(recipe_of("pre", "rowwise", place, num_blocks=2), "bf16") for place in (tokens, columns)]
    found, _ = run_ranks(2, bytes_gathered, recipes + in_bf16)
    rows = 8 * 8  # of tokens, in all microbatches
    branches = 2 * 2
    head = rows // 2 * 64 * 2
    assert found[6]["bfloat16"] == (branches + 1) * head
    for got, scales in zip(found[:3], (1, 2, 0), strict=True):
        assert got["uint8"] == branches * (rows // 2) * (64 + scales) and got["bfloat16"] == head
    head = rows * 32 * 2
    assert found[7]["bfloat16"] == (branches + 1) * head
    assert found[3]["uint8"] == branches * rows * 32 and found[3]["bfloat16"] == head
    assert found[3]["float32"] - found[7]["float32"] == branches * rows * 4
    assert found[4]["uint8"] == branches * rows * (32 + 1) and found[4]["float32"] == found[7]["float32"]
    assert found[5] == found[7]  # blocks of 128 columns of which a rank has 32


def bytes_of_weights(rank: int, recipes: list[Recipe]) -> list[tuple[int, int]]:
    """Bytes of FSDP2's gathers in a step, and of what would be sent of matrices in FP8 at two bytes each."""
    results = []
    cases.SAMPLES, cases.MICRO = 6, 1  # as many microbatches on each of two ranks or three
    sent = count_all_gathers()
    for recipe in recipes:
        assembled, engine = build(recipe)
        sent.clear()
        engine.evaluate(batches(engine, recipe))
        in_fp8 = sum(layer.weight.numel() for layer, _ in fp8_layers([assembled.model]).values())
        results.append((sum(sent), in_fp8))
    return results


@pytest.mark.parametrize("num_shards", [2, 3])
def test_fsdp2_gathers_weights_in_fp8_rounded_as_one_process_rounds_them(num_shards):
    """Three ranks divide no matrix evenly, and cut through tiles of 128 rows."""
    model = {"dim": 96, "num_heads": 6, "ffn_dim": 160}
    parallel = {"dp_shard": num_shards}
    names = ("rowwise", "block", "mxfp8", "tensorwise")
    recipes = [recipe_of("deepnorm", fp8, model=model, num_blocks=2, parallel=parallel) for fp8 in names]
    alone = [codes(0, recipe_of("deepnorm", fp8, model=model, num_blocks=2)) for fp8 in names]
    for rank in run_ranks(num_shards, codes_of_all, recipes):
        for got, wanted in zip(rank, alone, strict=True):
            assert got.keys() == wanted.keys()
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    base = wide(recipes[0], "bf16")
    for counted in run_ranks(num_shards, bytes_of_weights, [base, *recipes]):
        (in_bf16, _), *others = counted
        microbatches = 6 // num_shards
        for name, (sent, in_fp8) in zip(names, others, strict=True):
            saved = in_bf16 - sent
            assert saved > 0.8 * in_fp8 * microbatches, name


def codes_of_all(rank: int, recipes: list[Recipe]) -> list[dict[str, Tensor]]:
    cases.SAMPLES, cases.MICRO = 6, 1
    return [codes(rank, recipe) for recipe in recipes]


def codes(rank: int, recipe: Recipe) -> dict[str, Tensor]:
    """The weights that products have read, as numbers."""
    assembled, engine = build(recipe)
    engine.gradients(batches(engine, recipe))
    found = {}
    for block in assembled.model.blocks.values():
        with gathered_weights(block):
            for name, (_, kernel) in fp8_layers([block]).items():
                found[f"{len(found)} {name}"] = dequantize(kernel.weight)
    return found


def test_delayed_scales_are_the_largest_numbers_of_all_ranks_and_earlier_steps():
    """After steps of equal batches they are equal on all ranks of a stage, in every layout, and those of one process
    but for what rounding does to numbers."""
    wanted = histories(0, [recipe_of("deepnorm", "delayed")])[0]
    for place in ("tp2 tokens", "fsdp2"):
        first, second = run_ranks(2, histories, [recipe_of("deepnorm", "delayed", place)])
        assert torch.equal(first[0], second[0]), place
        assert torch.allclose(first[0], wanted, rtol=0.1), place
        assert (wanted > 0).all() and wanted.shape == (12, 2, 2)


def histories(rank: int, recipes: list[Recipe]) -> list[Tensor]:
    results = []
    for recipe in recipes:
        _, engine = build(recipe)
        for seed in range(3):
            assert engine.step(batches(engine, recipe, seed), 1e-3).applied
        results.append(engine.low_precision._delayed.history.clone())
    return results


def test_a_refused_step_leaves_delayed_scales_and_a_saturated_infinity_is_not_hidden():
    recipe = recipe_of("pre", "delayed")
    assembled, engine = build(recipe)
    for seed in range(2):
        assert engine.step(batches(engine, recipe, seed), 1e-3).applied
    before = engine.low_precision._delayed.history.clone()
    weights = {name: p.detach().clone() for name, p in assembled.parameters().items()}
    norm = assembled.parameters()["blocks.1.attention.norm_in.weight"]
    with torch.no_grad():
        norm[0] = torch.inf
    assert not engine.step(batches(engine, recipe), 1e-3).applied
    with torch.no_grad():
        norm.copy_(weights["blocks.1.attention.norm_in.weight"])
    assert torch.equal(engine.low_precision._delayed.history, before)
    assert all(torch.equal(p, weights[name]) for name, p in assembled.parameters().items())
    assert engine.step(batches(engine, recipe), 1e-3).applied


@pytest.mark.parametrize(
    "fp8", ["delayed", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rowwise", "block"))]
)
def test_steps_in_layouts_end_with_equal_weights_on_all_ranks(fp8):
    for place in ("tp2 tokens", "fsdp2"):
        (first, *_), digest = (
            results[0] if rank else results
            for rank, results in enumerate(outcomes(2, [recipe_of("keel", fp8, place)], {"optimizer": "adamw"}))
        )
        assert first.digest == digest
        wanted = outcome(recipe_of("keel", fp8), optimizer="adamw")
        assert first.loss == pytest.approx(wanted.loss, rel=1e-3)
        assert max(errors(first.weights, wanted.weights).values()) < 0.1


def test_what_starts_at_zero_takes_current_scales_until_it_has_a_size():
    """ReZero's branches have no gradient in the first step, and so no history in the second."""
    found = []
    for fp8 in ("delayed", "tensorwise"):
        recipe = recipe_of("rezero", fp8)
        assembled, engine = build(recipe)
        assert engine.step(batches(engine, recipe), 1e-3).applied
        engine.gradients(batches(engine, recipe, seed=4))
        found.append(gradients(assembled))
    got, wanted = found
    for name in ("blocks.1.attention.branch.qkv.weight", "blocks.1.ffn.branch.gate_up.weight"):
        assert distance({name: got[name]}, {name: wanted[name]}) < 0.3, name
