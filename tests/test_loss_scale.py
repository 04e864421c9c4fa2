"""The loss scale of FP16: how it moves, what a run says of it, and that a resumed run has it again."""

import json
import logging
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from megaresnorm.checkpoint.state import EngineState
from megaresnorm.engines.step_vector import stats_of
from megaresnorm.precision import loss_scale
from megaresnorm.precision.loss_scale import INTERVAL, LARGEST, SMALLEST, START, LossScale, LossScaleState
from megaresnorm.recipe import PrecisionRecipe
from megaresnorm.run import Run
from megaresnorm.telemetry.describe import describe_run
from megaresnorm.trainer import Trainer, train

INF, NAN = float("inf"), float("nan")


def begun(value: float, **options) -> LossScale:
    scale = LossScale(**options)
    scale.state = LossScaleState(value=value)
    return scale


def test_it_grows_after_good_steps_in_a_row_alone():
    scale = LossScale(interval=3)
    for overflowed, value in [(0, 1), (0, 1), (1, 0.5), (0, 0.5), (0, 0.5), (0, 1), (0, 1), (0, 1), (0, 2)]:
        assert scale.update(bool(overflowed)) == bool(overflowed) and scale.value == value * START
    assert scale.state.skipped == 1 and INTERVAL == 2_000


def test_it_is_halved_at_each_overflow_down_to_one_and_says_when_it_cannot():
    scale = begun(4.0)
    assert [scale.update(True) for _ in range(4)] == [True, True, False, False]
    assert scale.value == SMALLEST == 1.0 and scale.state.skipped == 4


def test_it_grows_up_to_its_largest():
    scale = begun(LARGEST / 2, interval=1)
    assert [(scale.update(False), scale.value)[1] for _ in range(3)] == [LARGEST] * 3


def test_a_static_one_stays_and_an_overflow_is_the_runs():
    scale = LossScale(1024.0, interval=1)
    assert [scale.update(bad) for bad in (False, True, False)] == [False] * 3
    assert scale.value == 1024.0 and scale.state.skipped == 1
    scale.load(LossScaleState(value=8.0))
    assert scale.value == 1024.0


def test_dividing_by_any_scale_undoes_multiplying_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=g) * torch.randn(10_000, generator=g).exp()
    x[:2] = torch.tensor([INF, NAN])
    for power in range(25):
        assert torch.equal((x * 2.0**power * (1.0 / 2.0**power)).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize(
    ("loss", "squares", "applied", "lowered_to", "skipped"),
    [
        (8.0, 4.0, True, None, 0),
        (8.0, INF, False, START / 2, 1),
        (8.0, NAN, False, START / 2, 1),
        (NAN, NAN, False, None, 0),  # the forward pass, in which the scale has no part
        (INF, 4.0, False, None, 0),
    ],
)
def test_a_step_is_judged_by_its_vector(loss, squares, applied, lowered_to, skipped):
    scale = LossScale()
    stats = stats_of(loss, squares, 4, scale, stop=False)
    assert (stats.applied, stats.lowered_to, stats.skipped, stats.loss_scale) == (applied, lowered_to, skipped, START)
    assert scale.value == (lowered_to or START)


def test_a_step_without_labels_says_nothing_of_the_scale():
    scale = LossScale(interval=1)
    stats = stats_of(0.0, 0.0, 0, scale, stop=False)
    assert stats.loss is None and scale.state == LossScaleState()


def test_only_fp16_has_one():
    assert LossScale.of(PrecisionRecipe(compute="bf16")) is None
    assert LossScale.of(PrecisionRecipe(compute="fp16")).is_dynamic
    assert LossScale.of(PrecisionRecipe(compute="fp16", loss_scale="dynamic")).value == START
    static = LossScale.of(PrecisionRecipe(compute="fp16", loss_scale=256))
    assert not static.is_dynamic and static.value == 256.0


def test_states_of_earlier_versions_have_none_and_no_wrong_one_is_read():
    old = EngineState.model_validate({"updates": 3, "clipper_steps": 0})
    assert old.loss_scale is None
    scale = begun(8.0)
    scale.load(old.loss_scale)
    assert scale.state == LossScaleState()
    whole = EngineState(updates=3, clipper_steps=0, loss_scale=begun(8.0).state)
    assert EngineState.model_validate(json.loads(json.dumps(whole.model_dump()))) == whole
    for wrong in ({"value": 3.0}, {"value": 0.0}, {"value": -2.0}, {"value": 2.0, "good_steps": -1}, {"other": 1}):
        with pytest.raises(ValidationError):
            LossScaleState.model_validate(wrong)


def test_a_scale_of_a_checkpoint_stays_within_bounds():
    scale = LossScale()
    for value, kept in ((2.0**100, LARGEST), (2.0**-20, SMALLEST), (32.0, 32.0)):
        scale.load(LossScaleState(value=value))
        assert scale.value == kept


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def high(monkeypatch):
    """A scale that is far too large at the start, and grows after three good steps."""

    def of(precision):
        return begun(2.0**24, interval=3) if precision.compute == "fp16" else None

    monkeypatch.setattr(loss_scale.LossScale, "of", of)


def records(recipe) -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()]


FP16 = {"compute": "fp16"}


def test_steps_that_overflow_are_said_and_recorded_but_not_held_against_the_run(tiny, high, caplog):
    caplog.set_level(logging.INFO)
    recipe = tiny(precision=FP16, train={"steps": 8, "max_skipped_steps": 1})
    train(recipe)
    found = records(recipe)
    skipped = [record["skipped"] for record in found]
    assert skipped[0] == 1 and skipped[-1] == skipped[-2] > 1  # overflows first, and none at the end
    for count, before, after in zip([0, *skipped], found, found[1:], strict=False):
        overflowed = before["gradient_norm"] is None
        assert before["skipped"] == count + overflowed
        assert (after["loss_scale"] == before["loss_scale"] / 2) == overflowed
    lines = [message for message in caplog.messages if "skipped: gradients overflow" in message]
    assert len(lines) == skipped[-1] and "at loss scale 2^24, next 2^23" in lines[0]
    assert any("| scale 2^" in message for message in caplog.messages)
    assert not any("refused" in message for message in caplog.messages)


def test_other_precisions_have_no_scale_in_their_metrics(tiny):
    recipe = tiny(precision={"compute": "bf16"})
    train(recipe)
    assert not any("loss_scale" in record or "skipped" in record for record in records(recipe))


def test_a_run_that_stops_in_the_middle_of_a_row_resumes_bit_for_bit(tiny, high, tmp_path):
    def recipe(name):
        return tiny(precision=FP16, train={"steps": 14, "output": str(tmp_path / name)}, optim={"clip": "adagc"})

    whole = train(recipe("whole"))
    seen = []
    for _ in range(13):
        with Run(recipe("parts")) as run:
            Trainer(run).step()
            seen.append(run.engine.state().loss_scale)
            run.save_now()
    parts = train(recipe("parts"))
    assert any(state.value < 2.0**24 and state.good_steps > 0 for state in seen)
    grown = [a.value > b.value for a, b in zip(seen[1:], seen, strict=False)]
    assert any(grown) and seen[-1].skipped > 1
    assert parts.weights_digest == whole.weights_digest and parts.train_loss == whole.train_loss


def test_the_setting_may_change_when_a_run_goes_on(tiny, caplog):
    train(tiny(precision=FP16, train={"steps": 4}))
    recipe = tiny(precision=FP16 | {"loss_scale": 64.0}, train={"steps": 6})
    train(recipe)
    assert [record["loss_scale"] for record in records(recipe)] == [START] * 4 + [64.0] * 2
    assert "precision.loss_scale was null up to step 4 and is 64.0 from now on" in caplog.text


def test_the_header_of_a_run_says_the_scale(tiny):
    for settings, wanted in (({}, "loss scale from 2^16, residual stream fp32"), ({"loss_scale": 8.0}, "scale 2^3, ")):
        with Run(tiny(precision=FP16 | settings)) as run:
            lines = describe_run(run.recipe, run.engine.assembled, run.samples)
        assert any(line.startswith("precision fp16, ") and wanted in line for line in lines)
