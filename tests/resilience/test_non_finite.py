"""Losses, gradients or weights that are not finite: none is saved, nothing good is pruned, the exit code is not 0."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from launched import be_rank

from megaresnorm.checkpoint.format import list_checkpoints
from megaresnorm.checkpoint.inspect import verify
from megaresnorm.cli import main
from megaresnorm.data.samples import PackedSamples
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import CheckpointError, NonFiniteError, TrainingError, UserError
from megaresnorm.recipe.load import dump_recipe
from megaresnorm.run import Run
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import Trainer, train

EVERY = {"every": 2, "keep": 2}


def steps_saved(recipe) -> list[int]:
    return [step for step, _ in list_checkpoints(Path(recipe.train.output) / "checkpoints")]


def settings(tiny, **train):
    return tiny(train={"steps": 40, "eval_every": 0, "max_skipped_steps": 3} | train, checkpoint=EVERY)


def gone_on(recipe, **changes):
    """As a user goes on with another setting."""
    from megaresnorm.recipe.load import build_recipe

    values = recipe.model_dump(exclude_none=True)
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        values[section][leaf] = value
    return build_recipe(values)


def test_a_rate_that_destroys_the_weights_leaves_the_good_checkpoints(tiny, tmp_path):
    """Good up to step 6; gone on with a rate of 1e38 the run ends, and the sane rate goes on from step 6."""
    recipe = settings(tiny, steps=6)
    train(recipe)
    assert steps_saved(recipe) == [4, 6]
    wild = gone_on(recipe, train__steps=40, optim__lr=1e38)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(wild))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 5
    assert steps_saved(recipe)[-2:] == [4, 6]
    summary = train(gone_on(recipe, train__steps=8))
    assert summary.exit_code == 0 and summary.steps == 8 and steps_saved(recipe) == [6, 8]


def poisoned_at(monkeypatch, step: int, poison) -> None:
    real = Trainer.step

    def one(trainer):
        if trainer.run.steps_done == step:
            poison(trainer.run)
        return real(trainer)

    monkeypatch.setattr(Trainer, "step", one)


def every_loss(run) -> None:
    """From now on."""
    backward = run.engine.backward
    run.engine.backward = lambda *given: backward(*given) * float("nan")


def used_weight(run) -> None:
    with torch.no_grad():
        run.engine.model.head.weight[0] = float("nan")


def unused_row(run) -> None:
    """A row that no token reads (no text has the byte 255): losses and gradients stay finite."""
    with torch.no_grad():
        run.engine.model.embedding.weight[255, 0] = float("inf")


def moment(run) -> None:
    (slices, *_) = run.engine.tensors["optimizer"].values()
    slices.local.view(-1)[0] = float("nan")


CAUSES = {"a weight that is read": used_weight, "a weight that is not": unused_row, "a moment": moment}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_finite_is_never_saved(tiny, monkeypatch, cause, asynchronous):
    recipe = tiny(
        model={"topology": "pre"},
        train={"steps": 40, "eval_every": 0, "max_skipped_steps": 3},
        checkpoint=EVERY | {"asynchronous": asynchronous},
    )
    with monkeypatch.context() as patch:
        poisoned_at(patch, 7, CAUSES[cause])
        with pytest.raises(NonFiniteError):
            train(recipe)
    assert steps_saved(recipe)[-2:] == [4, 6]  # an older one stays where the first refusal came before it was pruned
    for _, path in list_checkpoints(Path(recipe.train.output) / "checkpoints"):
        assert verify(path) == []
    assert train(gone_on(recipe, train__steps=10)).steps == 10


def test_the_error_names_the_tensor(tiny, monkeypatch):
    poisoned_at(monkeypatch, 3, unused_row)
    with pytest.raises(
        NonFiniteError,
        match=r"step 4 is not saved: embedding.weight holds NaN or infinity; the newest is step-0+2",
    ):
        train(settings(tiny))


def bad_gradient_on_rank_1(rank: int, recipe) -> str:
    be_rank(rank, 2)
    real = NativeEngine.backward

    def backward(engine, batch, tokens):
        found = real(engine, batch, tokens)
        if rank == 1 and engine.policy.updates >= 5:
            next(iter(engine._parameters.values())).grad.view(-1)[0] = float("nan")
        return found

    NativeEngine.backward = backward
    try:
        return str(train(recipe).exit_code)
    except UserError as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize("parallel", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_a_gradient_of_one_rank_is_refused_by_all(tiny, parallel):
    recipe = settings(lambda **sections: tiny(parallel=parallel, **sections))
    said = run_ranks(2, bad_gradient_on_rank_1, recipe)
    assert said[0] == said[1] and said[0].startswith("NonFiniteError: 3 steps in a row")
    assert steps_saved(recipe) == [2, 4]


def test_no_step_is_saved_while_steps_are_refused_and_the_end_is_an_error(tiny, monkeypatch, caplog):
    """The last steps of the recipe are refused, fewer than end a run at once."""
    caplog.set_level(logging.WARNING, logger="megaresnorm")
    poisoned_at(monkeypatch, 7, every_loss)
    with pytest.raises(NonFiniteError, match=r"the last 2 steps were refused, .* the newest is step-0+6"):
        train(settings(tiny, steps=9))
    assert "step 8 is not saved while steps are being refused" in caplog.text


def test_checkpoints_before_the_first_refused_step_are_not_pruned(tiny, monkeypatch):
    """One step in three is refused for a while: later checkpoints may be spoilt. Earlier ones stay, also on resume."""
    real = NativeEngine.backward

    def backward(engine, batch, tokens):
        loss = real(engine, batch, tokens)
        spoilt = engine.policy.updates == 5 and not done.append(1) and len(done) < 3  # and when it is made again
        return loss * float("nan") if spoilt else loss

    done: list[int] = []
    recipe = settings(tiny, steps=10)
    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "backward", backward)
        train(recipe)
    assert steps_saved(recipe) == [2, 4, 8, 10]
    train(gone_on(recipe, train__steps=16))
    assert steps_saved(recipe) == [2, 4, 14, 16]


def test_a_run_does_not_go_on_from_weights_that_are_not_finite(tiny, monkeypatch, tmp_path, capsys):
    """Written by an older version, say. Nor does another run start from them, and every command names the tensor."""
    from megaresnorm.checkpoint import writer

    recipe = settings(tiny, steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "is_finite", lambda tensor: True)
        poisoned_at(patch, 3, unused_row)
        train(recipe)
    with pytest.raises(
        CheckpointError, match=r"step-00000004: weights embedding.weight is not finite; use an older checkpoint"
    ):
        Run(gone_on(recipe, train__steps=6))
    with pytest.raises(CheckpointError, match=r"train.initial_weights=.*embedding.weight is not finite"):
        Run(tiny(train={"output": str(tmp_path / "other"), "initial_weights": recipe.train.output}))
    capsys.readouterr()
    assert main(["checkpoint", "verify", recipe.train.output]) == 4
    assert "embedding.weight" in capsys.readouterr().out
    for command in (["to-hf"], ["to-hf", "--verify", "off"]):
        code = main(["convert", command[0], recipe.train.output, str(tmp_path / "out"), *command[1:]])
        assert code not in (0, 1) and not (tmp_path / "out").exists(), command
        assert "not finite" in (said := capsys.readouterr().err) or "holds NaN or infinity" in said, (command, said)


class OneToken(PackedSamples):
    """Documents of a single token, in some of the samples."""

    bare: tuple[int, ...] = ()

    def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
        super().read(i, tokens, documents)
        if i in self.bare and documents is not None:
            documents[:] = np.arange(len(tokens))


def test_a_batch_without_a_label_has_no_loss_and_changes_nothing(tiny, monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="megaresnorm")
    from megaresnorm.data import training_data

    monkeypatch.setattr(training_data, "PackedSamples", OneToken)
    monkeypatch.setattr(OneToken, "bare", (4, 5, 6, 7, 12, 13, 14, 15))
    recipe = tiny(data={"mask_documents": True, "valid_fraction": 0.0}, train={"steps": 4, "eval_every": 0})
    with Run(recipe) as run:
        Trainer(run).step()
        before = {name: slices.local.clone() for name, slices in run.engine.tensors["weights"].items()}
        record = Trainer(run).step()
        assert record["loss"] is None and run.steps_done == 2 and run.skipped_in_a_row == 0
        assert all(torch.equal(before[n], s.local) for n, s in run.engine.tensors["weights"].items())
        assert run.engine.state().updates == 1
    summary = train(recipe)
    records = [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] is None for r in records] == [False, True, False, True]
    assert summary.train_loss == records[2]["loss"]
    assert len([r for r in caplog.records if "has a label" in r.message]) == 2  # once a run


def test_a_split_without_labels_is_an_error(tiny, monkeypatch):
    from megaresnorm.data import training_data

    monkeypatch.setattr(training_data, "PackedSamples", OneToken)
    monkeypatch.setattr(OneToken, "bare", tuple(range(99)))
    recipe = tiny(data={"mask_documents": True}, train={"eval_every": 0})
    with Run(recipe) as run, pytest.raises(TrainingError, match=r"none of the .* validation samples has a label"):
        run.evaluate()
    monkeypatch.undo()
    monkeypatch.setattr(PackedSamples, "__init__", short_documents(PackedSamples.__init__))
    with pytest.raises(UserError, match="no document of the train split has two tokens"):
        Run(recipe)


def short_documents(real):
    def init(samples, *arguments):
        real(samples, *arguments)
        samples.longest = 1

    return init
