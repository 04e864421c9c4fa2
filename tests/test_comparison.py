"""depth --train: verdicts, resuming, report."""

import csv
import itertools
import json
from math import inf

import numpy as np
import pytest

from megaresnorm.cli import main
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.studies.compare_topologies import Comparison, base_recipe, judge, markdown, summarize, write_report
from megaresnorm.studies.compare_topologies import compare as compare_until
from megaresnorm.trainer import Trainer

UNIGRAM = 3.0


def compare(comparison):
    return compare_until(comparison, StopSignals())


def curve(*points):
    """A loss curve of 50 steps between each pair of points."""
    return np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(points)]).tolist()


@pytest.mark.parametrize(
    ("losses", "outcome"),
    [
        (curve(6.0, 2.4, 2.2), "trains"),
        (curve(6.0, 3.1, 3.0), "unigram level"),
        (curve(6.0, 2.9, 2.9), "unigram level"),  # a little below is noise of the batches
        (curve(6.0, 2.4, 3.0, 3.0), "lost"),
        (curve(6.0, 2.4, 9.0, 2.4, 2.3), "trains"),  # a spike that is got over
        (curve(6.0, 2.4, 2.4) + [inf] * 50, "lost"),
        ([inf] * 50, "unigram level"),
        ([], "unigram level"),
        ([5.0] * 5 + [inf] + [1.0] * 100, "trains"),  # one refused step
    ],
)
def test_judge(losses, outcome):
    rates = np.linspace(0, 0.05, len(losses)).tolist()
    best, lr_at_best, verdict, max_lr = judge(losses, rates, UNIGRAM, ramp=True)
    assert verdict == outcome
    assert max_lr == {"trains": None, "unigram level": 0.0}.get(outcome, max_lr)
    if outcome == "lost":
        assert lr_at_best <= max_lr < rates[-1] and best < UNIGRAM
    assert judge(losses, rates, UNIGRAM, ramp=False)[3] is None


def test_never_having_learned_is_a_failure_at_zero_not_a_survival():
    """A run that stays at the unigram level never diverges; a naive detector would call that the highest rate."""
    flat = curve(6.0, 3.05, 3.05, 3.05)
    assert judge(flat, np.linspace(0, 0.05, len(flat)).tolist(), UNIGRAM, ramp=True)[2:] == ("unigram level", 0.0)


@pytest.fixture
def small(byte_data, tmp_path):
    def make(*overrides, **changes):
        settings = [
            "train.steps=4", "train.global_batch=2", "model.seq_len=16", "model.dim=16", "model.ffn_dim=16",
            "data.valid_fraction=0.1", *overrides,
        ]  # fmt: skip
        values = {"topologies": ["pre", "keel"], "depths": [1, 3], "seeds": range(2), **changes}
        return Comparison(out=tmp_path / "out", base=base_recipe(None, str(byte_data), settings), **values)

    return make


def test_every_combination_is_trained_once(small, monkeypatch):
    results = list(compare(small()))
    assert [(r.topology, r.num_blocks, r.seed) for r in results] == [
        (t, d, s) for t in ("pre", "keel") for d in (1, 3) for s in (0, 1)
    ]
    assert all(len(r.losses) == 4 and r.valid_loss > 0 for r in results)
    assert results[0].losses != results[1].losses  # another seed
    monkeypatch.setattr("megaresnorm.studies.compare_topologies._train", lambda *a: pytest.fail("was done already"))
    assert list(compare(small())) == results


def test_more_seeds_and_depths_train_only_what_is_new(small, monkeypatch):
    first = list(compare(small(seeds=range(1))))
    trained = []
    import megaresnorm.studies.compare_topologies as module

    real = module._train
    monkeypatch.setattr(module, "_train", lambda recipe, *a: trained.append(a[:3]) or real(recipe, *a))
    more = list(compare(small()))
    assert trained == [(t, d, 1) for t in ("pre", "keel") for d in (1, 3)]
    assert [r for r in more if r.seed == 0] == first


def test_other_settings_are_refused_and_damage_is_told(small):
    list(compare(small(topologies=["pre"], depths=[1], seeds=[0])))
    with pytest.raises(ConfigError, match="made with other settings"):
        list(compare(small("optim.lr=0.1", topologies=["pre"], depths=[1], seeds=[0])))
    path = small().out / "runs" / "pre-1-seed0" / "result.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"delete .*pre-1-seed0 to train the run again"):
        list(compare(small(topologies=["pre"], depths=[1], seeds=[0])))


def test_an_interrupted_comparison_goes_on(small, monkeypatch):
    whole = list(compare(small()))
    import shutil

    shutil.rmtree(small().out)

    real, steps = Trainer.step, []

    def step(self):
        steps.append(self)
        if len(steps) == 11:  # in the middle of the third run
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        list(compare(small("checkpoint.every=1")))
    monkeypatch.setattr(Trainer, "step", real)
    resumed = list(compare(small("checkpoint.every=1")))
    assert [r.losses for r in resumed] == [r.losses for r in whole]


def test_a_run_that_blows_up_is_a_result(small):
    (result,) = compare(
        small("optim.lr=1e30", "optim.clip=none", "train.steps=20", topologies=["pre"], depths=[1], seeds=[0])
    )
    assert result.outcome != "trains" and summarize([result])[0].outcome == result.outcome
    again = list(
        compare(small("optim.lr=1e30", "optim.clip=none", "train.steps=20", topologies=["pre"], depths=[1], seeds=[0]))
    )
    assert repr(again) == repr([result])


def test_report(small):
    comparison = small()
    results = list(compare(comparison))
    names = [path.name for path in write_report(comparison, results)]
    assert names == ["comparison.md", "comparison.csv", "comparison.png"]
    rows = list(csv.DictReader((comparison.out / "comparison.csv").open()))
    assert len(rows) == 8 * 4
    first = [float(r["loss"]) for r in rows if (r["topology"], r["num_blocks"], r["seed"]) == ("keel", "3", "1")]
    assert first == next(r for r in results if (r.topology, r.num_blocks, r.seed) == ("keel", 3, 1)).losses
    table = markdown(comparison, results)
    mean = (results[0].final_loss + results[1].final_loss) / 2
    assert f"{mean:.3f}" in table and "| 2 sub-layers | 6 sub-layers |" in table and "`keel`" in table
    assert (comparison.out / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_a_ramp_rises_to_the_last_step_and_is_reported(small):
    comparison = small("optim.lr=0.04", "train.steps=8", ramp=True, seeds=[0], depths=[1])
    results = list(compare(comparison))
    records = [
        json.loads(line)
        for line in (comparison.out / "runs" / "pre-1-seed0" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["lr"] for r in records] == pytest.approx([0.005 * (i + 1) for i in range(8)])
    assert results[0].max_lr == 0.0 and "never learned" in markdown(comparison, results)


def test_the_command(byte_data, tmp_path, capsys):
    small = ["train.steps=3", "train.global_batch=2", "model.seq_len=16", "model.dim=16", "data.valid_fraction=0.1"]
    command = ["depth", "--train", "--topologies", "pre", "--depths", "1", "--seeds", "1", "--data", str(byte_data)]
    assert main([*command, "--out", str(tmp_path / "out"), *small]) == 0
    assert "comparison.png" in capsys.readouterr().out
    for arguments, wanted in (
        (["depth", "--train", "--json", "x"], "--json has no effect with --train"),
        (["depth", "--probe", "--max-lr"], "--max-lr has no effect with --probe"),
        (["depth", "--probe", "optim.lr=1"], "section.key=value has no effect with --probe"),
        (["depth", "--train", "--topologies", "nrm"], "nrm"),
        ([*command, "--recipe", str(tmp_path / "no.yaml")], "cannot be read"),
        ([*command, "--out", str(tmp_path / "new"), "model.dimm=3"], "model.dim"),
    ):
        assert main(arguments) in (2, 3)
        error = capsys.readouterr().err
        assert wanted in error and error.count("\n") == 1, error


def test_a_recipe_keeps_its_data_and_data_replaces_only_the_path(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {dim: 8}\ntrain:\ndata: {path: runs/web, mask_documents: true, valid_fraction: 0.1}\n")
    assert base_recipe(str(file), None, [])["data"] == {
        "path": "runs/web",
        "mask_documents": True,
        "valid_fraction": 0.1,
    }
    assert base_recipe(str(file), "x", [])["data"] == {"path": "x", "mask_documents": True, "valid_fraction": 0.1}
    assert base_recipe(str(file), None, [])["train"] == {}
    file.write_text("data: {blend: [{path: a, weight: 1.0}], seed: 5}\n")
    assert base_recipe(str(file), "x", [])["data"] == {"path": "x", "seed": 5}


@pytest.mark.parametrize("override", ["model.num_blocks=9", "model.topology=pre", "train.seed=5", "train.output=x"])
def test_what_a_comparison_sets_itself_is_refused(override):
    with pytest.raises(ConfigError, match="has no effect here"):
        base_recipe(None, "x", [override])
    with pytest.raises(ConfigError, match="has no effect here"):
        base_recipe(None, "x", ["schedule.kind=linear"], ramp=True)
    assert base_recipe(None, "x", ["schedule.kind=linear"])["schedule"]["kind"] == "linear"


def test_an_interrupted_run_does_not_go_on_with_other_settings_or_data(small, monkeypatch):
    real, steps = Trainer.step, []

    def step(self):
        steps.append(self)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self)

    one = {"topologies": ["pre"], "depths": [1], "seeds": [0]}
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        list(compare(small("checkpoint.every=1", **one)))
    monkeypatch.setattr(Trainer, "step", real)
    with pytest.raises(ConfigError, match="other settings or data"):
        list(compare(small("checkpoint.every=1", "optim.lr=0.5", **one)))
    (result,) = compare(small("checkpoint.every=1", **one))
    assert len(result.losses) == 4
    monkeypatch.setattr(
        "megaresnorm.studies.compare_topologies.open_data", lambda recipe: type("D", (), {"whole_digest": "another"})
    )
    with pytest.raises(ConfigError, match="other settings or data"):
        list(compare(small("checkpoint.every=1", **one)))


def test_topologies_get_what_they_need_beside_others(small):
    results = list(compare(small(topologies=["reordered", "post"], depths=[1], seeds=[0])))
    assert [r.topology for r in results] == ["reordered", "post"]


def test_a_signal_ends_the_comparison_with_its_exit_code(small):
    stop = StopSignals()
    results = compare_until(small(), stop)
    next(results)
    import signal

    stop.received = signal.SIGTERM
    assert list(results) == [] and stop.exit_code == 143


def test_a_ramp_ends_at_5e_2_unless_the_recipe_says_otherwise(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: {dim: 8}\n")
    assert base_recipe(None, "x", [], ramp=True)["optim"] == {"lr": 5e-2}
    assert base_recipe(str(file), "x", [], ramp=True)["optim"] == {"lr": 5e-2}
    assert base_recipe(str(file), "x", ["optim.lr=0.1"], ramp=True)["optim"] == {"lr": 0.1}
    file.write_text("optim: {lr: 0.02, beta2: 0.9}\n")
    assert base_recipe(str(file), "x", [], ramp=True)["optim"] == {"lr": 0.02, "beta2": 0.9}
    assert base_recipe(None, "x", [])["optim"] == {"lr": 1e-3}
