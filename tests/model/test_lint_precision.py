"""What the rules for FP16 and FP8 compute, beside what models do at initialisation, in FP64."""

import pytest

from megaresnorm.model.lint import estimates
from megaresnorm.model.lint_precision import NORMAL_RANGE, PEAK, gradient_spread, largest_rms
from megaresnorm.model.topology import SUBLAYERS, residual_at
from megaresnorm.studies.gradient_rows import measure_gradient_rows, watched_linears
from megaresnorm.studies.probe_depth import ProbeSetting

SETTING = ProbeSetting()


def rms(x):
    return x.square().mean().sqrt().item()


def of_rows(dy):
    return dy.square().mean(dim=1).sqrt()


@pytest.mark.parametrize(
    ("topology", "num_blocks"), [("post", 24), ("mix_ln", 48), ("pre", 48), ("deepnorm", 24), ("keel", 24)]
)
def test_spread_of_gradients_over_tokens_is_that_of_attention_above(topology, num_blocks):
    for one in measure_gradient_rows(SETTING.model(topology, num_blocks), [0, num_blocks // 2, num_blocks - 1]):
        assert 1 / 6 < one.spread / one.expected < 6, one


@pytest.mark.parametrize(("num_blocks", "low", "high"), [(14, 0.0, 0.05), (40, 0.8, 1.0)])
def test_a_tensor_wide_e4m3_scale_loses_gradients_of_a_deep_post_norm_model(num_blocks, low, high):
    """Where the rule warns (from 27 blocks on) most elements are subnormal or 0; where it does not, few are."""
    recipe = SETTING.model("post", num_blocks)
    assert (gradient_spread(estimates(recipe)) * PEAK > NORMAL_RANGE["e4m3"]) == (low > 0)
    (first,) = measure_gradient_rows(recipe, [0])
    assert low <= first.below["e4m3"] <= high
    assert first.below_by_token < 0.01, "a scale for each token loses nothing"


@pytest.mark.parametrize("topology", ["keel", "deepnorm", "completep", "layerscale", "peri", "pre"])
def test_small_gradients_of_a_whole_tensor_cost_one_scale_nothing(topology):
    """KEEL's are 1/L of post-norm's, layerscale's 1e-6: what counts is the spread within a tensor."""
    for name, kernel in watched_linears(SETTING.model(topology, 48)).items():
        if name.endswith((".out", ".down")):
            rows = of_rows(kernel.dy)
            assert kernel.dy.abs().max() / rows.median() < 100 < NORMAL_RANGE["e4m3"] / 100, name


@pytest.mark.parametrize("ffn", ["swiglu", "gelu"])
@pytest.mark.parametrize("topology", ["reordered", "pre", "post", "deepnorm", "subln"])
def test_largest_rms_is_that_of_a_model(topology, ffn):
    """Within 35 %: the estimate of attention knows nothing of averages over tokens."""
    recipe = SETTING.model(topology, 24).model_copy(update={"ffn": ffn})
    found, known = watched_linears(recipe), estimates(recipe)
    for block in (0, 12, 23):
        into = found[f"blocks.{block}.ffn.branch.{'gate_up' if ffn == 'swiglu' else 'up'}"]
        inner = rms(found[f"blocks.{block}.ffn.branch.down"].x) if topology != "subln" else 0.0
        spec, trunk = residual_at(recipe, block, "ffn"), known[len(SUBLAYERS) * block + 1].trunk
        assert max(rms(into.x), inner) <= 1.35 * largest_rms(recipe, "ffn", spec, trunk)
        if topology == "reordered" and block:
            assert max(rms(into.x), inner) >= 0.5 * largest_rms(recipe, "ffn", spec, trunk)


@pytest.mark.parametrize("topology", ["pre", "peri", "keel", "deepnorm", "post", "reordered"])
def test_no_element_of_a_normalised_row_is_above_the_root_of_its_width(topology):
    recipe = SETTING.model(topology, 12)
    inputs = [kernel.x for name, kernel in watched_linears(recipe).items() if name.endswith((".qkv", ".up"))]
    bounded = [x.abs().max().item() <= recipe.dim**0.5 for x in inputs]
    assert all(bounded) or topology == "reordered"
    if topology == "reordered":  # its rows grow, all alike, so that one scale serves them
        assert rms(inputs[-1]) > 4 and (of_rows(inputs[-1]).max() / of_rows(inputs[-1]).median()).item() < 1.5
