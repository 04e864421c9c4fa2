"""The depth probe, and what the topologies' papers promise of it."""

import json
from functools import cache
from statistics import median

import pytest

from megaresnorm.cli import main
from megaresnorm.studies.probe_depth import ProbeSetting, probe

# (depths, seeds): a few in CI, all with the slow tests.
SOME, ALL = ((6, 25, 100), (0,)), ((6, 12, 25, 50, 100), (0, 1, 2))
of_some_and_all = pytest.mark.parametrize(
    ("depths", "seeds"), [SOME, pytest.param(*ALL, marks=pytest.mark.slow)], ids=["some", "all"]
)


@cache
def result(topology, num_blocks, seed):
    return probe(topology, num_blocks, seed, ProbeSetting())


def spreads(topology, measure, depths, seeds):
    """max / min over depth, for every seed."""
    values = [[getattr(result(topology, n, seed), measure) for n in depths] for seed in seeds]
    return [max(v) / min(v) for v in values]


@of_some_and_all
def test_deepnorm_update_is_constant_over_depth_under_sgd(depths, seeds):
    got = spreads("deepnorm", "sgd_update", depths, seeds)
    assert median(got) < 1.2 and max(got) < 1.35


@of_some_and_all
def test_post_norm_update_explodes(depths, seeds):
    for seed in seeds:
        assert result("post", 100, seed).sgd_update >= 500 * result("deepnorm", 100, seed).sgd_update


@of_some_and_all
def test_completep_update_is_constant_over_depth_under_adam(depths, seeds):
    assert median(spreads("completep", "adam_update", depths, seeds)) < 1.25


@of_some_and_all
def test_updates_of_the_variants_follow_the_law_of_b(depths, seeds):
    """GLM's constants have B = 1/N, so its update falls as 1/N (within 15 %)."""
    for seed in seeds:
        ratio = result("deepnorm_glm", 6, seed).sgd_update / result("deepnorm_glm", 100, seed).sgd_update
        assert ratio == pytest.approx(100 / 6, rel=0.2)


@of_some_and_all
def test_signal_and_gradient_at_initialisation(depths, seeds):
    for n in depths:
        for seed in seeds:
            found = result("deepnorm", n, seed)
            assert found.stream_rms == pytest.approx(1.0, rel=1e-3) and 0.95 < found.gradient_ratio < 1.05, n
    for seed in seeds:  # pre-norm: RMS grows as the square root of depth
        growth = result("pre", 100, seed).stream_rms / result("pre", 25, seed).stream_rms
        assert growth == pytest.approx(2.0, rel=0.25)


def test_reordered_without_qk_norm_would_explode():
    """The negative control behind the linter's refusal, built past the linter."""
    from megaresnorm.studies import probe_depth as depth

    class Without(ProbeSetting):
        def model(self, topology, num_blocks):
            return super().model(topology, num_blocks).model_copy(update={"qk_norm": "none"})

    assert depth.probe("reordered", 25, 0, Without()).gradient_ratio > 100
    assert depth.probe("reordered", 25, 0, ProbeSetting()).gradient_ratio < 20


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    out = tmp_path / "probe.json"
    arguments = [
        "depth",
        "--probe",
        "--topologies",
        "deepnorm,rezero",
        "--depths",
        "2,3",
        "--seeds",
        "2",
        "--dim",
        "16",
    ]
    assert main([*arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("deepnorm") == 2 and printed.count("rezero") == 2
    written = json.loads(out.read_text())
    assert len(written["results"]) == 8 and written["setting"]["dim"] == 16
    assert main(["depth", "--probe", "--topologies", "deepnorn"]) == 2
    assert "did you mean deepnorm?" in capsys.readouterr().err
    assert main(["depth", "--probe", "--dim", "15"]) == 2
