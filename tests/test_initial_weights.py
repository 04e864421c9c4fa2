"""A run that starts from the weights of a checkpoint."""

import logging
import shutil
from pathlib import Path

import pytest
from digests import checkpoint_digest, engine_digest

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.cli import main
from megaresnorm.errors import CheckpointError
from megaresnorm.recipe.load import load_recipe
from megaresnorm.run import Run
from megaresnorm.trainer import train


def test_a_run_starts_from_the_weights_of_another_and_resumes_as_itself(tiny, tmp_path):
    first = train(tiny(train={"output": str(tmp_path / "first")}))
    settings = {"output": str(tmp_path / "second"), "initial_weights": str(tmp_path / "first"), "seed": 77}
    with Run(tiny(train=settings)) as run:
        assert run.steps_done == 0 and engine_digest(run.engine) == checkpoint_digest(first.checkpoint)
        assert run.engine.state().updates == 0
        assert run.evaluate().loss == first.valid_loss
    whole = train(tiny(train=settings))
    assert whole.steps == 6 and whole.weights_digest != first.weights_digest
    # Resumed, it goes on from its own checkpoint, whether or not the first is still there.
    shutil.rmtree(tmp_path / "first")
    with Run(tiny(train=settings)) as run:
        assert run.steps_done == 6 and engine_digest(run.engine) == checkpoint_digest(whole.checkpoint)


def test_what_differs_is_told_and_what_does_not_fit_is_refused(tiny, tmp_path, caplog):
    train(tiny(train={"output": str(tmp_path / "first"), "steps": 1}))
    caplog.set_level(logging.WARNING, logger="megaresnorm")
    other = {"output": str(tmp_path / "second"), "initial_weights": str(tmp_path / "first")}
    with Run(tiny(model={"rope_theta": 500.0, "dropout": 0.1}, train=other)):
        assert [r.message for r in caplog.records if "initial_weights" in r.message] == [
            "warning: model.rope_theta was 10000.0 for train.initial_weights and is 500.0 now"
        ]
    with pytest.raises(CheckpointError, match="has shape"):
        Run(tiny(model={"dim": 32}, train=other | {"output": str(tmp_path / "third")}))
    with pytest.raises(CheckpointError, match="nowhere: has no checkpoint"):
        Run(tiny(train=other | {"output": str(tmp_path / "fourth"), "initial_weights": str(tmp_path / "nowhere")}))


def test_a_converted_model_is_trained_on_by_the_recipe_that_comes_with_it(tiny, byte_data, tmp_path, capsys):
    recipe = tiny(model={"topology": "deepnorm", "vocab_size": 257})
    first = train(recipe)
    run, hf, back = recipe.train.output, str(tmp_path / "hf"), tmp_path / "back"
    assert main(["convert", "to-hf", run, hf]) == 0
    assert main(["convert", "from-hf", hf, str(back), "--data", str(byte_data)]) == 0
    (converted,) = (back / "checkpoints").iterdir()
    ours, theirs = Checkpoint(Path(first.checkpoint)), Checkpoint(converted)
    assert ours.tensors["weights"] == theirs.tensors["weights"]
    written = load_recipe(back / "recipe.yaml")
    assert written.model == recipe.model and written.train.initial_weights == str(back)
    overrides = ["train.steps=2", "train.global_batch=4", "train.tensorboard=false", "train.sample_tokens=0"]
    with Run(load_recipe(back / "recipe.yaml", overrides)) as continued:
        assert abs(continued.evaluate().loss - first.valid_loss) < 0.2  # of another split
    assert main(["train", str(back / "recipe.yaml"), *overrides]) == 0
    assert (tmp_path / "back-trained" / "checkpoints" / "step-00000002").is_dir()
    assert written.optim.lr == 1e-5 and written.schedule.warmup_steps == 100  # which the two steps do not reach
