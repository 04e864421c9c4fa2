"""Several validation sets on several ranks: the losses of one process, recorded by the first rank."""

import json
from pathlib import Path

import pytest
from launched import be_rank

from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.errors import DataError
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "fsdp2": {"dp_shard": 2}}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    found = {}
    for name, text in (("web", "words of the web, and more of them. "), ("code", "for i in range(9):\n    print(i)\n")):
        (folder / f"{name}.txt").write_text(text * 40)
        found[name] = str(prepare(PrepareJob(out=folder / name, paths=(str(folder / f"{name}.txt"),))).folder)
    return found


def evaluation_of(rank: int, num_ranks: int, recipe) -> list:
    be_rank(rank, num_ranks)
    evaluation = train(recipe).evaluation
    return [list(evaluation.losses), list(evaluation.losses.values()), list(evaluation.bits_per_byte.values())]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_by_name_are_those_of_one_process(layout, tiny, sets, tmp_path):
    settings = {
        "data": {"valid": sets, "valid_fraction": 0.0}, "precision": {"compute": "fp64"},
        "train": {"steps": 2, "eval_every": 1, "eval_samples": 5},
    }  # fmt: skip
    recipe = tiny(**settings)
    alone = train(recipe).evaluation
    values = recipe.model_dump(exclude_none=True)
    values["parallel"] = LAYOUTS[layout]
    values["train"]["output"] = str(tmp_path / "ranks")
    first, other = run_ranks(2, evaluation_of, 2, build_recipe(values))
    assert first[0] == other[0] == list(alone.losses) == ["code", "web"]
    assert first[1] == other[1] == pytest.approx(list(alone.losses.values()), abs=1e-11)
    assert first[2] == pytest.approx(list(alone.bits_per_byte.values()), abs=1e-11) and other[2] == []
    rows = [json.loads(line) for line in Path(tmp_path / "ranks" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["valid_loss/web"] == first[1][1] and "valid_bits_per_byte" in rows[0]


def fails_on_the_first(rank: int, num_ranks: int, recipe) -> str:
    import megaresnorm.evaluation as module

    def broken(*given, **named):
        raise DataError("the tokenizer cannot decode")

    module.bytes_per_label = broken
    be_rank(rank, num_ranks)
    try:
        train(recipe)
    except DataError as e:
        return str(e)
    return "nothing"


def test_an_error_of_the_rank_that_counts_bytes_is_that_of_all(tiny):
    """The others are in the next collective by then, and would wait for it."""
    assert (
        run_ranks(2, fails_on_the_first, 2, tiny(train={"steps": 1, "eval_every": 1}))
        == ["the tokenizer cannot decode"] * 2
    )


def test_an_evaluation_asks_nothing_of_the_group_through_which_checkpoints_are_saved(tiny, monkeypatch):
    """A checkpoint may be being written by a thread, whose messages would be mixed up with those of the evaluation."""
    from megaresnorm.parallel.control import all_or_raise
    from megaresnorm.run import Run

    axes = []

    def asked(work, axis, *given):
        axes.append(axis.name)
        return all_or_raise(work, axis, *given)

    with Run(tiny()) as run:
        monkeypatch.setattr("megaresnorm.run.all_or_raise", asked)
        monkeypatch.setattr("megaresnorm.run.run_on_all_ranks", asked)
        assert run.evaluate().bits_per_byte and set(axes) == {"world"}
