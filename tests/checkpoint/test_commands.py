"""megaresnorm checkpoint ls | show | verify | diff | prune."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megaresnorm.checkpoint.format import TensorSlices, list_checkpoints
from megaresnorm.checkpoint.inspect import compare_tensors, non_finite
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.retention import Retention
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.cli import main
from megaresnorm.resilience.lock import FolderLock
from megaresnorm.trainer import train


@pytest.fixture
def run(tiny, monkeypatch) -> Path:
    monkeypatch.setattr("megaresnorm.telemetry.log.console.width", 160)
    recipe = tiny(checkpoint={"every": 1, "keep": 6})
    train(recipe)
    return Path(recipe.train.output)


def output(capsys, *arguments, code=0) -> str:
    assert main(["checkpoint", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == (code > 1) and "Traceback" not in err
    return out + err


def damage(run: Path, step: int) -> Path:
    victim = run / "checkpoints" / f"step-{step:08d}" / "weights-00000-00001.safetensors"
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    return victim


def test_ls_shows_what_there_is_and_what_is_wrong(run, capsys):
    (run / "checkpoints" / ".tmp-step-00000009").mkdir()
    (run / "checkpoints" / "damaged-step-00000008").mkdir()
    (run / "checkpoints" / "step-00000003" / "optimizer-00000-00001.safetensors").unlink()
    (run / "checkpoints" / "step-00000002" / "manifest.json").write_text("{}")
    out = output(capsys, "ls", run)
    assert out.count("step-0000000") == 8 and "unfinished; removed by the next save" in out and "set aside" in out
    assert "optimizer-00000-00001.safetensors is missing or has another size" in out
    assert "manifest.json: not the manifest of a checkpoint" in out
    assert "wanted the output folder of a run" in output(capsys, "ls", run / "nowhere", code=4)


def test_show_says_what_is_in_one(run, capsys):
    out = output(capsys, "show", run)
    for part in ("step-00000006", "6 of 6", "deepnorm, 3 blocks, width 16", "torch", "42 tensors"):
        assert part in out, part
    assert "blocks.2.ffn.branch.down.weight" in output(capsys, "show", run, "--tensors")
    assert "num_blocks: 3" in output(capsys, "show", run / "checkpoints" / "step-00000002", "--recipe")


def test_verify_names_every_damaged_file_and_exits_with_4(run, capsys):
    assert output(capsys, "verify", run).count("every byte is right") == 6
    damage(run, 2)
    damage(run, 4)
    out = output(capsys, "verify", run, code=4)
    assert out.count("every byte is right") == 4 and out.count("SHA-256 differs") == 2
    assert "2 of 6 checkpoints are damaged" in out
    assert "every byte is right" in output(capsys, "verify", run / "checkpoints" / "step-00000003")


def test_verify_names_what_is_not_part_of_a_checkpoint(run, capsys, monkeypatch):
    monkeypatch.setattr("megaresnorm.telemetry.log.console.width", 400)
    step = run / "checkpoints" / "step-00000002"
    (step / "evil.pt").write_bytes(b"\x80\x04")
    (step / "weights-00007-00001.safetensors").write_bytes(b"")
    out = output(capsys, "verify", step)
    assert "every byte is right" in out
    assert "not part of it, and not read by anything: evil.pt, weights-00007-00001.safetensors" in out
    for number in range(9):
        (step / f"a{number}").mkdir()
    assert "a0, a1, a2, a3, a4 and 6 others" in output(capsys, "verify", step)


@pytest.fixture
def careless(monkeypatch):
    """Saving as it was before it looked at what it writes."""
    monkeypatch.setattr("megaresnorm.checkpoint.writer.is_finite", lambda tensor: True)


def poison(run: Path, step: int, group: str, names: list[str], bad: float) -> None:
    """Make a saved checkpoint one that a destroyed model would have left: every digest is right."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    checkpoint = Checkpoint(folder)
    groups = {g: {n: checkpoint.read(g, n).clone() for n in checkpoint.names(g)} for g in checkpoint.tensors}
    for name in names:
        groups[group][name].view(-1)[-1] = bad
    state = checkpoint.state
    shutil.rmtree(folder)
    slices = {g: {n: TensorSlices.of_whole(t) for n, t in members.items()} for g, members in groups.items()}
    save_checkpoint(folder.parent, step, slices, state, retention=Retention(9))


def test_verify_names_tensors_that_are_not_finite_and_prune_does_not_count_them(run, capsys, monkeypatch, careless):
    monkeypatch.setattr("megaresnorm.telemetry.log.console.width", 400)
    weight, other = "blocks.1.ffn.branch.down.weight", "blocks.2.ffn.branch.down.weight"
    poison(run, 6, "weights", [other, weight], float("nan"))
    moment = Checkpoint(run / "checkpoints" / "step-00000005").names("optimizer")[3]
    poison(run, 5, "optimizer", [moment], float("-inf"))
    out = output(capsys, "verify", run, code=4)
    assert f"weights: {weight} holds NaN or infinity, and so does 1 other" in out
    assert f"optimizer: {moment} holds NaN or infinity" in out
    assert out.count("every byte is right") == 4 and "2 of 6 checkpoints are damaged" in out
    out = output(capsys, "prune", run, "--keep", 2)
    assert out.count("kept, does not count: ") == 2
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [3, 4, 5, 6]


def test_non_finite_finds_one_element_in_chunks_of_bounded_size(tmp_path, monkeypatch, careless):
    """Whatever slices files hold, each chunk is small; whole numbers have nothing to find."""
    monkeypatch.setattr("megaresnorm.checkpoint.reader.CHUNK_ELEMENTS", 10)
    tensors = {name: torch.zeros(3, 4, 7) for name in ("a", "b", "c", "d")} | {"wide": torch.zeros(1, 95)}
    tensors |= {"bf16": torch.zeros(5, dtype=torch.bfloat16), "int8": torch.ones(5, dtype=torch.int8)}
    tensors["b"][2, 3, 6], tensors["c"][0, 0, 0], tensors["wide"][0, 94] = float("nan"), float("inf"), -float("inf")
    tensors["bf16"][4] = float("nan")
    groups = {"weights": {name: TensorSlices.of_whole(t) for name, t in tensors.items()}}
    folder = save_checkpoint(tmp_path, 1, groups, {})
    checkpoint, seen = Checkpoint(folder), []
    assert non_finite(checkpoint, progress=seen.append) == ["b", "bf16", "c", "wide"]
    assert max(seen) == 40 and sum(seen) == sum(t.nbytes for t in tensors.values())
    for name, tensor in tensors.items():
        assert torch.equal(torch.cat([c.flatten() for c in checkpoint.chunks("weights", name)]), tensor.flatten()) or (
            name in ("b", "bf16")  # NaN is not equal to itself
        )


def test_diff_finds_what_differs(run, capsys, tiny, tmp_path):
    first, last = (run / "checkpoints" / f"step-{step:08d}" for step in (1, 6))
    assert "all 63 tensors are equal, bit for bit" in output(capsys, "diff", last, run)
    out = output(capsys, "diff", first, last, "--rows", 5, code=1)
    assert "63 of 63 tensors differ" in out and "engine.updates" in out and out.count("e-0") >= 5
    same = run.parent / "same"
    shutil.copytree(run, same)
    manifest = same / "checkpoints" / "step-00000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["state"]["samples"] += 1
    manifest.write_bytes(encode_manifest(content))
    out = output(capsys, "diff", last, same, code=1)  # also where the state alone differs
    assert "all 63 tensors are equal" in out and "samples" in out
    other = tiny(model={"num_blocks": 2}, train={"output": str(tmp_path / "other")})
    train(other)
    assert "only in" in output(capsys, "diff", last, other.train.output, "--rows", 99, code=1)


def test_prune_keeps_the_newest_that_are_whole_and_the_permanent_ones(run, capsys):
    damage(run, 6)
    out = output(capsys, "prune", run, "--keep", 2, "--keep-every", 3, "--dry-run")
    assert "kept, does not count: " in out and len(list_checkpoints(run / "checkpoints")) == 6
    output(capsys, "prune", run, "--keep", 2, "--keep-every", 3)
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [3, 4, 5, 6]


def test_prune_keeps_those_up_to_the_first_refused_step(run, capsys):
    manifest = run / "checkpoints" / "step-00000006" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["state"]["first_refused"] = 2
    manifest.write_bytes(encode_manifest(content))
    output(capsys, "prune", run, "--keep", 2)
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [1, 2, 5, 6]
    output(capsys, "prune", run, "--keep", 2, "--also-before-refused")
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [5, 6]


def test_prune_refuses_to_leave_one_alone_or_to_disturb_a_run(run, capsys):
    assert "at least 2 must stay" in output(capsys, "prune", run, "--keep", 1, code=2)
    held = FolderLock(run, "x")
    for folder in (run, run / "checkpoints"):
        assert "is in use by pid" in output(capsys, "prune", folder, code=5)
    held.release()
    assert "wanted the output folder of a run" in output(capsys, "prune", run / "checkpoints" / "step-00000006", code=4)


def test_equal_means_every_bit(tmp_path, careless):
    """Zeros of two signs differ, and one NaN is as good as the other."""
    found = []
    for step, values in enumerate(([0.0, float("nan")], [-0.0, float("nan")], [0.0, float("nan")])):
        save_checkpoint(
            tmp_path, step, {"weights": {"a": TensorSlices.of_whole(torch.tensor(values))}}, {}, retention=Retention(3)
        )
        found.append(Checkpoint(tmp_path / f"step-0000000{step}"))
    assert len(list(compare_tensors(found[0], found[1], lambda: None))) == 1
    assert not list(compare_tensors(found[0], found[2], lambda: None))
