"""Checkpoints: whole or not there, verified before use, unable to run code or to leave their folder."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megaresnorm.checkpoint.format import TensorSlices, file_sha256, list_checkpoints
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.errors import CheckpointError


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "weights": {"a.weight": torch.randn(6, 4, generator=g), "b": torch.randn(3, generator=g).bfloat16()},
        "optimizer": {"exp_avg.a.weight": torch.randn(6, 4, generator=g, dtype=torch.float64)},
    }


def whole(groups):
    return {group: {n: TensorSlices.of_whole(t) for n, t in members.items()} for group, members in groups.items()}


def save(root, step, seed=0, state=None):
    return save_checkpoint(root, step, whole(tensors(seed)), state or {})


@pytest.fixture
def saved(tmp_path):
    return save(tmp_path, 7, state={"samples": 70, "nested": {"x": [1, 2.5]}})


def load(path, group="weights"):
    destination = {n: torch.zeros_like(t) for n, t in tensors()[group].items()}
    Checkpoint(path).load(group, {n: TensorSlices.of_whole(t) for n, t in destination.items()})
    return destination


def rewrite_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_bytes(encode_manifest(manifest))


def test_what_was_saved_is_loaded_bit_for_bit(saved):
    for group, members in tensors().items():
        loaded = load(saved, group)
        assert all(torch.equal(loaded[n], t) for n, t in members.items())
    assert Checkpoint(saved).step == 7 and Checkpoint(saved).state == {"samples": 70, "nested": {"x": [1, 2.5]}}
    assert os.listdir(saved.parent) == ["step-00000007"]  # nothing temporary stays


def test_files_are_plain_safetensors_with_their_slices_in_the_header(saved):
    from safetensors import safe_open

    with safe_open(saved / "weights-00000-00001.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["slices"]) == {"a.weight": [[[0, 6], [0, 4]]], "b": [[[0, 3]]]}
        assert torch.equal(file.get_tensor("a.weight"), tensors()["weights"]["a.weight"])
    assert json.loads((saved / "manifest.json").read_text())["tensors"]["weights"]["b"] == {
        "shape": [3],
        "dtype": "bfloat16",
    }


def test_large_groups_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megaresnorm.checkpoint.writer.FILE_BYTES", 50)
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.glob("weights-*")) == [
        "weights-00000-00001.safetensors",
        "weights-00000-00002.safetensors",
    ]
    assert torch.equal(load(path)["b"], tensors()["weights"]["b"])


def test_slices_of_several_files_make_one_tensor(saved):
    """What several ranks will write: each file holds some rows. A gap is an error, not zeros."""
    whole = tensors()["weights"]["a.weight"]
    b = tensors()["weights"]["b"]

    def write(second):
        parts = {
            "weights-00000-00001.safetensors": (
                {"a.weight": whole[:4], "b": b},
                {"a.weight": [[[0, 4], [0, 4]]], "b": [[[0, 3]]]},
            )
        }
        if second:
            parts["weights-00000-00002.safetensors"] = ({"a.weight": whole[4:]}, {"a.weight": [[[4, 6], [0, 4]]]})
        files = {}
        for name, (content, slices) in parts.items():
            save_file({n: t.contiguous() for n, t in content.items()}, saved / name, {"slices": json.dumps(slices)})
            files[name] = {"size": (saved / name).stat().st_size, "sha256": file_sha256(saved / name)}
        rewrite_manifest(saved, lambda m: m.update(files=files, tensors={"weights": m["tensors"]["weights"]}))

    write(second=True)
    assert torch.equal(load(saved)["a.weight"], whole)
    write(second=False)
    with pytest.raises(CheckpointError, match=r"a\.weight is not complete"):
        load(saved)


def test_keeps_the_newest_and_writes_over_nothing(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, seed=step)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 3]
    with pytest.raises(CheckpointError, match="never written over"):
        save(tmp_path, 3, seed=9)
    assert torch.equal(load(tmp_path / "step-00000003")["b"], tensors(3)["weights"]["b"])


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(saved, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(CheckpointError, match=r"no space: need 294 B, have .* quota"):
        save(saved.parent, 8)
    assert os.listdir(saved.parent) == ["step-00000007"] and load(saved)


def test_unfinished_folders_are_not_checkpoints(saved):
    shutil.copytree(saved, saved.parent / ".tmp-step-00000009-123")
    (saved.parent / "step-00000010").mkdir()
    assert [s for s, _ in list_checkpoints(saved.parent)] == [7]


def test_another_model_is_refused_with_the_first_difference(saved):
    for other, says in [
        ({**tensors()["weights"], "c": torch.zeros(1)}, r"weights differ in 1 tensors, the first is c"),
        ({**tensors()["weights"], "b": torch.zeros(4)}, r"b has shape \[3\], the model's is \[4\]"),
        ({"a.weight": torch.zeros(6, 4)}, r"weights differ in 1 tensors, the first is b"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            Checkpoint(saved).load("weights", {n: TensorSlices.of_whole(t) for n, t in other.items()})


def test_files_and_folders_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    """The order of system calls: every file and the folder are synced, then the rename, then its parent is synced."""
    from pathlib import Path

    events = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda source, target: (events.append("rename"), rename(source, target))[1])
    save(tmp_path / "root", 5)
    at = events.index("rename")
    assert sorted(events[:at]) == [
        ".tmp-step-00000005",
        "manifest.json",
        "optimizer-00000-00001.safetensors",
        "weights-00000-00001.safetensors",
    ]
    assert events[at + 1 :] == ["root"]


def test_what_a_killed_save_left_behind_is_swept(saved):
    (saved.parent / ".tmp-step-00000008").mkdir()
    (saved.parent / ".tmp-step-00000008" / "weights-00000-00001.safetensors").write_bytes(b"half")
    save(saved.parent, 8)
    assert sorted(os.listdir(saved.parent)) == ["step-00000007", "step-00000008"]


def test_a_linked_old_checkpoint_is_left_alone(saved, tmp_path):
    outside = tmp_path / "elsewhere"
    shutil.copytree(saved, outside)
    (saved.parent / "step-00000001").symlink_to(outside)
    for step in (8, 9):
        save(saved.parent, step)
    assert (outside / "manifest.json").exists() and not saved.exists()


def test_unknown_formats_and_odd_entries_are_refused(saved):
    original = (saved / "manifest.json").read_text()
    for change, part in [
        (lambda m: m.update(format=1), "format 1 is unknown"),
        (
            lambda m: m["files"].update({"weights-00000-00002.safetensors": {}}),
            "not the name or the entry of a file or tensor",
        ),
        (
            lambda m: m["tensors"]["weights"].update({"b": {"shape": 3}}),
            "not the name or the entry of a file or tensor",
        ),
        (lambda m: m.pop("state"), "not the manifest of a checkpoint"),
    ]:
        (saved / "manifest.json").write_text(original)
        rewrite_manifest(saved, change)
        with pytest.raises(CheckpointError, match=part):
            Checkpoint(saved)


@pytest.mark.parametrize(
    ("content", "slices", "part"),
    [
        ({"a.weight": (4, 4), "b": (3,)}, {"a.weight": [[[0, 4], [0, 4]]], "b": [[[0, 3]]]}, "overlaps"),
        ({"a.weight": (6, 4), "b": (3,)}, {"a.weight": [[[0, 6]]], "b": [[[0, 3]]]}, "has no slice"),
        ({"a.weight": (6, 4), "b": (3,)}, {"a.weight": [[[2, 8], [0, 4]]], "b": [[[0, 3]]]}, "has no slice"),
        (
            {"a.weight": (6, 4), "b": (3,)},
            {"a.weight": [[[0, 6], [0, 4]]]},
            "not a readable safetensors file of slices",
        ),
        (
            {"a.weight": (6, 4), "b": (3,)},
            {"a.weight": [[[0, 6], [0, 4]]], "b": [[[0, 3]]]},
            "b is float32, the manifest says bfloat16",
        ),
    ],
)
def test_slices_that_do_not_fit_are_refused(saved, content, slices, part):
    """With the digests made to fit. In the first case a second file covers rows that the first one has."""

    def dtype(name):
        return torch.bfloat16 if name == "b" and "manifest" not in part else torch.float32

    files = {
        "weights-00000-00001.safetensors": ({n: torch.ones(s, dtype=dtype(n)) for n, s in content.items()}, slices)
    }
    if part == "overlaps":
        files["weights-00000-00002.safetensors"] = ({"a.weight": torch.ones(2, 4)}, {"a.weight": [[[3, 5], [0, 4]]]})
    recorded = {}
    for name, (parts, where) in files.items():
        save_file(parts, saved / name, {"slices": json.dumps(where)})
        recorded[name] = {"size": (saved / name).stat().st_size, "sha256": file_sha256(saved / name)}
    rewrite_manifest(saved, lambda m: m.update(files=recorded, tensors={"weights": m["tensors"]["weights"]}))
    with pytest.raises(CheckpointError, match=part):
        load(saved)
