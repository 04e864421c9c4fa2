"""A checkpoint of any layout is exported without starting ranks: equal files, byte for byte; and back into any."""

from pathlib import Path

import pytest
from cases import batches, build, make_recipe

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import RunState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.convert.export import ExportSettings
from megaresnorm.convert.from_hf import from_hf
from megaresnorm.convert.to_hf import to_hf
from megaresnorm.testing import run_ranks

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2 columns": (2, {"tp": 2, "tensor_layout": "columns"}),
    "pp2": (2, {"pp": 2}),
    "fsdp2": (2, {"dp_shard": 2}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "tp2 fsdp2": (4, {"tp": 2, "dp_shard": 2, "tensor_layout": "columns"}),
    "pp2 interleaved fsdp2": (4, {"pp": 2, "pipeline": "interleaved", "dp_shard": 2}),
}


def recipe_of(topology: str, variant: str, layout: str):
    return make_recipe(topology, variant, LAYOUTS[layout][1], "fp64", 4)


def save(rank: int, topology: str, variant: str, layout: str, folder: Path) -> None:
    recipe = recipe_of(topology, variant, layout)
    assembled, engine = build(recipe)
    described = recipe.model_dump(exclude_none=True, exclude={"parallel"})
    state = RunState(samples=0, skipped_in_a_row=0, train_loss=None, engine=engine.state(), recipe=described, data="")
    save_checkpoint(folder / layout, 2, engine.tensors, state.model_dump(), control=assembled.context.control)


def losses_after(rank: int, topology: str, variant: str, layout: str, checkpoint: Path) -> float:
    """Of one batch with the weights of a checkpoint."""
    assembled, engine = build(recipe_of(topology, variant, layout))
    engine.load_weights(Checkpoint(checkpoint, assembled.context.control))
    return engine.evaluate(batches(engine, recipe_of(topology, variant, layout)))


@pytest.mark.parametrize(
    ("topology", "variant"), [("deepnorm", "llama"), pytest.param("keel", "gpt", marks=pytest.mark.slow)]
)
def test_every_layout_is_exported_to_the_same_bytes_and_read_back_into_every_layout(topology, variant, tmp_path):
    for layout, (num_ranks, _) in LAYOUTS.items():
        run_ranks(num_ranks, save, topology, variant, layout, tmp_path)
        to_hf(
            tmp_path / layout / "step-00000002",
            tmp_path / f"{layout} hf",
            settings=ExportSettings(max_memory=8 * 500, max_shard_bytes=20_000),
        )
    exported = {p.name: p.read_bytes() for p in (tmp_path / "one hf").iterdir()}
    assert sum(name.endswith(".safetensors") for name in exported) > 2
    for layout in LAYOUTS:
        assert {p.name: p.read_bytes() for p in (tmp_path / f"{layout} hf").iterdir()} == exported, layout
    back = from_hf(tmp_path / "tp2 pp2 hf", tmp_path / "back").checkpoint
    found = {
        layout: run_ranks(num_ranks, losses_after, topology, variant, layout, back)[0]
        for layout, (num_ranks, _) in LAYOUTS.items()
    }
    assert max(found.values()) - min(found.values()) < 1e-11, found
