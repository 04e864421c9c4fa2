"""Every recipe in configs/ loads, passes the linter without a warning, and trains."""

import re
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.model.lint import check
from megaresnorm.recipe.load import load_recipe
from megaresnorm.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_loads_and_is_clean(path):
    assert check(load_recipe(path)) == []
    assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert f"`{path.name}`" in (ROOT / "configs" / "README.md").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_can_be_used(path, byte_data, tmp_path, capsys):
    """A dry run as it stands, and two steps of it made small."""
    data = [f"data.path={byte_data}", f"train.output={tmp_path / 'run'}", "data.valid_fraction=0.2"]
    assert main(["train", str(path), *data, "model.seq_len=16", "--dry-run"]) == 0
    assert re.search(r"^# model .* parameters, .*FLOP a token", capsys.readouterr().out, re.MULTILINE)
    small = [
        "model.dim=32",
        "model.num_blocks=2",
        "model.ffn_dim=48",
        "model.seq_len=16",
        "train.steps=300",
        "model.num_heads=2",
        "train.loggers=[]",
        "parallel={}",
    ]
    recipe = load_recipe(
        path, [*data, *small, *([] if "num_kv_heads" not in path.read_text() else ["model.num_kv_heads=1"])]
    )
    from megaresnorm.run import Run

    run = Run(recipe)
    losses = [Trainer(run).step()["loss"] for _ in range(2)]
    assert all(0 < loss < 12 for loss in losses)  # the logarithm of 32,000 is 10.4


def test_quickstart_is_the_recipe_that_the_readme_describes():
    model = load_recipe(ROOT / "configs" / "quickstart.yaml").model
    assert (model.topology, model.num_blocks, model.norm, model.positions, model.ffn) == (
        "deepnorm",
        50,
        "rmsnorm",
        "rope",
        "swiglu",
    )
    assert model.kv_heads < model.num_heads
    from megaresnorm.model.transformer import has_embedding_norm

    assert has_embedding_norm(model)


def test_quickstart_made_small_learns_more_than_frequencies(tmp_path):
    """Half a minute: 10 blocks, 150 steps on the built-in corpus, at least half a nat below the unigram entropy."""
    from megaresnorm.data.prepare import PrepareJob, prepare

    data = prepare(PrepareJob(out=tmp_path / "data", corpus="stdlib", workers=2)).folder
    quick = [
        "model.num_blocks=10",
        "model.seq_len=64",
        "train.steps=150",
        "train.eval_every=0",
        "train.tensorboard=false",
    ]
    overrides = [f"data.path={data}", f"train.output={tmp_path / 'run'}", *quick]
    summary = train(load_recipe(ROOT / "configs" / "quickstart.yaml", overrides))
    assert summary.valid_loss < summary.unigram_entropy - 0.5
