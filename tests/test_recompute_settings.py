"""Settings of recomputation: read, written and overridden as they are meant, and changed when a run is resumed."""

import json
from pathlib import Path

import pytest

from megaresnorm.recipe.load import build_recipe, dump_recipe, load_recipe, read_yaml
from megaresnorm.run import Run
from megaresnorm.trainer import Trainer, train

ROOT = Path(__file__).parents[1]
GOOD = """
model: {dim: 64, num_blocks: 4, num_heads: 4, seq_len: 32}
data: {path: data}
train: {output: out, steps: 10, global_batch: 8}
"""
FORMS = [
    "none",
    "block",
    "{policy: every, every: 2}",
    "{policy: auto}",
    "{policy: auto, budget: 0.6}",
    "{policy: auto, budget: 1.0}",
    "{policy: auto, budget: 20GiB}",
    "{policy: auto, budget: '21474836480'}",
    "{policy: auto, budget: 21474836480}",
    "{policy: block, offload: true}",
    "{policy: branch, every: null, budget: null, blocks: []}",
    "{blocks: [{first: 3, last: 3, policy: block}, {first: 0, last: 1, policy: ffn}]}",
    "{policy: every, every: 3, offload: true, blocks: [{first: 0, last: 0, policy: none}]}",
]


def read(tmp_path, section: str | None, *overrides: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD if section is None else f"{GOOD}recompute: {section}\n")
    return load_recipe(path, overrides).recompute.model_dump(exclude_defaults=True)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_as_it_was_written(form, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{GOOD}recompute: {form}\n")
    recipe = load_recipe(path)
    assert read(tmp_path, None, f"recompute={form}") == recipe.recompute.model_dump(exclude_defaults=True)
    for full in (False, True):
        back = build_recipe(read_yaml(dump_recipe(recipe, full=full)))
        assert back == recipe and type(back.recompute.budget) is type(recipe.recompute.budget)
    kept = json.loads(json.dumps(recipe.model_dump()))  # as the manifest of a checkpoint has it
    assert build_recipe(kept) == recipe


def test_the_short_form_sets_the_policy_alone_in_any_order(tmp_path):
    both = {"policy": "block", "offload": True}
    for section in (None, "", "{}", "none", "{offload: false}"):
        assert read(tmp_path, section, "recompute=block", "recompute.offload=true") == both
        assert read(tmp_path, section, "recompute.offload=true", "recompute=block") == both
    every = {"policy": "every", "every": 2}
    assert read(tmp_path, None, "recompute.every=2", "recompute=every") == every
    assert read(tmp_path, "block", "recompute.every=2", "recompute.policy=every") == every
    assert read(tmp_path, "{policy: block, offload: true}", "recompute=every", "recompute.every=2") == every | {
        "offload": True
    }


def test_a_section_replaces_the_section_of_the_file(tmp_path):
    given = "{policy: every, every: 2, offload: true}"
    assert read(tmp_path, given, "recompute={policy: norm}") == {"policy": "norm"}
    assert read(tmp_path, given, "recompute={}") == {}
    assert read(tmp_path, given, "recompute=block", "recompute.every=null") == {"policy": "block", "offload": True}


def test_editors_accept_what_a_recipe_accepts():
    schema = json.loads((ROOT / "configs" / "recipe.schema.json").read_text())
    section, short = schema["properties"]["recompute"]["anyOf"]
    fields = schema["$defs"][section["$ref"].rpartition("/")[2]]["properties"]
    assert [*short["enum"][:6], "every", short["enum"][6]] == fields["policy"]["enum"]
    for policy in short["enum"]:
        assert build_recipe(read_yaml(f"{GOOD}recompute: {policy}\n")).recompute.policy == policy


def losses(recipe) -> list[str]:
    lines = (Path(recipe.train.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"].hex() for line in lines]


def test_a_run_goes_on_under_another_policy_with_the_same_bits(tiny, tmp_path, caplog):
    """With dropout, accumulation and evaluations; from none to block, every 2 and norm."""
    settings = {"model": {"dropout": 0.1, "topology": "keel"}, "precision": {"compute": "bf16"}}

    def recipe(name: str, recompute: dict | str):
        output = {"output": str(tmp_path / name), "micro_batch": 2, "eval_every": 3}
        return build_recipe(tiny(**settings, train=output).model_dump() | {"recompute": recompute})

    whole = train(recipe("whole", "none"))
    policies = ["none", "block", {"policy": "every", "every": 2}, "norm"]
    found = []
    for policy in policies:
        with Run(recipe("changing", policy)) as run:
            found.append(Trainer(run).step()["loss"].hex())
            run.save_now()
    summary = train(recipe("changing", {"policy": "block", "blocks": [{"first": 0, "last": 0, "policy": "ffn"}]}))
    assert summary.weights_digest == whole.weights_digest
    assert 'recompute.policy was "none" up to step 1 and is "block" from now on' in caplog.text
    assert found + losses(recipe("changing", "none"))[-2:] == losses(recipe("whole", "none"))
