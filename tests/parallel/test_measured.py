"""Time and memory of parallel runs, as tools/bench_parallel.py measures them."""

import pytest
from bench_parallel import BUILT, activation_peak, building_peak, idle_share

from megaresnorm.parallel.stages import bubble
from megaresnorm.testing import run_ranks

MIB = 2**20


@pytest.mark.parametrize(
    ("schedule", "stages_per_rank"),
    [
        pytest.param("gpipe", 1, marks=pytest.mark.slow),
        ("1f1b", 1),
        pytest.param("interleaved", 2, marks=pytest.mark.slow),
    ],
)
def test_ranks_of_a_pipeline_wait_as_long_as_the_formula_says(schedule, stages_per_rank):
    """Four ranks and eight microbatches; the stages sleep, the rest is sending. The formulas are 0.11 apart."""
    measured = max(run_ranks(4, idle_share, schedule, stages_per_rank, 8))
    expected = bubble(4, 8, stages_per_rank)
    assert expected - 0.01 < measured < expected + 0.08


def test_1f1b_keeps_a_microbatch_for_every_stage_to_come_and_gpipe_all():
    one = activation_peaks("gpipe", 4)[1] / 4
    kept = {schedule: [peak / one for peak in activation_peaks(schedule, 8)] for schedule in ("gpipe", "1f1b")}
    assert kept["gpipe"] == pytest.approx([8, 8, 8, 8], rel=0.05)
    assert kept["1f1b"] == pytest.approx([4, 3, 2, 1], rel=0.05)


def activation_peaks(schedule: str, num_microbatches: int) -> list[int]:
    return run_ranks(4, activation_peak, schedule, num_microbatches)


@pytest.mark.parametrize("layout", BUILT)
def test_building_a_rank_needs_its_shards_and_one_tensor(layout):
    for grown, own, largest in run_ranks(2, building_peak, BUILT[layout]):
        assert own < 180 * MIB and largest == 50 * MIB
        assert grown < own + largest + 12 * MIB
