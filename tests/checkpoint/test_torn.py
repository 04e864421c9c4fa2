"""Checkpoints left by a killed process, a bad disk or a full one: never used, always named, the one before is taken."""

import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from megaresnorm.checkpoint import writer
from megaresnorm.checkpoint.format import TensorSlices, list_checkpoints
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.resume import open_newest
from megaresnorm.checkpoint.writer import ALONE, save_checkpoint
from megaresnorm.errors import CheckpointError

ATTACHED = {"tokenizer.json": b'{"model": "bytes"}' * 20}
FILES = ["manifest.json", "weights-00000-00001.safetensors", "optimizer-00000-00001.safetensors", "tokenizer.json"]
SIGNS = {"weights": 1, "optimizer": -1}


def value(step: int) -> torch.Tensor:
    return torch.full((40, 30), float(step))


def save(root: Path, step: int) -> Path:
    groups = {
        group: {"a": TensorSlices.of_whole(value(sign * step)), "b": TensorSlices.of_whole(value(-step)[0])}
        for group, sign in SIGNS.items()
    }
    return save_checkpoint(root, step, groups, {"samples": step}, attached=ATTACHED)


def whole(checkpoint: Checkpoint) -> bool:
    return all(torch.equal(checkpoint.read(group, "a"), value(sign * checkpoint.step)) for group, sign in SIGNS.items())


CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir", "open")


def die_at(number: int) -> None:
    """Kill this process by SIGKILL at its number-th call that changes the disk: a write when it is half done."""
    done = 0

    def dying(name, call):
        def wrapped(*args, **kwargs):
            nonlocal done
            done += 1
            if done == number:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))


def test_a_save_killed_at_every_write_sync_and_rename_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """The third save, which also removes the first: dozens of places to die in, and the next save sweeps up."""
    base = tmp_path / "base"
    for step in (1, 2):
        save(base, step)
    monkeypatch.setattr(writer, "WRITE_BYTES", 400)
    found, number, died = set(), 0, True
    while died:
        number += 1
        root = tmp_path / f"at-{number}"
        shutil.copytree(base, root)
        child = os.fork()
        if child == 0:
            try:
                die_at(number)
                save(root, 3)
            finally:
                os._exit(0)
        died = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        newest = open_newest(root, ALONE, fallback=False)  # whatever has the name of a checkpoint is one
        assert whole(newest) and newest.step in (2, 3)
        found.add((newest.step, died))
        assert all(whole(Checkpoint(path)) for _, path in list_checkpoints(root))
        save(root, 4)
        steps = [2, 4] if newest.step == 2 else [3, 4]
        assert sorted(p.name for p in root.iterdir()) == [f"step-{step:08d}" for step in steps]
        shutil.rmtree(root)
    assert found == {(2, True), (3, True), (3, False)} and number > 50


def damaged_each_time(root: Path, name: str, contents):
    """Put each content in the file's place; the checkpoint before is taken, with a warning that names the file."""
    good, path = root / "step-00000001", root / "step-00000002" / name
    raw = path.read_bytes()
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("megaresnorm")
    logger.addHandler(handler)
    count = 0
    try:
        for content in contents(raw):
            messages.clear()
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=name):
                Checkpoint(path.parent)
            checkpoint = open_newest(root, ALONE, fallback=True)
            assert checkpoint.folder == good and whole(checkpoint)
            assert f"{path}: " in messages[0] and "going back to step-00000001" in messages[0]
            (root / "damaged-step-00000002").rename(path.parent)
            count += 1
    finally:
        logger.removeHandler(handler)
        path.write_bytes(raw)
    assert whole(Checkpoint(path.parent))
    return count


@pytest.fixture
def two(tmp_path) -> Path:
    for step in (1, 2):
        save(tmp_path, step)
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_200_places(two, name):
    def cut(raw):
        return (raw[:at] for at in np.unique(np.linspace(0, len(raw) - 1, 202).astype(int)))

    assert damaged_each_time(two, name, cut) >= 200


def test_500_flipped_bits_over_all_files(two):
    sizes = [(two / "step-00000002" / name).stat().st_size for name in FILES]
    generator, total = np.random.default_rng(1), 0
    for name, share in zip(FILES, generator.multinomial(500, np.array(sizes) / sum(sizes)), strict=True):

        def flipped(raw, share=share):
            for _ in range(share):
                content = bytearray(raw)
                content[generator.integers(len(raw))] ^= 1 << int(generator.integers(8))
                yield content

        total += damaged_each_time(two, name, flipped)
    assert total == 500


def test_every_bit_of_the_manifest_counts(two):
    """Also one that changes the case of an exponent, or a blank: nobody else would see that the disk is going."""

    def each(raw):
        for at in range(0, len(raw)):
            content = bytearray(raw)
            content[at] ^= 0x20
            yield content

    assert damaged_each_time(two, "manifest.json", each) == (two / "step-00000002" / "manifest.json").stat().st_size


def test_missing_extra_and_swapped_files(two):
    folder = two / "step-00000002"
    weights, optimizer = folder / FILES[1], folder / FILES[2]
    for change, undo, named in [
        (lambda: weights.rename(two / "away"), lambda: (two / "away").rename(weights), FILES[1]),
        (lambda: swap(weights, optimizer), lambda: swap(weights, optimizer), "safetensors"),
        (lambda: swap(two / "step-00000001", folder), lambda: swap(two / "step-00000001", folder), "of step 1"),
    ]:
        change()
        with pytest.raises(CheckpointError, match=named):
            Checkpoint(folder)
        undo()
    (folder / "weights-00001-00001.safetensors").write_bytes(weights.read_bytes())  # nobody names it, nobody reads it
    assert whole(Checkpoint(folder))


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def test_what_is_read_back_must_be_what_was_written(tmp_path, monkeypatch):
    """A disk that stores other bytes than it was given: the checkpoint is not made, and the one before stays."""
    save(tmp_path, 1)
    real = writer.file_sha256
    monkeypatch.setattr(writer, "file_sha256", lambda path, **options: real(path, **options)[::-1])
    with pytest.raises(CheckpointError, match="what was read back is not what was written"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_torn_one_among_the_newest_does_not_count_as_kept(two):
    (two / "step-00000002" / FILES[1]).write_bytes(b"torn")
    save(two, 3)
    assert [step for step, _ in list_checkpoints(two)] == [1, 2, 3]
    save(two, 4)
    assert [step for step, _ in list_checkpoints(two)] == [3, 4]


def test_permanent_checkpoints_stay(tmp_path):
    groups = {"weights": {"a": TensorSlices.of_whole(value(1))}}
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, groups, {}, retention=writer.Retention(2, every=3))
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3, 6, 7]
