"""Steps with NaN and spikes: named, made again, left out, passed over from a checkpoint; nothing bad is applied."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from launched import be_rank, losses

from megaresnorm.errors import ConfigError, TrainingError
from megaresnorm.resilience.spikes import NEEDED, Spikes
from megaresnorm.run import Run
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import Trainer, train

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp": 2}),
    "columns": (2, {"tp": 2, "tensor_layout": "columns"}),
    "pp2": (2, {"pp": 2, "stage_blocks": [2, 2]}),
    "fsdp2": (2, {"dp_shard": 2}),
    "tp2 dp2": (4, {"tp": 2}),
}


@pytest.fixture
def drilled(tiny, tmp_path, monkeypatch):
    """A function from a layout and faults to a recipe with them, and its number of ranks."""
    monkeypatch.setenv("MEGARESNORM_DRILL", "1")

    def make(layout: str, *faults: dict, name: str = "run", **sections):
        ranks, parallel = LAYOUTS[layout]
        train_section = {"output": str(tmp_path / name), "micro_batch": 2, "global_batch": 8, "eval_every": 0}
        sections["train"] = train_section | sections.get("train", {})
        drill = {"drill": {"faults": list(faults)}} if faults else {}
        model = {"dropout": 0.1, "num_blocks": 4} | sections.pop("model", {})
        return tiny(model=model, parallel=parallel, **drill, **sections), ranks

    return make


def trained(rank: int, ranks: int, recipe) -> dict:
    """How a run ends on a rank, and whether each of its refused steps has changed a weight or a moment."""
    be_rank(rank, ranks)
    if recipe.drill is None:
        os.environ.pop("MEGARESNORM_DRILL", None)
    with Run(recipe) as run:
        trainer, changed = Trainer(run), []
        judge = trainer.guard._refused

        def refused(*given):
            changed.append(digest(run) != before[0])
            return judge(*given)

        def begin():
            before[0] = digest(run)
            tell()

        before, tell = [""], trainer.guard.begin
        trainer.guard.begin, trainer.guard._refused = begin, refused
        from megaresnorm.resilience.signals import StopSignals

        try:
            with StopSignals() as stop:
                summary = trainer.train(stop)
        except TrainingError as e:
            return {"error": str(e), "changed": changed}
        return {"weights": summary.weights_digest, "changed": changed}


def digest(run) -> str:
    from hashlib import sha256

    found = sha256()
    for group in ("weights", "optimizer"):
        for slices in run.engine.tensors[group].values():
            if slices.local is not None:
                found.update(slices.local.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def outcomes(recipe, ranks: int) -> list[dict]:
    return run_ranks(ranks, trained, ranks, recipe) if ranks > 1 else [trained(0, 1, recipe)]


def events(recipe, kind: str) -> list[dict]:
    return [one for one in read_incidents(Path(recipe.train.output)) if one["kind"] == kind]


PLACES = ("gradient", "activation", "weight")


def check_named(drilled, layout: str, place: str, rank: int) -> None:
    """Step 3 has NaN on one rank, also when it is made again: named, nothing changed, and the run ends as asked."""
    fault = {"kind": "nan", "step": 3, "rank": rank, "place": place, "block": 2, "times": 9}
    recipe, ranks = drilled(layout, fault, guard={"nonfinite": "stop"})
    found = outcomes(recipe, ranks)
    assert all(not any(one["changed"]) and one["changed"] for one in found) or place == "weight"
    assert all("step 3 refused" in one["error"] and f"on rank {rank} (" in one["error"] for one in found)
    (event,) = events(recipe, "nonfinite")
    assert (event["step"], event["rank"], event["block"], event["action"]) == (3, rank, 2, "stop")
    assert (place == "weight") == ("weight blocks.2" in event["what"])
    if place == "weight":
        return
    named = {"gradient": "gradient of blocks.2", "activation": "the stream after block 2"}[place]
    assert named in event["what"] or layout == "fsdp2"
    data_ranks = ranks // (recipe.parallel.tp * recipe.parallel.pp)
    data_rank = rank // recipe.parallel.tp if recipe.parallel.pp == 1 else 0
    first = 16 + data_rank  # samples 16 to 23 are those of step 3; the first microbatch has two of this rank's
    assert event["samples"] == [first, first + data_ranks]


@pytest.mark.parametrize("place", PLACES)
def test_nan_is_named_by_rank_block_tensor_and_samples(drilled, place):
    check_named(drilled, "tp2 dp2", place, {"gradient": 1, "activation": 2, "weight": 3}[place])


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rank", range(4))
def test_nan_on_each_of_four_ranks_is_named(drilled, place, rank):
    check_named(drilled, "tp2 dp2", place, rank)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "columns", "pp2", "fsdp2"])
def test_nan_is_named_in_every_layout(drilled, layout, place):
    rank = {"one": 0, "pp2": 1}.get(layout, 1)  # the second stage has block 2
    check_named(drilled, layout, place, rank)


def curve_of(recipe, ranks: int) -> tuple:
    (first, *_) = outcomes(recipe, ranks)
    return losses(Path(recipe.train.output)), first.get("weights")


@pytest.mark.parametrize(
    "layout", ["one", "tp2 dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "fsdp2", "columns"))]
)
@pytest.mark.parametrize("place", ["gradient", pytest.param("activation", marks=pytest.mark.slow)])
def test_a_transient_nan_leaves_no_trace_in_the_curve(drilled, layout, place):
    rank, block = {"pp2": (1, 2)}.get(layout, (LAYOUTS[layout][0] - 1, 1))
    fault = {"kind": "nan", "step": 3, "rank": rank, "place": place, "block": block}
    recipe, ranks = drilled(layout, fault)
    found = curve_of(recipe, ranks)
    assert found == curve_of(*drilled(layout, name="undisturbed"))
    (event,) = events(recipe, "nonfinite")
    assert event["transient"] and "made again, is fine" in event["what"]
    last = json.loads((Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["reruns"] == 1 and "skips" not in last


SPIKE = NEEDED + 9
LONG = {"train": {"steps": SPIKE + 8}, "checkpoint": {"every": 10}, "optim": {"lr": 0.01}}


class WithoutBatch(Run):
    """A run that never reads the samples of one step."""

    def _build(self):
        super()._build()
        from megaresnorm.data.loader import SampleRange

        self.guard.passed = [SampleRange(8 * (SPIKE - 1), 8)]


@pytest.mark.parametrize("layout", ["one", pytest.param("tp2 dp2", marks=pytest.mark.slow)])
def test_a_spike_is_passed_over_and_the_curve_is_that_without_the_batch(drilled, layout, monkeypatch):
    fault = {"kind": "spike", "step": SPIKE}
    recipe, ranks = drilled(layout, fault, guard={"spike": "rollback"}, **LONG)
    found = curve_of(recipe, ranks)
    assert [one["step"] for one in events(recipe, "spike")] == [SPIKE]
    (back,) = events(recipe, "rollback")
    assert back["to_step"] == SPIKE // 10 * 10 and back["passed"] == [8 * (SPIKE - 1), 8]
    monkeypatch.setitem(globals(), "Run", WithoutBatch)
    assert found == curve_of(*drilled(layout, name="without", **LONG))
    assert len(found[0]) == SPIKE + 8


def test_what_was_passed_over_stays_so_after_a_resume(drilled):
    recipe, _ = drilled("one", {"kind": "spike", "step": SPIKE}, guard={"spike": "rollback"}, **LONG)
    train(recipe)
    with Run(recipe) as run:
        assert run.guard.rollbacks == 1 and run.samples_done == 8 * (recipe.train.steps + 1)
        assert run.guard.spikes.losses[-1] == pytest.approx(run.train_loss)
        assert run.guard.state().passed == [[8 * (SPIKE - 1), 8]]


def test_a_spike_is_left_out_and_what_came_before_stays(drilled):
    recipe, _ = drilled("one", {"kind": "spike", "step": SPIKE}, guard={"spike": "skip"}, **LONG)
    found, _ = curve_of(recipe, 1)
    plain, _ = curve_of(*drilled("one", name="plain", **LONG))
    assert {step: found[step] for step in range(1, SPIKE)} == {step: plain[step] for step in range(1, SPIKE)}
    assert found[SPIKE] != plain[SPIKE]
    (event,) = events(recipe, "spike")
    assert event["action"] == "skip" and event["samples"] == [8 * (SPIKE - 1), 8 * SPIKE - 1]


def test_a_weight_that_is_spoilt_is_taken_from_the_checkpoint_and_nothing_is_passed_over(drilled):
    fault = {"kind": "nan", "step": 6, "place": "weight", "block": 1}
    settings = {"guard": {"nonfinite": "rollback"}, "checkpoint": {"every": 2}, "train": {"steps": 8}}
    recipe, _ = drilled("one", fault, **settings)
    assert curve_of(recipe, 1) == curve_of(*drilled("one", name="undisturbed", **settings))
    (back,) = events(recipe, "rollback")
    assert back["passed"] is None and back["to_step"] == 4


@pytest.mark.parametrize(("step", "asynchronous"), [(4, False), (4, True), (5, True)])
def test_a_moment_that_is_spoilt_is_taken_from_the_checkpoint_whenever_it_is_found(drilled, step, asynchronous):
    """By a save that is refused, or by the weights that the moment has spoilt."""
    fault = {"kind": "nan", "step": step, "place": "moment", "block": 1}
    checkpoint = {"every": 2, "asynchronous": asynchronous}
    settings = {"guard": {"nonfinite": "rollback"}, "checkpoint": checkpoint, "train": {"steps": 8}}
    recipe, _ = drilled("one", fault, **settings)
    assert curve_of(recipe, 1) == curve_of(*drilled("one", name="undisturbed", **settings))
    assert events(recipe, "rollback")[0]["to_step"] in (2, 4)


def test_files_that_cannot_be_cut_end_no_run_that_goes_back(drilled, monkeypatch):
    from megaresnorm.telemetry import metrics

    def full(*given):
        raise OSError(28, "No space left on device")

    real = metrics._drop_from
    fault = {"kind": "nan", "step": 4, "place": "weight", "block": 1}
    recipe, _ = drilled("one", fault, guard={"nonfinite": "rollback"}, checkpoint={"every": 2}, train={"steps": 6})
    monkeypatch.setattr(
        metrics.MetricsWriter, "go_back", cut_by(metrics.MetricsWriter.go_back, monkeypatch, full, real)
    )
    train(recipe)
    lines = [
        json.loads(line)["step"] for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [1, 2, 3, 3, 4, 5, 6]


def cut_by(go_back, monkeypatch, full, real):
    from megaresnorm.telemetry import metrics

    def on_a_full_disk(writer, first_step):
        monkeypatch.setattr(metrics, "_drop_from", full)
        go_back(writer, first_step)
        monkeypatch.setattr(metrics, "_drop_from", real)

    return on_a_full_disk


def test_ranks_that_differ_when_a_run_is_stopped_cost_its_last_checkpoint_alone(drilled):
    """It ends as it was asked to, and goes on from the checkpoint before."""
    fault = {"kind": "flip", "step": 5, "rank": 1, "place": "weight"}
    settings = {"checkpoint": {"every": 3}, "train": {"steps": 9}}
    recipe, ranks = drilled("dp2", fault, **settings)
    found = run_ranks(ranks, stopped_at, ranks, recipe, 5)
    assert [one["code"] for one in found] == [143, 143]
    assert [one["action"] for one in events(recipe, "corruption")] == ["not saved"]
    assert [path.name for path in (Path(recipe.train.output) / "checkpoints").glob("step-*")] == ["step-00000003"]


def stopped_at(rank: int, ranks: int, recipe, step: int) -> dict:
    from megaresnorm.resilience.signals import StopSignals

    be_rank(rank, ranks)
    with Run(recipe) as run, StopSignals() as stop:
        real = run.step_is_done

        def done():
            real()
            if run.steps_done == step - 1:
                stop.received = signal.SIGTERM

        run.step_is_done = done
        return {"code": Trainer(run).train(stop).exit_code}


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_budget_ends_the_run(drilled, policy):
    faults = [{"kind": "nan", "step": step, "place": "gradient", "times": 9} for step in (3, 5, 7)]
    limit = {"skip": "max_skips", "rollback": "max_rollbacks"}[policy]
    recipe, _ = drilled(
        "one",
        *faults,
        guard={"nonfinite": policy, limit: 2},
        checkpoint={"every": 1},
        train={"steps": 9},
    )
    (found,) = outcomes(recipe, 1)
    assert {"skip": "2 steps were left out up to step 5", "rollback": "gone back guard.max_rollbacks=2 times"}[
        policy
    ] in found["error"]
    assert len(events(recipe, "rollback")) == (2 if policy == "rollback" else 0)


def test_a_drill_needs_recipe_and_variable_and_a_folder_of_its_own(drilled, monkeypatch):
    fault = {"kind": "nan", "step": 2, "place": "gradient"}
    recipe, _ = drilled("one", fault)
    monkeypatch.delenv("MEGARESNORM_DRILL")
    with pytest.raises(ConfigError, match="MEGARESNORM_DRILL=1 is not set"):
        Run(recipe)
    train(drilled("one")[0].model_copy(update={"drill": None}))
    monkeypatch.setenv("MEGARESNORM_DRILL", "1")
    with pytest.raises(ConfigError, match="holds a run that is no drill"):
        Run(recipe)
    with pytest.raises(ConfigError, match="is set without a drill"):
        Run(drilled("one")[0])


def test_a_drill_that_was_killed_before_its_first_step_starts_again_and_as_a_drill_alone(drilled, monkeypatch):
    """Its recipe is in the folder by then, and so is the mark of a drill."""
    recipe, _ = drilled("one", {"kind": "nan", "step": 2, "place": "gradient"})
    for _ in range(2):
        with Run(recipe) as run:
            assert (run.output / "recipe.yaml").exists()
    monkeypatch.delenv("MEGARESNORM_DRILL")
    with pytest.raises(ConfigError, match="holds a drill; give a run that is none a folder of its own"):
        Run(recipe.model_copy(update={"drill": None}))


def test_bounds_stand_still_where_half_of_the_window_are_spikes():
    """A mean and a deviation would be moved by them."""
    quiet = Spikes([2.0 + 0.01 * (i % 5) for i in range(128)], [1.0] * 128).bounds()
    stormy = Spikes([9.0 if i % 5 == 0 else 2.0 + 0.01 * (i % 5) for i in range(128)], [1.0] * 128).bounds()
    assert stormy.loss < 1.2 * quiet.loss < 9.0
    assert Spikes([1.0] * (NEEDED - 1), [1.0] * (NEEDED - 1)).bounds() is None


COMPARED = {"guard": {"digest_every": 3}, "train": {"steps": 9}, "checkpoint": {"every": 4}}


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("dp2", "weight"),
        pytest.param("tp2 dp2", "moment", marks=pytest.mark.slow),
        pytest.param("dp2", "reduced_gradient", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_sends_the_run_back_and_the_curve_is_the_undisturbed_one(drilled, layout, place):
    fault = {"kind": "flip", "step": 5, "rank": 1, "place": place, "block": 1}
    recipe, ranks = drilled(layout, fault, **COMPARED)
    assert curve_of(recipe, ranks) == curve_of(*drilled(layout, name="undisturbed", **COMPARED))
    (event,) = events(recipe, "corruption")
    assert event["step"] == 6 and event["action"] == "rollback" and 1 in event["members"]
    assert events(recipe, "rollback")[0]["to_step"] == 4


def test_what_differs_is_never_saved(drilled):
    """Without a checkpoint and without a majority the run ends; the folder has none."""
    fault = {"kind": "flip", "step": 2, "rank": 1, "place": "weight"}
    recipe, ranks = drilled("dp2", fault, guard={"digest_every": 100}, train={"steps": 4})
    found = outcomes(recipe, ranks)
    assert all("rank 0 on" in one["error"] and "rank 1 on" in one["error"] for one in found)
    assert not any((Path(recipe.train.output) / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": {"compute": "bf16"}},
        {"precision": {"compute": "bf16", "weights": "bf16"}},
        {"precision": {"compute": "fp16"}},
        {
            "precision": {"compute": "fp8", "fp8": {"recipe": "tensorwise", "scaling": "delayed"}},
            "model": {"dim": 32, "ffn_dim": 64},
        },
        {"optim": {"clip": "adagc", "adagc_warmup": 2}},
        {"recompute": {"policy": "block"}},
        {"train": {"compile": "blocks", "steps": 4}},
        {"telemetry": {"every": 1}},
    ],
    ids=["bf16", "bf16 weights", "fp16", "fp8", "adagc", "recompute", "compiled", "watched"],
)
def test_a_transient_nan_leaves_no_trace_in_any_precision(drilled, settings):
    """Nor in scales, histories of FP8, averages of clipping, and figures of steps that are watched."""
    place = "gradient" if "train" in settings else "activation"
    fault = {"kind": "nan", "step": 3, "place": place, "block": 1}
    (recipe, _), (plain, _) = drilled("one", fault, **settings), drilled("one", name="undisturbed", **settings)
    assert curve_of(recipe, 1) == curve_of(plain, 1)
    assert [one["transient"] for one in events(recipe, "nonfinite")] == [True]
    assert depth_of(recipe) == depth_of(plain)


def depth_of(recipe) -> list[dict]:
    file = Path(recipe.train.output) / "depth.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.parametrize(
    "layout", ["dp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "tp2 dp2"))]
)
def test_a_gradient_flipped_before_its_reduction_names_its_rank_where_steps_are_replayed(drilled, layout):
    """Digests cannot see it: the sum is wrong on all ranks alike."""
    rank = LAYOUTS[layout][0] - 1
    fault = {"kind": "flip", "step": 4, "rank": rank, "place": "gradient"}
    recipe, ranks = drilled(layout, fault, guard={"replay_every": 2, "digest_every": 1})
    assert curve_of(recipe, ranks) == curve_of(*drilled(layout, name="undisturbed"))
    (event,) = events(recipe, "corruption")
    assert (event["rank"], event["step"], event["action"]) == (rank, 4, "made again")


def test_every_refused_step_is_made_again_also_after_another_one(drilled):
    """A transient fault right behind one that stays; and a weight is named whatever was refused before."""
    stays = {"kind": "nan", "step": 3, "place": "gradient", "times": 2}
    recipe, _ = drilled("one", stays, {"kind": "nan", "step": 4, "place": "gradient"})
    train(recipe)
    assert [one["transient"] for one in events(recipe, "nonfinite")] == [False, True]
    recipe, _ = drilled("one", stays, {"kind": "nan", "step": 4, "place": "weight", "block": 1}, name="weight")
    (found,) = outcomes(recipe, 1)
    assert "step 4 refused" in found["error"] and "weight blocks.1" in found["error"]


def test_a_spike_in_the_last_step_costs_that_step_alone(drilled):
    """It spoils nothing: the run is saved and ends as it should."""
    recipe, _ = drilled("one", {"kind": "spike", "step": SPIKE + 8}, guard={"spike": "skip"}, **LONG)
    summary = train(recipe)
    assert summary.exit_code == 0 and summary.checkpoint.name == f"step-{SPIKE + 8:08d}"
    assert [one["step"] for one in events(recipe, "spike")] == [SPIKE + 8]


@pytest.mark.slow
def test_what_was_decided_when_the_run_went_back_outlives_the_process(drilled, monkeypatch):
    """Killed before the next checkpoint, which would keep it; a run that begins anew knows nothing of it."""
    faults = [{"kind": "nan", "step": 5, "place": "activation", "times": 2}]
    settings = {"guard": {"nonfinite": "rollback"}, "checkpoint": {"every": 4}, "train": {"steps": 8}}
    whole, _ = drilled("one", *faults, name="whole", **settings)
    want = curve_of(whole, 1)
    recipe, _ = drilled("one", *faults, name="killed", **settings)

    def killed(trainer):
        if trainer.run.guard.rollbacks and trainer.run.steps_done == 6:
            raise KeyboardInterrupt
        return real(trainer)

    real = Trainer.step
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", killed)
        train(recipe)
    with Run(recipe) as run:
        assert (run.steps_done, run.guard.rollbacks, run.guard.state().passed) == (4, 1, [[32, 8]])
    assert curve_of(recipe, 1) == want
    file = Path(recipe.train.output) / "guard.json"
    assert file.exists()
    shutil.rmtree(Path(recipe.train.output) / "checkpoints")
    with Run(recipe) as run:
        assert not run.guard.passed and not file.exists()
