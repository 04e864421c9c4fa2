"""Ranks that were not started alike end before step 0, all of them, in one line that names what differs and where."""

from pathlib import Path

import pytest
from launched import be_rank

import megaresnorm
from megaresnorm import opening
from megaresnorm.errors import UserError
from megaresnorm.opening import facts_of_start, open_recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.testing import run_ranks

LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
CHANGED = [  # key, value on rank 1
    ("optim.lr", 2e-3), ("optim.clip_norm", 0.5), ("optim.weight_decay", 0.2), ("optim.beta2", 0.99),
    ("optim.eps", 1e-6), ("schedule.kind", "linear"), ("schedule.warmup_steps", 1), ("train.seed", 7),
    ("train.steps", 7), ("train.global_batch", 8), ("train.z_loss", 1e-4), ("train.eval_every", 3),
    ("train.eval_samples", 5), ("train.max_skipped_steps", 3), ("data.seed", 5), ("data.valid_fraction", 0.2),
    ("model.dropout", 0.1), ("model.norm", "layernorm"), ("model.num_blocks", 4), ("model.topology", "keel"),
    ("precision.compute", "bf16"), ("checkpoint.every", 2), ("kernels.add_norm", "reference"), ("parallel.tp", None),
    ("parallel.pp", None),
]  # fmt: skip


def with_value(values: dict, key: str, value: object) -> dict:
    section, _, leaf = key.partition(".")
    if value is None:  # the other of 1 and 2 ranks
        value = 1 if values.get(section, {}).get(leaf) == 2 else 2
    return {**values, section: {**values.get(section, {}), leaf: value}}


def how_each_ends(rank: int, values: dict) -> list[str]:
    be_rank(rank, 2)
    said = []
    for key, value in CHANGED:
        mine = with_value(values, key, value) if rank else values
        try:
            open_recipe(lambda mine=mine: build_recipe(mine))
            said.append("went on")
        except UserError as e:
            assert e.agreed, key
            said.append(str(e))
    return said


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_setting_of_one_rank_ends_all_in_a_line_that_names_it(tiny, layout):
    values = tiny(parallel=LAYOUTS[layout]).model_dump(exclude_none=True)
    first, second = run_ranks(2, how_each_ends, values)
    assert first == second
    for (key, _), line in zip(CHANGED, first, strict=True):
        named = line.startswith(f"{key} is ") and "on rank 1 and " in line
        assert named and "\n" not in line, (key, line)


def ends_with(rank: int, values: dict, what: str) -> str:
    be_rank(rank, 2)
    if rank and what == "the package":
        real = opening.facts_of_package()
        opening.facts_of_package = lambda: {**real, "the file megaresnorm/optim.py": "0" * 12}
    if rank and what == "a version":
        opening.torch.__version__ = "2.11.0"
    if rank and what == "the recipe":
        values = {**values, "model": {**values["model"], "dim": 15}}
    if rank and what == "the data":
        open_data = opening.open_data
        opening.open_data = lambda recipe: open_data(recipe)._replace(digest="0" * 64)
    try:
        open_recipe(lambda: build_recipe(values))
    except UserError as e:
        return str(e)
    return "went on"


def test_versions_files_recipes_and_data_that_differ_are_named(tiny):
    values = tiny().model_dump(exclude_none=True)
    says = {
        "a version": "the version of torch is 2.11.0 on rank 1",
        "the package": "the file megaresnorm/optim.py is 000000000000 on rank 1",
        "the recipe": "rank 1: model.num_heads=2 must divide model.dim=15",
        "the data": f"the content of the data is {'0' * 64} on rank 1",
        "nothing": "went on",
    }
    for what, line in says.items():
        for said in run_ranks(2, ends_with, values, what):
            assert line in said, what


def test_the_facts_cover_every_setting_and_source_file(tiny):
    from megaresnorm.recipe.explain import recipe_keys

    facts = facts_of_start(tiny())
    files = list(Path(megaresnorm.__file__).parent.rglob("*.py"))
    assert len([name for name in facts if name.startswith("the file ")]) >= len(files)
    unset = {key for key in recipe_keys() if key not in facts}
    recipe = tiny().model_dump()

    def value(key: str) -> object:
        found = recipe
        for part in key.split("."):
            found = None if found is None else found.get(part)
        return found

    # Where the data are is a node's own affair: their content is compared.
    places = {"data.path", "data.blend", "data.valid", "data.tokenizer", "train.initial_weights"}
    assert all(value(key) is None for key in unset - places), unset
