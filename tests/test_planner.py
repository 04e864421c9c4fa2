"""A dry run says what a run takes, without data and without GPUs, and says so where something does not fit."""

import dataclasses
from pathlib import Path

import pytest

from megaresnorm.cli import main
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.errors import ConfigError
from megaresnorm.memory import memory_of_stages
from megaresnorm.model.parameters import parameter_table
from megaresnorm.planner.estimate import RESERVE, estimate
from megaresnorm.recipe.load import dump_recipe, load_recipe
from megaresnorm.resilience.host import HostMemory

ROOT = Path(__file__).parents[1]


def dry_run(capsys, *arguments, code=0):
    assert main(["train", *map(str, arguments), "--dry-run"]) == code
    out, err = capsys.readouterr()
    return out if code == 0 else err


def test_figures_are_those_of_the_parts(tiny):
    recipe = tiny(train={"steps": 10, "global_batch": 8, "micro_batch": 2}, model={"vocab_size": 257})
    found, table = estimate(recipe, ranks=2), parameter_table(recipe.model)
    assert found.parameters == sum(spec.num_elements for spec in table.values())
    assert found.tokens == 10 * 8 * 16 and found.sizes.num_ranks == 2 and found.sizes.dp_replicate == 2
    assert found.stages == memory_of_stages(recipe, 2) and not found.on_gpus
    # Two operations for each weight of a matrix and token, forward, and twice as many backward.
    matrices = sum(s.num_elements for name, s in table.items() if len(s.shape) == 2 and "embedding" not in name)
    assert 6 * matrices < found.flops < 6 * matrices * 1.5
    assert any("micro batch 2, 2 microbatches a step" in line for line in found.describe())


def test_epochs_are_told_and_too_many_warned_of(tiny, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny()))
    few, many = dry_run(capsys, path), dry_run(capsys, path, "train.steps=100000")
    assert "warning    more than 4 epochs" in many and "more than 4 epochs" not in few
    epochs = float(many.split(" tokens to train on, ")[1].split(" epochs")[0].replace(" K", "e3"))
    there = many.split("# data       ")[1].split(" tokens")[0]
    assert there.endswith(" K") and epochs == pytest.approx(100_000 * 64 / (float(there[:-2]) * 1000), rel=0.01)


def test_no_data_needs_a_vocabulary_and_nothing_else(tiny, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(tiny(data={"path": str(tmp_path / "nowhere")})))
    assert "no such data set" in dry_run(capsys, path, code=3)
    assert "model.vocab_size is missing" in dry_run(capsys, path, "--no-data", code=2)
    out = dry_run(capsys, path, "--no-data", "model.vocab_size=1000")
    assert "data       not read" in out and "vocab_size: 1000" in out


def test_what_does_not_fit_is_said(capsys, monkeypatch):
    path = ROOT / "configs" / "llama-7b.yaml"
    plan = ("--no-data", "--ranks", "64")
    assert "a rank's GPU has 80.0 GB: fits" in dry_run(capsys, path, *plan, "--memory", "80GB")
    assert "has 12.0 GB: may not fit" in dry_run(capsys, path, *plan, "--memory", "12GB")
    assert "has 1.0 GB: does NOT fit" in dry_run(capsys, path, *plan, "--memory", "1GB")
    monkeypatch.setattr("megaresnorm.planner.estimate.host_memory", lambda: HostMemory(10**9, 10**9))
    here = dry_run(capsys, path, *plan)
    assert (
        "this machine, for all ranks (--memory plans for GPUs), has 1.0 GB: does NOT fit" in here
        and "of host memory" in here
    )
    gpus = dry_run(capsys, path, *plan, "train.device=cuda")
    assert "of GPU memory" in gpus and "not known here; --memory 80GB" in gpus


@pytest.mark.parametrize(("name", "ranks", "billions"), [("deepnorm-200-1b", 32, 1.0), ("llama-7b", 64, 6.7)])
def test_large_recipes_take_what_their_page_says(name, ranks, billions):
    recipe = load_recipe(ROOT / "configs" / f"{name}.yaml")
    found = estimate(recipe, ranks=ranks, device_memory=80 * 10**9, with_data=False)
    assert billions < found.parameters / 1e9 < billions + 0.1 and found.fits(likely=True)
    certain, likely = (max(getattr(m.device, kind) for m in found.stages) for kind in ("certain", "likely"))
    row = next(r for r in (ROOT / "configs" / "README.md").read_text().splitlines() if r.startswith(f"| `{name}` |"))
    assert row.endswith(f"| {certain / 1e9:.1f} GB | {likely / 1e9:.1f} GB |") and f"| {ranks} |" in row


def test_a_pipelines_fullest_rank_decides(tiny):
    recipe = tiny(model={"num_blocks": 6, "vocab_size": 5000}, parallel={"pp": 2})
    found = estimate(recipe, ranks=2, device_memory=10**9, with_data=False)
    each = [memory.device.certain for memory in found.stages]
    assert len(each) == 2 and each[0] != each[1]
    assert dataclasses.replace(found, room=max(each)).fits()
    assert not dataclasses.replace(found, room=max(each) - 1).fits()


def test_a_reserve_of_a_gpu_stays_free(tiny):
    found = estimate(tiny(model={"vocab_size": 500}), device_memory=10**10, with_data=False)
    need = found.stages[0].device.likely
    assert dataclasses.replace(found, room=need + RESERVE).fits(likely=True)
    assert not dataclasses.replace(found, room=need + RESERVE - 1).fits(likely=True)


def test_a_gpu_of_this_machine_is_looked_at(tiny, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1, 10**11))
    recipe = tiny(model={"vocab_size": 500})
    assert estimate(recipe, with_data=False).room == 10**11 and estimate(recipe, with_data=False).on_gpus
    on_cpu = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": "cpu"})})
    assert not estimate(on_cpu, with_data=False).on_gpus


def test_the_epochs_of_a_blend_are_those_of_the_source_that_ends_first(tiny, byte_data, tmp_path):
    small = tmp_path / "small"
    (tmp_path / "small.txt").write_text("a small text of some words. " * 20)
    prepare(PrepareJob(out=small, paths=(str(tmp_path / "small.txt"),)))
    sources = [{"path": str(byte_data), "weight": 1.0}, {"path": str(small), "weight": 1.0}]
    recipe = tiny(data={"blend": sources, "path": None}, train={"steps": 100})
    (line, *rest) = [line for line in estimate(recipe).describe() if line.startswith(("data", "warning"))]
    epochs = {draw.path: draw.epochs for draw in estimate(recipe).draws}
    assert epochs[str(small)] > 4 > 0 < epochs[str(byte_data)] < epochs[str(small)] / 5
    assert line.endswith(f"{epochs[str(small)]:.3g} epochs (of {small})") and "more than 4 epochs" in rest[0]


def test_a_dry_run_prints_a_recipe(tiny, tmp_path, capsys):
    path, again = tmp_path / "recipe.yaml", tmp_path / "again.yaml"
    path.write_text(dump_recipe(tiny()))
    again.write_text(dry_run(capsys, path))
    assert load_recipe(again).model_dump() == tiny(model={"vocab_size": 257}).model_dump()


def test_ranks_that_would_have_nothing_to_do_are_warned_of(tiny):
    found = estimate(tiny(model={"vocab_size": 257}), ranks=8)
    assert any("samples for 4 of 8 data-parallel ranks" in line for line in found.describe())
    assert not [w for w in estimate(tiny(model={"vocab_size": 257}), ranks=4).warnings if "data-parallel" in w]


def test_backends_that_do_not_exist_are_refused(tiny):
    with pytest.raises(ConfigError, match=r"kernels\.attention='bogus': wanted one of auto, cpu"):
        estimate(tiny(kernels={"attention": "bogus"}))


def test_options_of_a_dry_run_are_refused_without_it(capsys):
    for option in (["--ranks", "2"], ["--memory", "80GB"], ["--no-data"]):
        assert main(["train", "x.yaml", *option]) == 2
        assert f"{option[0]} is for --dry-run" in capsys.readouterr().err


def test_a_layout_that_is_impossible_is_refused(tiny):
    with pytest.raises(ConfigError, match="start 2 ranks"):
        estimate(tiny(model={"vocab_size": 257}, parallel={"tp": 2}), ranks=3)
