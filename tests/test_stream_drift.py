"""A BF16 stream beside FP64: it loses branches where the linter says so, and not where it says nothing."""

import pytest
import torch

from megaresnorm.model.lint import lint, swallowed_from
from megaresnorm.recipe import PrecisionRecipe
from megaresnorm.studies.probe_depth import ProbeSetting
from megaresnorm.studies.stream_drift import measure_drift, swallowed_share

SETTING = ProbeSetting(dim=32, ffn_dim=64, seq_len=32)


def test_a_branch_below_half_a_unit_in_the_last_place_is_lost():
    x = torch.tensor([1.0, 1.0, 1.5, -3.0, 1e-3, 256.0]).double()
    branch = x * torch.tensor([0.0039, 0.00391, 0.0026, 0.0026, 0.0019, 0.0039]).double()
    lost = (x + branch).bfloat16() == x.bfloat16()
    x = x.bfloat16().double()
    assert lost.tolist() == [True, False, True, True, True, True]
    assert swallowed_share(x, branch) == lost.double().mean().item()


@pytest.mark.parametrize(
    ("topology", "deep", "shallow"),
    [("keel", 200, 64), ("deepnorm_glm", 42, 10), ("peri", None, 100), ("pre", None, 100)],
)
def test_the_linter_warns_of_a_bf16_stream_where_most_of_a_branch_is_lost(topology, deep, shallow):
    """Most elements are lost at about twice the depth that the rule names, a third at half of it."""
    precision = PrecisionRecipe(compute="bf16", residual_dtype="bf16")
    for num_blocks, expected in ((deep, True), (shallow, False)):
        if num_blocks is None:
            continue
        recipe = SETTING.model(topology, num_blocks)
        warned = "bf16-swallows" in {finding.rule for finding in lint(recipe, precision)}
        (last,) = measure_drift(recipe, [num_blocks], ["bf16"])
        assert warned == expected == (swallowed_from(recipe) is not None)
        assert last.swallowed > 0.6 if expected else last.swallowed < 0.45, (num_blocks, last)


def test_what_a_bf16_stream_loses_an_fp32_one_keeps():
    found = measure_drift(SETTING.model("deepnorm_glm", 42), [21, 42])
    assert [(one.block, one.stored) for one in found] == [(21, "fp32"), (42, "fp32"), (21, "bf16"), (42, "bf16")]
    for fp32, bf16 in zip(found[:2], found[2:], strict=True):
        assert fp32.error < 3e-6 < 1e-3 < bf16.error and fp32.rms == bf16.rms
        assert fp32.of_movement < 1e-3 and bf16.of_movement > 0.5, "more is lost than the branches have moved"
