"""Every rule of the linter: a recipe that trips it and one that is just inside."""

import time

import pytest

from megaresnorm.errors import ConfigError
from megaresnorm.model.lint import check, estimates, lint, swallowed_from, update_bound
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe

BF16 = {"compute": "bf16", "residual_dtype": "bf16"}
FP16 = {"compute": "fp16"}
TENSORWISE = {"compute": "fp8", "fp8": {"recipe": "tensorwise"}}
E4M3 = {"compute": "fp8", "fp8": {"recipe": "tensorwise", "backward": "e4m3"}}


def model(**settings) -> ModelRecipe:
    return ModelRecipe.model_validate(
        {"dim": 64, "num_blocks": 24, "num_heads": 4, "seq_len": 8, "vocab_size": 64, **settings}
    )


def rules(precision=None, **settings):
    return {(f.rule, f.refused) for f in lint(model(**settings), PrecisionRecipe(**(precision or {})))}


BASE = {"topology_options": {"base_dim": 64, "base_num_blocks": 2}}


def square(ratio):
    return {"topology": "deepnorm", "ffn_dim": 64, "init": {"distribution": "normal", "std": 0.125 * ratio}}


TIED = {"tied_embeddings": True}
REORDERED = {"topology": "reordered", "qk_norm": "head"}
CASES = [
    # rule, refused, settings that trip it, settings just inside, precision
    ("reordered-qk-norm", True, {"topology": "reordered"}, {"topology": "reordered", "qk_norm": "head"}, {}),
    ("scaled-twice", True, {"topology": "lns", "init": {"scale_residual": True}},
     {"topology": "pre", "init": {"scale_residual": True}}, {}),
    ("scaled-twice", True, {"topology": "pre_scaled", "init": {"scale_residual": True}},
     {"topology": "pre_scaled"}, {}),
    ("unused-option", True, {"topology": "pre", "topology_options": {"mix_ratio": 0.5}},
     {"topology": "mix_ln", "topology_options": {"mix_ratio": 0.0}}, {}),
    ("scaled-in-vain", True, {"topology": "peri", "init": {"scale_residual": True}},
     {"topology": "gated", "init": {"scale_residual": True}}, {}),
    ("completep-base", False, {"topology": "completep", "topology_options": {"base_dim": 64}},
     {"topology": "completep", **BASE}, {}),
    ("completep-init", True,
     {"topology": "completep", "topology_options": {"base_dim": 32, "base_num_blocks": 2},
      "init": {"distribution": "normal"}},
     {"topology": "completep", **BASE, "init": {"distribution": "normal"}}, {}),
    ("tied-self-match", True, {**TIED, "topology": "deepnorm", "init": {"embedding_std": 0.1251}},
     {**TIED, "topology": "deepnorm", "init": {"embedding_std": 0.125}}, {}),
    # Square matrices whose Xavier deviation is 1/8: B is the square of the deviation relative to that.
    ("update-bound", False, square(1.45), square(1.40), {}),
    ("update-bound", False, square(0.69), square(0.72), {}),
    ("tied-self-match", True, {**TIED, "topology": "keel", "init": {"embedding_std": 1.0}},
     {**TIED, "topology": "keel", "init": {"embedding_std": 0.125}}, {}),
    ("update-bound", False, {"topology": "deepnorm_glm", "num_blocks": 3},
     {"topology": "deepnorm_glm", "num_blocks": 2}, {}),
    ("update-bound", False, {"topology": "post", "num_blocks": 1}, {"topology": "deepnorm", "num_blocks": 1}, {}),
    ("bf16-swallows", False, {"topology": "deepnorm", "num_blocks": 323},
     {"topology": "deepnorm", "num_blocks": 322}, BF16),
    ("bf16-swallows", False, {"topology": "keel", "num_blocks": 129}, {"topology": "keel", "num_blocks": 128}, BF16),
    ("fp16-stream-growth", False, {**REORDERED, "num_blocks": 72}, {**REORDERED, "num_blocks": 71}, FP16),
    # Without the product of a gated ffn, which grows as the square of the stream.
    ("fp16-stream-growth", False, {**REORDERED, "ffn": "gelu", "embedding_multiplier": 66},
     {**REORDERED, "ffn": "gelu", "embedding_multiplier": 65}, FP16),
    ("fp16-rezero", False, {"topology": "rezero", "num_blocks": 1}, {"topology": "layerscale", "num_blocks": 1}, FP16),
]  # fmt: skip
OF_POST_NORM = "update-bound"  # which warns of the same recipes
ROWS = [  # rule, topology, blocks from which on, precision
    ("fp16-gradient-rows", "post", 56, FP16),
    ("fp8-gradient-rows", "post", 27, E4M3),
    ("fp8-gradient-rows", "post", 57, TENSORWISE),
    ("fp8-gradient-rows", "gated", 71, E4M3),
    ("fp8-gradient-rows", "mix_ln", 92, E4M3),
]


@pytest.mark.parametrize(("rule", "refused", "outside", "inside", "precision"), CASES)
def test_rule_trips_and_just_inside_it_does_not(rule, refused, outside, inside, precision):
    assert (rule, refused) in rules(precision, **outside)
    assert not rules(precision, **inside)


@pytest.mark.parametrize(("rule", "topology", "num_blocks", "precision"), ROWS)
def test_gradient_rows_are_warned_of_from_a_depth_on(rule, topology, num_blocks, precision):
    found = rules(precision, topology=topology, num_blocks=num_blocks)
    assert (rule, False) in found and {name for name, _ in found} <= {rule, OF_POST_NORM}
    assert {name for name, _ in rules(precision, topology=topology, num_blocks=num_blocks - 1)} <= {OF_POST_NORM}


@pytest.mark.parametrize("fp8", [
    {"recipe": "rowwise"}, {"recipe": "block"}, {"recipe": "mxfp8"}, {"recipe": "tensorwise", "backward": "bf16"},
])  # fmt: skip
def test_scales_of_tokens_and_bf16_gradients_reach_every_row(fp8):
    assert rules({"compute": "fp8", "fp8": fp8}, topology="post", num_blocks=500) == {(OF_POST_NORM, False)}


def test_blocks_in_bf16_have_no_fp8_gradients():
    kept = {**E4M3, "fp8": {**E4M3["fp8"], "bf16_first_blocks": 20}}
    assert rules(kept, topology="post", num_blocks=45) == {(OF_POST_NORM, False)}
    assert ("fp8-gradient-rows", False) in rules(kept, topology="post", num_blocks=46)


@pytest.mark.parametrize("key", ["bf16_first_blocks", "bf16_last_blocks"])
def test_ends_of_a_deep_model_in_fp8_are_warned_of(key):
    assert rules({"compute": "fp8", "fp8": {key: 0}}, num_blocks=20) == {("fp8-first-last", False)}
    assert not rules({"compute": "fp8", "fp8": {key: 0}}, num_blocks=19)
    assert not rules({"compute": "fp8", "fp8": {key: 1}}, num_blocks=20)


@pytest.mark.parametrize("precision", [FP16, E4M3], ids=["fp16", "e4m3"])
@pytest.mark.parametrize("topology", ["pre", "pre_scaled", "deepnorm", "keel", "peri", "subln", "lns", "layerscale"])
def test_normalised_branches_are_safe_at_any_depth(topology, precision):
    """The 1/L of KEEL and a gate of 1e-6 are one factor on a tensor; a normalised row cannot exceed D^1/2."""
    assert not rules(precision, topology=topology, num_blocks=500)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp8"])  # fp16 has no BF16 stream
def test_a_bf16_stream_is_warned_of_whatever_the_products(compute):
    stream = {"compute": compute, "residual_dtype": "bf16"}
    assert ("bf16-swallows", False) in rules(stream, topology="keel", num_blocks=129)
    assert not rules(stream, topology="keel", num_blocks=128)


def test_bf16_warning_is_about_the_stream_not_the_products():
    assert not rules({"compute": "bf16", "residual_dtype": "fp32"}, topology="deepnorm", num_blocks=400)


def test_tied_default_deviation_is_accepted_for_every_topology():
    for name in TOPOLOGIES:
        findings = lint(model(topology=name, qk_norm="head", tied_embeddings=True), PrecisionRecipe())
        assert not [f for f in findings if f.refused], name


@pytest.mark.parametrize("num_blocks", [1, 6, 32, 100, 500])
def test_update_bound_is_the_law_of_the_paper(num_blocks):
    n = num_blocks
    assert update_bound(model(topology="deepnorm", num_blocks=n)) == pytest.approx(1.0)
    assert update_bound(model(topology="post", num_blocks=n)) == pytest.approx(4 * n)
    assert update_bound(model(topology="deepnorm_glm", num_blocks=n)) == pytest.approx(1 / n)
    assert update_bound(model(topology="pre", num_blocks=n)) is None


def test_branch_to_trunk_estimates():
    """0.297 N^-3/4 for DeepNorm, 1/2N for KEEL, and a variance that grows by 1 a sub-layer for Peri."""
    assert estimates(model(topology="deepnorm", num_blocks=100))[-1].branch_to_trunk == pytest.approx(
        0.2973 * 100**-0.75, rel=1e-3
    )
    assert estimates(model(topology="keel", num_blocks=100))[-1].branch_to_trunk == pytest.approx(1 / 200)
    assert estimates(model(topology="peri", num_blocks=8))[-1].branch_to_trunk == pytest.approx(1 / 16**0.5)
    assert swallowed_from(model(topology="rezero")) is None  # its gate learns how much to add


def test_refusals_stop_a_recipe_with_one_line(tiny):
    with pytest.raises(ConfigError, match=r"set model\.qk_norm=head or full"):
        check(tiny(model={"topology": "reordered"}))
    warnings = check(tiny(model={"topology": "post"}))
    assert [w.rule for w in warnings] == ["update-bound"] and "B = 2N" in warnings[0].message


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_linting_is_instant_at_any_depth(topology):
    start = time.process_time()
    lint(model(topology=topology, qk_norm="head", num_blocks=2000), PrecisionRecipe(**BF16))
    assert time.process_time() - start < 2.0
