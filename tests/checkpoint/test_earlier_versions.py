"""A run that version 0.1.0 has left (before settings and modules were renamed), read and gone on from in every layout.

version_0_1_0/ holds its data, its checkpoint of step 4, written by 4 ranks (tp 2 in the columns layout, FSDP2 with the
setting that was called ``parallel.shard: gradients``), the digest of every whole tensor in it, and the losses of the
same run when nothing interrupts it. All is FP64.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from launched import be_rank

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import recipe_of, state_of
from megaresnorm.recipe.load import build_recipe, load_recipe
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

LEFT = Path(__file__).parent / "version_0_1_0"
EXPECTED = json.loads((LEFT / "expected.json").read_text())
STEP, STEPS = 4, 14
LAYOUTS = {
    "one": (1, {}),
    "tp2 full": (2, {"tp": 2}),
    "tp2 tokens": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "tp2 columns": (2, {"tp": 2, "tensor_layout": "columns"}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "fsdp2": (2, {"dp_shard": 2, "reshard_after_forward": False}),
    "as it was": (4, {"tp": 2, "tensor_layout": "columns", "dp_shard": 2, "reshard_after_forward": False}),
}


@pytest.fixture
def left(tmp_path, monkeypatch) -> Path:
    """A copy to go on from, in the folder that the paths of its recipe are relative to."""
    shutil.copytree(LEFT, tmp_path / "left")
    monkeypatch.chdir(tmp_path / "left")
    return tmp_path / "left"


def test_every_tensor_has_the_bits_that_it_had(left):
    checkpoint = Checkpoint(left / "run" / "checkpoints" / f"step-{STEP:08d}")
    for group, digests in EXPECTED["sha256 of every tensor at step 4, 16 digits"].items():
        assert digests.keys() == set(checkpoint.names(group))
        for name, digest in digests.items():
            whole = checkpoint.read(group, name).contiguous().numpy()
            assert hashlib.sha256(whole.tobytes()).hexdigest()[:16] == digest, name


def test_its_settings_have_their_new_names(left):
    checkpoint = Checkpoint(left / "run" / "checkpoints" / f"step-{STEP:08d}")
    assert checkpoint.state["recipe"]["parallel"]["shard"] == "gradients"
    recipe = recipe_of(checkpoint.folder, state_of(checkpoint.folder, checkpoint.state))
    assert recipe.parallel.reshard_after_forward is False
    assert load_recipe(left / "run" / "recipe.yaml").parallel.reshard_after_forward is False


def go_on(rank: int, num_ranks: int, recipe) -> None:
    be_rank(rank, num_ranks)
    train(recipe)


USUAL = ("one", "tp2 columns", "pp2", "as it was")  # in every run of the tests; the others are slow


@pytest.mark.parametrize(
    "layout", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_ten_more_steps_are_those_of_the_run_that_nothing_interrupted(layout, left):
    num_ranks, parallel = LAYOUTS[layout]
    values = load_recipe(left / "run" / "recipe.yaml").model_dump(exclude_none=True)
    values["parallel"] = parallel
    values["train"] |= {"steps": STEPS, "output": "run"}
    run_ranks(num_ranks, go_on, num_ranks, build_recipe(values))
    rows = [json.loads(line) for line in (left / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows}
    assert losses.keys() == set(range(STEP + 1, STEPS + 1))
    expected = EXPECTED["losses of 14 uninterrupted steps"]
    assert all(abs(losses[i] - expected[i - 1]) < 1e-11 for i in losses), (losses, expected)
