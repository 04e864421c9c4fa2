"""Checkpoints made to do harm: no code runs, only the folder is read, each is refused in one line within a second."""

import json
import os
import pickle
import resource
import shutil
import time
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megaresnorm.checkpoint.format import TensorSlices, file_sha256
from megaresnorm.checkpoint.manifest import encode_manifest
from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.checkpoint.slices import FileSlice, beside_each_other
from megaresnorm.checkpoint.state import state_of
from megaresnorm.checkpoint.writer import save_checkpoint
from megaresnorm.errors import UserError
from megaresnorm.model.topology import topology
from megaresnorm.recipe.load import build_recipe

WEIGHTS, OPTIMIZER, TOKENIZER = "weights-00000-00001.safetensors", "optimizer-00000-00001.safetensors", "tokenizer.json"
TENSORS = {group: {"a": torch.arange(24.0).view(6, 4), "b": torch.ones(3)} for group in ("weights", "optimizer")}
STATE = {
    "samples": 1, "skipped_in_a_row": 0, "train_loss": 1.0, "engine": {"updates": 1, "clipper_steps": 0},
    "recipe": {"model": {"dim": 8, "num_blocks": 1, "num_heads": 1, "seq_len": 8, "vocab_size": 8},
               "data": {"path": "x"}, "train": {"output": "x", "steps": 1}},
    "data": "x", "tokenizer": None, "kernels": {}, "versions": {},
}  # fmt: skip


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def header(content, size: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with a header of one's own, whose size may be a lie."""
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return (len(encoded) if size is None else size).to_bytes(8, "little") + encoded + data


def entry(shape, end, dtype="F32", start=0):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def slices(**boxes):
    return {"slices": json.dumps(boxes)}


GOOD = {"a": entry([6, 4], 96), "b": entry([3], 108, start=96)}
BOXES = {"a": [[[0, 6], [0, 4]]], "b": [[[0, 3]]]}
FILES = {  # what stands in the place of the weights, with a manifest that agrees
    "header beyond the file": header(b"{}", size=10**6),
    "header of 2^63 bytes": header(b"{}", size=2**63),
    "header that is no JSON": header(b"\x80\x04boom"),
    "header of nested lists": header(b"[" * 100_000),
    "header of a list": header([]),
    "empty file": b"",
    "seven bytes": b"1234567",
    "a header alone": header({}),
    "10^12 elements": header({"a": entry([10**6, 10**6], 4 * 10**12),
                              "__metadata__": slices(a=[[[0, 10**6], [0, 10**6]]])}),
    "10^12 elements of few bytes": header({"a": entry([10**6, 10**6], 96), "__metadata__": slices(**BOXES)},
                                          data=bytes(96)),
    "a product of sizes that overflows": header({"a": entry([2**62, 4, 6], 96), "__metadata__": slices(**BOXES)},
                                                data=bytes(96)),
    "negative offsets": header({"a": entry([6, 4], 96, start=-96), "__metadata__": slices(**BOXES)}, data=bytes(96)),
    "overlapping tensors": header({**GOOD, "b": entry([3], 12), "__metadata__": slices(**BOXES)}, data=bytes(108)),
    "an unknown type": header({**GOOD, "a": entry([6, 4], 96, "PICKLE"), "__metadata__": slices(**BOXES)},
                              data=bytes(108)),
    "a type we do not write": header({"a": entry([6, 4], 24, "U8"), "__metadata__": slices(a=BOXES["a"])},
                                     data=bytes(24)),
    "no slices": header(GOOD, data=bytes(108)),
    "slices that are no JSON": header({**GOOD, "__metadata__": {"slices": "__import__('os')"}}, data=bytes(108)),
    "slices that are a list": header({**GOOD, "__metadata__": {"slices": "[1]"}}, data=bytes(108)),
    "slices of nested lists": header({**GOOD, "__metadata__": {"slices": "[" * 100_000}}, data=bytes(108)),
    "slices of strings": header({**GOOD, "__metadata__": slices(**{**BOXES, "b": [[["0", "x"]]]})}, data=bytes(108)),
    "slices beyond the tensor": header({**GOOD, "__metadata__": slices(**{**BOXES, "b": [[[1, 4]]]})}, data=bytes(108)),
    "negative slices": header({**GOOD, "__metadata__": slices(**{**BOXES, "b": [[[-3, 0]]]})}, data=bytes(108)),
    "infinite slices": header({**GOOD, "__metadata__": {"slices": '{"a": [[[0, 1e999], [0, 4]]]}'}}, data=bytes(108)),
    "slices of 10^30 rows": header({**GOOD, "__metadata__": slices(**{**BOXES, "b": [[[0, 10**30]]]})},
                                   data=bytes(108)),
    "slices that overlap": header({**GOOD, "__metadata__": slices(**{**BOXES, "b": [[[0, 2]], [[1, 2]]]})},
                                  data=bytes(108)),
    "another tensor": header(
        {**GOOD, "c": entry([1], 112, start=108), "__metadata__": slices(**BOXES, c=[[[0, 1]]])}, data=bytes(112)
    ),
    "a tensor named twice": header(
        (
            json.dumps({"a": entry([6, 4], 96)})[:-1] + ", "
            + json.dumps({**GOOD, "__metadata__": slices(**BOXES)})[1:]
        ).encode(),
        data=bytes(108),
    ),
    "slices named twice": header(
        json.dumps({**GOOD, "__metadata__": slices(**BOXES)})
        .replace('{"slices"', '{"slices": "{}", "slices"').encode(),
        data=bytes(108),
    ),
    "a tensor less": header({"a": GOOD["a"], "__metadata__": slices(**BOXES)}, data=bytes(96)),
}  # fmt: skip


def nested(depth: int) -> dict:
    return {"a": nested(depth - 1)} if depth else {}


NAMES = [  # of a file in the manifest
    "../outside-00000-00001.safetensors", "/etc/passwd", "a/weights-00000-00001.safetensors", ".", "..", "",
    "weights-00000-1.pt", "weights-00000-00001.safetensors\n", "weights-00000-00001.safetensors\x00.txt",
    "manifest.json", "x" * 10_000, "weights-0000\u0660-00001.safetensors",
]  # fmt: skip
MANIFESTS = {
    "a shape of 10^12 elements": lambda m: m["tensors"]["weights"]["a"].update(shape=[10**6, 10**6]),
    "a negative shape": lambda m: m["tensors"]["weights"]["a"].update(shape=[-6, -4]),
    "a shape of words": lambda m: m["tensors"]["weights"]["a"].update(shape=["6", "4"]),
    "another step": lambda m: m.update(step=10**9),
    "a shape of nothing": lambda m: m["tensors"]["weights"]["a"].update(shape=[]),
    "a file of 10^400 bytes": lambda m: m["files"][WEIGHTS].update(size=10**400),
    "a tensor that is a file": lambda m: m["tensors"]["weights"].update(a=m["files"][WEIGHTS]),
    "a size of words": lambda m: m["files"][WEIGHTS].update(size="many"),
    "groups of lists": lambda m: m["tensors"].update(weights=[]),
    "a state that is nested 900 deep": lambda m: m.update(state=nested(900)),
    "no state": lambda m: m.update(state={}),
    "a state of words": lambda m: m["state"].update(samples="__import__('os').system('id')"),
    "a recipe of nothing": lambda m: m["state"].update(recipe={}),
    "a recipe with code": lambda m: m["state"]["recipe"]["model"].update(
        topology="!!python/object/apply:os.system [id]"
    ),
}
RAW_MANIFESTS = {
    "1 GB": None,  # sparse
    "16 MB of numbers": b'{"format": 2, "state": [' + b"0," * (8 * 2**20 - 20) + b"0]}",
    "16 MB of lists": b"[" * (2**24),
    "16 MB of names": b'{"files": {' + b",".join(b'"%d":{}' % i for i in range(10**6)) + b"}}",
    "nested": b'{"a":' * 100_000,
    "endless number": b'{"step": ' + b"9" * 100_000 + b"}",
    "twice the same key": b'{"format": 2, "format": 2}',
    "a digest of no character": b'{"digest":"\\ud800","format":2,"step":1,"files":{},"tensors":{},"state":{}}',
    "an empty digest": b'{"digest":"","format":2,"step":1,"files":{},"tensors":{},"state":{}}',
    "empty": b"",
    "not UTF-8": b"\xff\xfe\x00",
}


@pytest.fixture
def folder(tmp_path):
    groups = {group: {n: TensorSlices.of_whole(t) for n, t in members.items()} for group, members in TENSORS.items()}
    return save_checkpoint(tmp_path / "checkpoints", 1, groups, STATE, attached={TOKENIZER: b"{}"})


def seal(folder: Path, change=lambda manifest: None) -> None:
    """Make the manifest agree with the files, as whoever means harm would."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in manifest["files"]:
        path = folder / name
        if path.is_file():
            manifest["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    change(manifest)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


def in_place_of(name):
    def put(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        if name != "manifest.json":
            seal(folder)

    return put


def pickles(canary: Path):
    yield "pickle", pickle.dumps(Bomb(canary))
    path = canary.with_name("zip")
    torch.save({"a": Bomb(canary)}, path)
    yield "torch.save", path.read_bytes()


def link(name, target):
    def make(folder: Path) -> None:
        real = folder.parent / "elsewhere"
        (folder / name).rename(real)
        (folder / name).symlink_to(real if target is None else target)

    return make


def special(name, make):
    def replace(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return replace


def rename_in_manifest(name):
    def rename(manifest) -> None:
        manifest["files"][name] = manifest["files"].pop(WEIGHTS)

    return rename


def corpus(canary: Path):
    """(what, how to make it of a good checkpoint)"""
    for kind, content in pickles(canary):
        for name in ("manifest.json", WEIGHTS, OPTIMIZER, TOKENIZER):
            if name != TOKENIZER:  # which is read by the tokenizer alone
                yield f"{kind} as {name}", lambda f, name=name, content=content: in_place_of(name)(f, content)
    for what, content in FILES.items():
        yield f"weights: {what}", lambda f, content=content: in_place_of(WEIGHTS)(f, content)
    for name in NAMES:
        yield f"the name {name[:40]!r}", lambda f, name=name: seal(f, rename_in_manifest(name))
    for what, change in MANIFESTS.items():
        yield f"manifest with {what}", lambda f, change=change: seal(f, change)
    for what, content in RAW_MANIFESTS.items():
        yield f"manifest: {what}", lambda f, content=content: raw_manifest(f, content)
    yield "100,000 slices beside each other", many_slices
    yield "weights are a link", link(WEIGHTS, None)
    yield "the manifest is a link", link("manifest.json", None)
    yield "weights are a link to /etc/passwd", link(WEIGHTS, "/etc/passwd")
    yield "weights are a link to nothing", link(WEIGHTS, "/nowhere")
    yield "weights are a pipe that never ends", special(WEIGHTS, os.mkfifo)
    yield "the manifest is a pipe that never ends", special("manifest.json", os.mkfifo)
    yield "weights are a folder", special(WEIGHTS, os.mkdir)


def many_slices(folder: Path) -> None:
    """Comparing each with each would take minutes."""
    boxes = [[[0, 1], [i, i + 1]] for i in range(100_000)]
    content = {"a": entry([100_000, 1], 400_000), "__metadata__": slices(a=boxes)}
    (folder / WEIGHTS).write_bytes(header(content, data=bytes(400_000)))
    seal(folder, lambda m: m["tensors"].update(weights={"a": {"shape": [1, 100_000], "dtype": "float32"}}))


def raw_manifest(folder: Path, content: bytes | None) -> None:
    if content is None:
        os.truncate(folder / "manifest.json", 2**30)
    else:
        (folder / "manifest.json").write_bytes(content)


def use(folder: Path) -> None:
    """All that a run or a conversion would do with a checkpoint."""
    checkpoint = Checkpoint(folder)
    topology(build_recipe(state_of(folder, checkpoint.state).recipe).model.topology)
    for group, members in TENSORS.items():
        checkpoint.load(group, {n: TensorSlices.of_whole(torch.empty_like(t)) for n, t in members.items()})


def test_the_good_one_can_be_used(folder):
    use(folder)


def refuse_all(folder: Path, tmp_path: Path) -> None:
    canary, victim = tmp_path / "canary", tmp_path / "step-00000001"
    (tmp_path / "outside-00000-00001.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    before, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    for what, make in corpus(canary):
        shutil.rmtree(victim, ignore_errors=True)
        shutil.copytree(folder, victim)
        make(victim)
        start = time.process_time()  # other processes may have the machine
        with pytest.raises(UserError) as refused:
            use(victim)
        seconds = time.process_time() - start
        says = str(refused.value)
        assert seconds < 1 and says.count("\n") == 0 and len(says) < 1000, (what, seconds, says[:2000])
        assert not canary.exists(), what
        used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert used < 100, (what, used)  # MiB
        count += 1
    assert count >= 50


def test_over_fifty_hostile_checkpoints_are_refused_at_once(folder, tmp_path):
    """In a process of its own, whose memory has never been larger."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refuse_all(folder, tmp_path)
            code = 0
        except BaseException:  # noqa: BLE001 - the parent shows it
            (tmp_path / "error").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert status == 0, (tmp_path / "error").read_text()


def test_slices_beside_each_other_are_compared_up_to_a_bound():
    """Those of very many files: comparing each with each would take hours."""
    held = [FileSlice(f"weights-{i:05d}-00001.safetensors", 0, ((0, 1), (i, i + 1))) for i in range(100_000)]
    start = time.process_time()
    with pytest.raises(UserError, match="over 1024 slices of the same rows"):
        list(beside_each_other(held))
    assert time.process_time() - start < 1


def test_the_canary_would_sing(tmp_path):
    """The pickles of the corpus do run where they are unpickled."""
    canary = tmp_path / "canary"
    pickle.loads(dict(pickles(canary))["pickle"])  # noqa: S301 - that is the point
    assert canary.is_dir()


def test_more_tensors_than_there_are_is_no_way_in(folder):
    """A file that the manifest does not name is not read, whatever it is."""
    save_file({"a": torch.zeros(1)}, folder / "weights-00007-00001.safetensors")
    use(folder)
