"""Checkpoints of one layout read in another: the same bits in every tensor, the same loss of the next step."""

from pathlib import Path

import pytest
import torch
from cases import batches, build, make_recipe
from safetensors import safe_open

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.state import EngineState
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.testing import run_ranks

LAYOUTS: dict[str, tuple[int, dict]] = {
    "one": (1, {}),
    "tp2 columns": (2, {"tp": 2, "tensor_layout": "columns"}),
    "tp2 tokens": (2, {"tp": 2, "tensor_layout": "tokens"}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "fsdp2": (2, {"dp_shard": 2}),
    "hsdp": (4, {"dp_shard": 2, "dp_replicate": 2}),
    "tp2 fsdp2": (4, {"tp": 2, "dp_shard": 2, "tensor_layout": "columns"}),
    "tp2 dp2": (4, {"tp": 2, "dp_replicate": 2}),
    "pp2 interleaved fsdp2": (4, {"pp": 2, "pipeline": "interleaved", "dp_shard": 2}),
}

STATE = EngineState(updates=2, clipper_steps=2)


def recipe_of(layout: str):
    optim = {"clip": "adagc", "adagc_warmup": 1}
    return make_recipe("rezero", "gpt", LAYOUTS[layout][1], "fp64", 4, optim=optim)


def step(engine, assembled, recipe, seed: int) -> float:
    return engine.step(batches(engine, recipe, seed), 1e-2).loss


def train_and_save(rank: int, layout: str, folder: Path) -> None:
    recipe = recipe_of(layout)
    assembled, engine = build(recipe)
    for seed in (1, 2):
        step(engine, assembled, recipe, seed)
    control = assembled.context.control
    save_checkpoint(folder / layout, 2, engine.tensors, {}, control=control)


def load_each_and_save_again(rank: int, layout: str, folder: Path) -> dict[str, float]:
    recipe = recipe_of(layout)
    assembled, engine = build(recipe)
    control, losses = assembled.context.control, {}
    for source in LAYOUTS:
        engine.load(Checkpoint(folder / source / "step-00000002", control), STATE)
        root = folder / f"{source} in {layout}"
        save_checkpoint(root, 2, engine.tensors, {}, control=control)
        losses[source] = step(engine, assembled, recipe, seed=3)
    return losses


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    for layout, (ranks, _) in LAYOUTS.items():
        on_ranks(ranks, train_and_save, layout, folder)
    return folder


def on_ranks(num_ranks: int, function, *arguments):
    return run_ranks(num_ranks, function, *arguments) if num_ranks > 1 else [function(0, *arguments)]


READERS = ("one", "tp2 columns", "pp2 interleaved fsdp2")  # in CI; with the slow tests all ten read all ten


@pytest.mark.parametrize(
    "layout", [name if name in READERS else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_ten_layouts_are_read_exactly(saved, layout):
    results = on_ranks(LAYOUTS[layout][0], load_each_and_save_again, layout, saved)
    for source in LAYOUTS:
        before = Checkpoint(saved / source / "step-00000002")
        after = Checkpoint(saved / f"{source} in {layout}" / "step-00000002")
        assert before.tensors == after.tensors and set(before.tensors) == {"weights", "optimizer", "clipper"}
        for group in before.tensors:
            for name in before.names(group):
                assert torch.equal(before.read(group, name), after.read(group, name)), (source, name)
        one = on_ranks(1, next_loss, source, saved)[0]
        assert all(abs(losses[source] - one) < 1e-11 for losses in results), source


def next_loss(rank: int, source: str, folder: Path) -> float:
    recipe = recipe_of("one")
    assembled, engine = build(recipe)
    engine.load(Checkpoint(folder / source / "step-00000002"), STATE)
    return step(engine, assembled, recipe, seed=3)


def test_no_element_is_written_twice_and_ranks_share_the_work(saved):
    for layout, (ranks, _) in LAYOUTS.items():
        folder = saved / layout / "step-00000002"
        sizes = dict.fromkeys(range(ranks), 0)
        elements = 0
        for file in folder.glob("*.safetensors"):
            sizes[int(file.name.split("-")[1])] += file.stat().st_size
            with safe_open(file, framework="pt") as content:
                for name in content.keys():  # noqa: SIM118 - not a mapping
                    elements += content.get_tensor(name).numel()
        shapes = Checkpoint(folder).tensors.values()
        assert elements == sum(torch.Size(t["shape"]).numel() for group in shapes for t in group.values()), layout
        if "pp2" not in layout:
            assert max(sizes.values()) < 1.25 * min(sizes.values()), (layout, sizes)


def test_a_damaged_file_is_refused_by_all_ranks_alike(saved, tmp_path):
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(saved / "tp2 dp2", folder)
    victim = folder / "step-00000002" / "optimizer-00003-00001.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    says = run_ranks(2, refusal, folder / "step-00000002")
    assert says[0] == says[1] and "optimizer-00003-00001.safetensors: damaged (SHA-256 differs)" in says[0]


def refusal(rank: int, folder: Path) -> str:
    from megaresnorm.errors import CheckpointError

    assembled, _ = build(recipe_of("dp2"))
    try:
        Checkpoint(folder, assembled.context.control)
    except CheckpointError as e:
        return str(e)
    return "nothing"
